"""Servers whose certificate a client does not trust: no outage, so that waiting for them does not help."""

import re
from collections.abc import Iterator

_REFUSALS = re.compile(
    r"CERTIFICATE_VERIFY_FAILED\] certificate verify failed: (?P<openssl>[^(\n]*[^(\n ])"
    r"|InvalidCertificate\(\s*(?P<rustls>\w+)"
)
REMEDY = (
    "name the file of its authority in SSL_CERT_FILE, REQUESTS_CA_BUNDLE and AWS_CA_BUNDLE; "
    "a certificate must name the host or address that is connected to"
)
"""Object store, MLflow's client and botocore read one of them each."""


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it was raised from or during, the newest first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def distrust(error: BaseException) -> str:
    """What is wrong with the server's certificate, as OpenSSL or rustls says it; empty where it is something else."""
    for cause in causes(error):
        if match := _REFUSALS.search(str(cause)):
            return match["openssl"] or match["rustls"]
    return ""
