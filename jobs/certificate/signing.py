"""Ed25519 signatures of certificates, with a key of the user's.

The private key stays in its file: nothing of it, and not its path, goes into a configuration, a log or a certificate.
"""

import os
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    load_pem_private_key,
    load_pem_public_key,
    load_ssh_private_key,
    load_ssh_public_key,
)

from ssl_core.train.chain import canonical
from storage.errors import ConfigError

KEY_VARIABLE = "TOMOSCALE_SIGNING_KEY_FILE"
ALGORITHM = "ed25519"
_MAKE = "`openssl genpkey -algorithm ed25519 -out key.pem` makes one"


def own_key() -> Ed25519PrivateKey | None:
    """The key in the file that $TOMOSCALE_SIGNING_KEY_FILE names; None where it names none.

    Raises:
        ConfigError: see `private_key`.
    """
    path = os.environ.get(KEY_VARIABLE, "")
    return private_key(Path(path), f"${KEY_VARIABLE}") if path else None


def private_key(path: Path, option: str) -> Ed25519PrivateKey:
    """The Ed25519 key in a PEM or OpenSSH file without a passphrase.

    Args:
        path: The file.
        option: What named it, for the message, which does not repeat the path.

    Raises:
        ConfigError: no such file, or another kind of key.
    """
    key: Ed25519PrivateKey = _key(path, option, Ed25519PrivateKey, _MAKE)
    return key


def public_key(path: Path, option: str) -> str:
    """The Ed25519 public key in a PEM or OpenSSH file, 64 hexadecimal digits.

    Raises:
        ConfigError: no such file, or another kind of key.
    """
    remedy = "`openssl pkey -in key.pem -pubout -out public.pem` takes it from a key"
    key: Ed25519PublicKey = _key(path, option, Ed25519PublicKey, remedy)
    return key.public_bytes_raw().hex()


def _key(path: Path, option: str, kind: Any, remedy: str) -> Any:
    private = kind is Ed25519PrivateKey
    expected = f"a file with an Ed25519 {'private key without a passphrase' if private else 'public key'}"
    try:
        text = path.read_bytes()
        if private:
            load = load_ssh_private_key if b"OPENSSH" in text[:64] else load_pem_private_key
            key: Any = load(text, password=None)
        else:
            key = load_ssh_public_key(text) if text.startswith(b"ssh-") else load_pem_public_key(text)
    except OSError as error:
        raise ConfigError(option, expected=expected, found=error.strerror or "no file", remedy=remedy) from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        # Not the library's words, which may quote what the file holds.
        raise ConfigError(option, expected=expected, found="another content", remedy=remedy) from error
    if not isinstance(key, kind):
        raise ConfigError(option, expected=expected, found=f"a key of kind {type(key).__name__}", remedy=remedy)
    return key


def signature(key: Ed25519PrivateKey, body: dict[str, Any]) -> dict[str, str]:
    """The signature of a document, as JSON."""
    public = key.public_key().public_bytes_raw().hex()
    return {"algorithm": ALGORITHM, "public_key": public, "value": key.sign(canonical(body)).hex()}


def is_signed(body: dict[str, Any], signed: dict[str, str]) -> bool:
    """Whether the signature is that of the document by the public key that it names."""
    try:
        if signed["algorithm"] != ALGORITHM:
            return False
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(signed["public_key"]))
        public.verify(bytes.fromhex(signed["value"]), canonical(body))
    except (InvalidSignature, KeyError, TypeError, ValueError):
        return False
    return True
