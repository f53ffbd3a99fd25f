"""Mutual TLS for the gRPC ports of SeaweedFS, which take any caller without it.

Whoever reaches the gRPC port of its S3 server may otherwise give himself a key with all rights (`PutIdentity`). That of
its filer tells and changes what is stored. With a certificate set, these ports talk to its holders alone. One does for
all of a stack's components, since each is server and client of the others: SeaweedFS does not compare host names. The
certificate is its own authority and lies with its key in one file of mode 0600.
"""

import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

COMPONENTS = ("MASTER", "VOLUME", "FILER", "S3", "CLIENT")
_DAYS = 36500  # as long as a stack's other secrets: no end
_BACK = datetime.timedelta(days=1)  # for clocks that are set back


def new_certificate() -> str:
    """A private key and its certificate, PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tomoscale")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACK)
        .not_valid_after(now + datetime.timedelta(days=_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return (private + certificate.public_bytes(Encoding.PEM)).decode()


def environment(path: Path) -> dict[str, str]:
    """What SeaweedFS needs in its environment to use the certificate at `path`, in place of a `security.toml`."""
    parts = {f"WEED_GRPC_{component}_{part}": str(path) for component in COMPONENTS for part in ("CERT", "KEY")}
    return {"WEED_GRPC_CA": str(path), **parts}
