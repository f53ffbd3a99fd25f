"""The file system that Ray writes checkpoints and state through.

A store outage of seconds must not kill a run. Ray's controller treats a failed write as fatal, and pyarrow drops the
retry strategy when it pickles an S3 file system on the way to the controller and the workers; this one keeps it. It
holds no credentials: every node resolves its own from the ordinary AWS environment.
"""

from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow.fs as pa_fs

from storage.errors import ConfigError
from storage.objects.aws import resolve

_ATTEMPTS = 14  # capped exponential back-off of the AWS SDK: about two minutes of outage


class RetryingS3FileSystem(pa_fs.S3FileSystem):  # type: ignore[misc]
    """pyarrow's S3 file system, with retries that survive pickling, at the server and region of `storage.objects.aws`.

    Pyarrow alone reads no endpoint from AWS's files, so that data and checkpoints could go to two servers.
    """

    def __init__(self) -> None:
        access = resolve()
        options: dict[str, Any] = {"region": access.region}
        if access.endpoint:
            parts = urlsplit(access.endpoint)
            options |= {"endpoint_override": parts.netloc, "scheme": parts.scheme}
        super().__init__(
            retry_strategy=pa_fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
            connect_timeout=5,
            request_timeout=30,
            **options,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return RetryingS3FileSystem, ()


def storage_for(url: str) -> tuple[str, pa_fs.FileSystem]:
    """Path and file system for Ray's `storage_path` and `storage_filesystem`.

    Raises:
        ConfigError: neither an s3:// nor a file:// URL nor an absolute path.
    """
    parts = urlsplit(url)
    if parts.scheme == "s3":
        return f"{parts.netloc}{parts.path}".rstrip("/"), RetryingS3FileSystem()
    if parts.scheme == "file" or url.startswith("/"):
        # As `storage.objects.open_store` reads it, so that what a job keeps is in one place.
        return (unquote(parts.path) if parts.scheme else url).rstrip("/"), pa_fs.LocalFileSystem()
    raise ConfigError(
        f"runs {url!r}",
        expected="s3://bucket/prefix, file:///path or an absolute path",
        found="another form",
        remedy="give `runs` one that all nodes reach",
    )
