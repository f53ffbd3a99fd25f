"""Where a model is: in a registry, a folder or behind a URL; and an encoder from any of them in one line."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike, fspath
from pathlib import Path

from ssl_core import encoder
from ssl_core.encoder import Encoder, fetch_bundle


def load_encoder(model: str | PathLike[str], *, device: str | None = None) -> Encoder:
    """An encoder with its preprocessing.

    Args:
        model: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, a bundle's folder, or the `file://`, `s3://` or `https://`
            URL of one. The registry is that of `MLFLOW_TRACKING_URI`.
        device: `cpu`, `cuda`, `cuda:1`; None takes the accelerator when there is one.

    Raises:
        ConfigError: neither of these.
        NotFound: no such model, version, alias or place.
        RefusedInput: no bundle, a damaged one, or one of a newer version.
    """
    with bundle_of(model) as root:
        return encoder.load_encoder(root, device=device)


@contextmanager
def bundle_of(model: str | PathLike[str]) -> Iterator[Path]:
    """The folder of a bundle: the one that is named, or a temporary copy of what a registry or a URL has.

    Args:
        model: As for `load_encoder`.

    Raises:
        As `load_encoder`; the digests of a named folder are left to who reads it.
    """
    text = fspath(model)
    if Path(text).is_dir():
        yield Path(text)
        return
    with tempfile.TemporaryDirectory(prefix="tomoscale-model-") as folder:
        target = Path(folder) / "bundle"
        if "://" in text:
            yield fetch_bundle(text, target)
        else:
            from jobs.tracking import models  # MLflow takes seconds to import, and folders and URLs need none

            yield models.pull(text, target)
