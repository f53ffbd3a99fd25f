"""S3 and HTTP through obstore, with our own retries, deadline and messages."""

import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import urlsplit

import obstore
from obstore import exceptions
from obstore.store import HTTPStore, S3Store

from storage.errors import ConfigError, NotFound, NotOffered, StoreError
from storage.fork_guard import same_process
from storage.objects.aws import resolve
from storage.objects.certificates import REMEDY, distrust
from storage.objects.protocol import check_key, check_prefix, check_range, join, truncated
from storage.objects.retry import RetryPolicy, TransientError, retry
from storage.objects.traffic import Traffic

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig, S3Config, S3CredentialProvider

T = TypeVar("T")
PROBE = "probe"
"""Object by which a server is tried; deleted again."""
IN_FLIGHT = 16  # ranges of one `get_ranges` call in flight; beyond it loopback and real S3 gained nothing


def open_s3(url: str, policy: RetryPolicy) -> "ObjectStore":
    """Open `s3://bucket/prefix` with the endpoint, region and credentials of botocore's default session.

    Raises:
        ConfigError: no bucket in the URL, or no credentials anywhere botocore looks.
    """
    parts = urlsplit(url)
    if not parts.netloc:
        raise ConfigError(url, expected="s3://bucket/prefix", found="no bucket")
    access = resolve(url)
    options: S3Config = {
        "bucket": parts.netloc,
        "region": access.region,
        "virtual_hosted_style_request": access.endpoint is None,
        # A refusal inside a bulk answer of status 200 has no error type of its own.
        "disable_bulk_delete": True,
    }
    if access.endpoint is not None:
        options["endpoint"] = access.endpoint
    plain = bool(access.endpoint and access.endpoint.startswith("http://"))
    store = S3Store(
        prefix=parts.path.strip("/") or None,
        client_options=_client(policy, allow_http=plain),
        retry_config=_NO_RETRIES,
        credential_provider=cast("S3CredentialProvider", access.credential),
        **options,
    )
    return ObjectStore(url.rstrip("/"), store, policy, where=access.endpoint or "AWS S3")


def open_http(url: str, policy: RetryPolicy) -> "ObjectStore":
    """Open a read-only store below an `http(s)://` URL."""
    store = HTTPStore.from_url(
        url.rstrip("/"), client_options=_client(policy, allow_http=True), retry_config=_NO_RETRIES
    )
    return ObjectStore(url.rstrip("/"), store, policy, where=url, read_only=True)


_process: list[int] = []
"""The process in which obstore's threads run, from the first request on: in a fork no client of it gets an answer, not
even one that is opened there, and its timeouts do not run either."""
_NO_RETRIES: "RetryConfig" = {"max_retries": 0, "retry_timeout": timedelta(seconds=1)}


def _client(policy: RetryPolicy, *, allow_http: bool) -> "ClientConfig":
    return {
        "timeout": timedelta(seconds=policy.attempt_s),
        "connect_timeout": timedelta(seconds=min(policy.connect_s, policy.attempt_s)),
        "allow_http": allow_http,
    }


class ObjectStore:
    """An obstore store behind `ByteStore`."""

    def __init__(self, url: str, store: Any, policy: RetryPolicy, *, where: str, read_only: bool = False) -> None:
        self.url, self.traffic = url, Traffic()
        self._store, self._policy, self._where, self._read_only = store, policy, where, read_only
        self._pool: ThreadPoolExecutor | None = None
        self._conditional: bool | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[object, ...]:
        return open_http if self._read_only else open_s3, (self.url, self._policy)

    def _call(self, key: str, attempt: Callable[[], T]) -> T:
        thing = join(self.url, key)
        _refuse_fork(thing)
        tries = 0

        def once() -> T:
            nonlocal tries
            self.traffic.request(is_retry=tries > 0)
            tries += 1
            try:
                return attempt()
            except (exceptions.NotFoundError, FileNotFoundError) as error:
                raise NotFound(thing, expected="an object", found="none") from error
            except exceptions.BaseError as error:
                refused = isinstance(error, (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError))
                if refused or _status(error) in (401, 403):
                    raise StoreError(
                        thing,
                        expected=f"access at {self._where}",
                        found=f"refused: {_reason(error)}",
                        remedy="check the credentials of the AWS environment and the rights of that key",
                    ) from error
                if self._read_only and isinstance(error, exceptions.NotSupportedError):
                    raise NotOffered(
                        thing,
                        expected="a server that answers range requests",
                        found=_reason(error),
                        remedy="Python's own http.server does not; nginx, Apache and object stores do",
                    ) from error
                if wrong := distrust(error):
                    raise StoreError(
                        thing,
                        expected=f"a certificate of {self._where} that this machine trusts",
                        found=wrong,
                        remedy=REMEDY,
                    ) from error
                if _is_final(error):
                    raise StoreError(thing, expected=f"an answer of {self._where}", found=_reason(error)) from error
                raise TransientError(_reason(error)) from error

        return retry(once, self._policy, thing)

    def _read(self, key: str, attempt: Callable[[], bytes]) -> bytes:
        data = self._call(key, attempt)
        self.traffic.read(len(data))
        return data

    def _writable(self, key: str) -> None:
        if self._read_only:
            raise NotOffered(join(self.url, key), expected="a writable store", found="a read-only http(s) URL")

    def get(self, key: str) -> bytes:
        """See `ByteStore`."""
        check_key(key)
        return self._read(key, lambda: bytes(obstore.get(self._store, key).bytes()))

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        """See `ByteStore`."""
        check_key(key)
        check_range(join(self.url, key), start, stop)
        if start == stop:
            return b""

        def attempt() -> bytes:
            try:
                return bytes(obstore.get_range(self._store, key, start=start, end=stop))
            except exceptions.BaseError as error:
                if _is_beyond(error):  # the object ends before `start`
                    raise truncated(join(self.url, key), start, stop) from error
                raise

        data = self._read(key, attempt)
        if len(data) != stop - start:
            raise truncated(join(self.url, key), start, stop, start + len(data))
        return data

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """See `ByteStore`."""
        if len(ranges) <= 1:
            return [self.get_range(key, start, stop) for start, stop in ranges]
        _refuse_fork(join(self.url, key))
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="ranges")
        return list(self._pool.map(lambda r: self.get_range(key, r[0], r[1]), ranges))

    def get_suffix(self, key: str, n: int) -> bytes:
        """See `ByteStore`."""
        check_key(key)

        def attempt() -> bytes:
            try:
                return bytes(obstore.get(self._store, key, options={"range": {"suffix": n}}).bytes())
            except exceptions.BaseError as error:
                if _is_beyond(error):  # an empty object has no last bytes
                    return b""
                raise

        return self._read(key, attempt)

    def put(self, key: str, data: bytes, if_absent: bool = False) -> bool:
        """See `ByteStore`."""
        check_key(key)
        self._writable(key)
        tries = 0

        def attempt() -> bool:
            nonlocal tries
            tries += 1
            try:
                # One request, so that the object appears whole or not at all.
                obstore.put(self._store, key, data, use_multipart=False, mode="create" if if_absent else "overwrite")
            except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
                # After a lost answer the object may be ours.
                return tries > 1 and bytes(obstore.get(self._store, key).bytes()) == data
            return True

        return self._call(key, attempt)

    def swap(self, key: str, data: bytes, expected: bytes | None) -> bool:
        """See `ByteStore`. By `If-Match`, which is tried first: some servers take the header and ignore it."""
        if expected is None:
            return self.put(key, data, if_absent=True)
        check_key(key)
        self._writable(key)
        if self._conditional is None:
            self._conditional = self._honours_conditions()
        tries = 0

        def attempt() -> bool:
            nonlocal tries
            tries += 1
            answer = obstore.get(self._store, key)
            content = bytes(answer.bytes())
            if content != expected:
                return tries > 1 and content == data  # after a lost answer it may be ours
            mode: Any = {"e_tag": answer.meta["e_tag"] or ""} if self._conditional else "overwrite"
            try:
                obstore.put(self._store, key, data, use_multipart=False, mode=mode)
            except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
                return False
            return True

        try:
            return self._call(key, attempt)
        except NotFound:
            return False

    def _honours_conditions(self) -> bool:
        """Whether the server refuses a write whose condition does not hold; warns where it does not."""
        self.put(PROBE, b"-")

        def attempt() -> bool:
            mode: Any = {"e_tag": f'"{"0" * 32}"'}
            try:
                obstore.put(self._store, PROBE, b"!", use_multipart=False, mode=mode)
            except (exceptions.AlreadyExistsError, exceptions.PreconditionError, exceptions.NotFoundError):
                return True
            except (exceptions.NotSupportedError, NotImplementedError):
                return False
            except exceptions.BaseError as error:
                if _status(error) != 501:
                    raise
            return False

        honoured = self._call(PROBE, attempt)
        with suppress(StoreError):  # who may write may not always delete
            self.delete(PROBE)
        if not honoured:
            warnings.warn(
                f"{self._where} ignores If-Match: two jobs that publish to {self.url} at the same moment would not "
                "notice each other; run one at a time",
                RuntimeWarning,
                stacklevel=4,
            )
        return honoured

    def head(self, key: str) -> int:
        """See `ByteStore`."""
        check_key(key)
        return int(self._call(key, lambda: obstore.head(self._store, key)["size"]))

    def exists(self, key: str) -> bool:
        """See `ByteStore`."""
        try:
            self.head(key)
        except NotFound:
            return False
        return True

    def list(self, prefix: str = "") -> Iterator[str]:
        """See `ByteStore`."""
        # obstore lists by whole path parts; the rest of a prefix is matched here.
        folder = check_prefix(prefix).rpartition("/")[0]

        def attempt() -> list[str]:
            try:
                return [m["path"] for batch in obstore.list(self._store, folder or None) for m in batch]
            except exceptions.BaseError as error:
                if self._read_only and (_status(error) in _NO_LISTING or "decoding PROPFIND" in str(error)):
                    raise NotOffered(
                        join(self.url, prefix),
                        expected="a server that lists its objects, as WebDAV servers do",
                        found=_reason(error),
                        remedy="a published data set is read without any list",
                    ) from error
                raise

        # Some programs mark "folders" by empty objects named like the prefix or ending in a slash; they hold nothing.
        return iter(sorted(k for k in self._call(prefix, attempt) if k.startswith(prefix) and k and k[-1] != "/"))

    def delete(self, key: str) -> None:
        """See `ByteStore`."""
        check_key(key)
        self._writable(key)
        try:
            self._call(key, lambda: obstore.delete(self._store, key))
        except NotFound:
            return


def _refuse_fork(thing: str) -> None:
    if not _process:
        _process.append(os.getpid())
    same_process(_process[0], thing)


def _reason(error: BaseException) -> str:
    """obstore's message without its dump of nested Rust structures, and of a server's XML what it says."""
    text = str(error).split("\n\nDebug source:")[0]
    parts = [
        part[1] for part in (re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL) for tag in ("Code", "Message")) if part
    ]
    if parts:
        text = text[: text.index("<")] + ": ".join(parts)
    return " ".join(text.split())[:300]


_NO_LISTING = (400, 403, 404, 405, 415, 501)
"""What servers say to the WebDAV request for a list when they know none."""
_STATUS = re.compile(r"non-2xx status code: (\d{3})")


def _status(error: BaseException) -> int | None:
    """The HTTP status in obstore's message; the exception has no field for it."""
    match = _STATUS.search(str(error))
    return int(match[1]) if match else None


def _is_beyond(error: exceptions.BaseError) -> bool:
    return _status(error) == 416


def _is_final(error: exceptions.BaseError) -> bool:
    """Whether repeating the request cannot help: misuse of the client, or a refusal other than "too busy"."""
    if isinstance(error, (exceptions.InvalidPathError, exceptions.NotSupportedError)):
        return True
    status = _status(error)
    return status is not None and (300 <= status < 500 or status == 501) and status not in (408, 409, 425, 429)
