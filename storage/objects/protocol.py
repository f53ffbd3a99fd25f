"""Named bytes behind one small interface: the protocol of a store, and what every backend checks.

Keys are relative to the URL that opened the store, separated by `/`, without a leading slash. Stores are thread-safe
and survive pickling (they reopen by URL), and must not be carried through `fork`.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

from storage.errors import ConfigError, CorruptChunk


class ByteStore(Protocol):
    """What every backend offers.

    Every method raises `NotFound` for a missing object, `CorruptChunk` for an object shorter than the range asked for,
    and `StoreError` for anything else that is still wrong after retries; each names the full key.
    """

    url: str

    def get(self, key: str) -> bytes:
        """The whole object."""

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of the object, all of them or an error."""

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Several ranges of one object, fetched concurrently where that helps, in the order asked."""

    def get_suffix(self, key: str, n: int) -> bytes:
        """The last n bytes, or the whole object where it is shorter."""

    def put(self, key: str, data: bytes, if_absent: bool = False) -> bool:
        """Write the object in one atomic step; False if `if_absent` and another object is there already."""

    def swap(self, key: str, data: bytes, expected: bytes | None) -> bool:
        """Replace the object if it still holds `expected` (None: if there is none); False, and nothing done, if not.

        Of several writers that saw the same, one wins. Writers that use `put` are not held back.
        """

    def head(self, key: str) -> int:
        """The object's size in bytes."""

    def exists(self, key: str) -> bool:
        """Whether the object is there."""

    def list(self, prefix: str = "") -> Iterator[str]:
        """Keys that start with `prefix` (a plain string prefix), sorted."""

    def delete(self, key: str) -> None:
        """Remove the object; a missing one is no error."""


def join(url: str, *parts: str) -> str:
    """`url` with path parts appended, one slash between them.

    >>> join("s3://bucket/a/", "b", "c")
    's3://bucket/a/b/c'
    """
    scheme, mark, rest = url.rpartition("://")
    rest = rest.rstrip("/")
    root = scheme + mark + ("/" if scheme in ("", "file") and not rest else "")
    tail = "/".join(p.strip("/") for p in parts if p.strip("/"))
    return root + "/".join(part for part in (rest, tail) if part)


def check_key(key: str) -> str:
    """Refuse keys that would leave the store or mean different things to different backends.

    Raises:
        ConfigError: empty, absolute, or with an empty, `.` or `..` part.
    """
    if not key or any(part in ("", ".", "..") for part in key.split("/")) or "\\" in key or "\0" in key:
        raise ConfigError(f"key {key!r}", expected="parts joined by single slashes, none empty, '.' or '..'", found=key)
    return key


def check_prefix(prefix: str) -> str:
    """Refuse prefixes that would list what lies outside the store; unlike a key a prefix may end anywhere.

    Raises:
        ConfigError: absolute, or with a `.` or `..` part.
    """
    if prefix.startswith("/") or any(part in (".", "..") for part in prefix.split("/")[:-1]):
        raise ConfigError(f"prefix {prefix!r}", expected="the beginning of a key", found=prefix)
    return prefix


def check_range(thing: str, start: int, stop: int) -> None:
    """Refuse a negative or reversed range."""
    if not 0 <= start <= stop:
        raise ConfigError(thing, expected="0 <= start <= stop", found=f"[{start}, {stop})")


def truncated(thing: str, start: int, stop: int, size: int | None = None) -> CorruptChunk:
    """The error for an object that ends before the range does."""
    available = "fewer" if size is None else f"an object of {size} bytes"
    return CorruptChunk(thing, expected=f"bytes [{start}, {stop})", found=available, remedy="the object is truncated")
