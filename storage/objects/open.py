"""Which backend a URL means: the only file that knows all of them."""

import re
from pathlib import Path
from unicodedata import category
from urllib.parse import unquote, urlsplit

from storage.errors import ConfigError
from storage.objects.local import FileStore
from storage.objects.memory import MemoryStore
from storage.objects.protocol import ByteStore
from storage.objects.retry import RetryPolicy


def open_store(url: str, policy: RetryPolicy | None = None) -> ByteStore:
    """Open `s3://`, `file://` (or a plain path), `memory://`, `http(s)://` (read-only) or another fsspec URL.

    Credentials and endpoints come from the ordinary AWS environment, never from the URL.

    Raises:
        ConfigError: see `check_url`, or the URL is malformed or names an unknown scheme.
    """
    policy = policy or RetryPolicy.from_environment()
    check_url(url)
    if "://" not in url:
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/|(s3|file|memory|https?):", url):  # silently a folder of that odd name
            raise ConfigError(url, expected="two slashes behind the scheme, as in s3://bucket", found="fewer")
        return FileStore(Path(url))
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise ConfigError(url, expected="a URL", found=str(error)) from error
    if parts.scheme in ("file", "memory", "s3", "http", "https") and (parts.query or parts.fragment):
        # It would be left out, and two URLs would mean one place.
        raise ConfigError(
            url, expected="a URL without ? and #", found="one of them", remedy="in file:// write %3F, %23"
        )
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise ConfigError(url, expected="file:///absolute/path", found=f"host {parts.netloc!r}")
        return FileStore(Path(unquote(parts.path)))
    if parts.scheme == "memory":
        return MemoryStore(url)
    if parts.scheme == "s3":
        from storage.objects.s3_http import open_s3  # imported when used: obstore and botocore cost start-up time

        return open_s3(url, policy)
    if parts.scheme in ("http", "https"):
        from storage.objects.s3_http import open_http

        return open_http(url, policy)
    from storage.objects.any_fsspec import FsspecStore

    return FsspecStore(url, policy)


def check_url(url: str) -> None:
    """Refuse a URL that carries credentials, or that could mean another place than it says.

    Backends differ on `.`, `..` and empty parts of a path: some resolve them, some take them as names. An empty URL, as
    of a variable that is not set, would be the current folder. A plain path is the file system's to resolve.

    Raises:
        ConfigError: names what is wrong.
    """
    refuse_credentials(url)
    remedy = "write the place out, such as s3://bucket/folder or file:///data/folder"
    if not url.strip():
        raise ConfigError("URL", expected="the place of a store", found=repr(url), remedy=f"{remedy}; . is this folder")
    if any(category(character) == "Cc" for character in url):
        raise ConfigError(repr(url), expected="a URL without control characters", found="one", remedy=remedy)
    scheme, mark, rest = url.partition("://")
    if not mark or scheme == "file" or "::" in url:
        return
    if url != url.strip():
        raise ConfigError(repr(url), expected="a URL without spaces around it", found="some", remedy=remedy)
    parts = rest.removesuffix("/").split("/") if rest else []
    wrong = ("", ".", "..") if scheme in ("s3", "memory") else (".", "..")
    if any(unquote(part) in wrong for part in parts):
        raise ConfigError(
            url, expected="a path without empty parts, '.' and '..'", found=f"the path {rest}", remedy=remedy
        )


# Parameters of URLs that let in whoever has the URL: presigned S3, Google and Azure, and what services call a key.
_SIGNED = re.compile(
    r"[?&;#](x-(amz|goog)-(signature|credential|security-token)|signature|sig|awsaccesskeyid|googleaccessid|key-pair-id|code|jwt|bearer|authorization"
    r"|(access|auth|api|secret|session|id|sas)?[-_]?(token|key|secret)|password|passwd|pwd|credentials?)=[^&;#]",
    re.IGNORECASE,
)


def refuse_signature(text: str) -> None:
    """Refuse a URL whose parameters let in whoever has it, such as a presigned one, without repeating them.

    Raises:
        ConfigError: it is one.
    """
    if "://" in text and (match := _SIGNED.search(text) or _SIGNED.search(unquote(text))):
        raise ConfigError(
            f"{re.split('[?#;%]', text)[0].rpartition('@')[2] or 'URL'}?...",
            expected="a URL without credentials",
            found=f"the parameter {match[1]}",
            remedy="configurations are shown and logged: credentials belong into the environment of the nodes",
        )


def refuse_credentials(url: str) -> None:
    """Refuse `scheme://user:password@...`, wherever in the URL, and signatures, without repeating them.

    A secret may hold slashes: but for URLs that may have a port and a path, every `@` behind a colon counts.

    Raises:
        ConfigError: there are some.
    """
    refuse_signature(url)
    for scheme, rest in re.findall(r"([A-Za-z0-9+.-]+):/+(.*?)(?=::|$)", url, re.DOTALL):
        ported = scheme.lower() in ("http", "https", "file", "memory")
        if "@" in rest.partition("/")[0] or (not ported and ":" in rest.partition("@")[0] and "@" in rest):
            clean = f"{scheme}://{rest.rpartition('@')[2]}"
            raise ConfigError(clean, expected="a URL without credentials", found="a user or password in it")
