"""What a run reads, as MLflow's pages show it: data sets by fingerprint, and models that it starts from."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from jobs.tracking.models import model_id_of
from storage.format.manifest import Manifest

_CONTEXT = "mlflow.data.context"
_SOURCES = {"s3": ("s3", "uri"), "http": ("http", "url"), "https": ("http", "url"), "file": ("local", "uri")}
"""Kinds of a source that MLflow's pages know, and the key under which they look for the address."""
_LONGEST_NAME = 500


def log_inputs(api: Any, run_id: str, url: str, manifest: Manifest, context: str, starts: Iterable[str] = ()) -> None:
    """Note a store and models as inputs of a run; the same ones are noted once.

    Args:
        api: MLflow's client.
        run_id: The run.
        url: Of the store.
        manifest: What is read of it; its fingerprint is the digest.
        context: What for, such as `training`.
        starts: Registered versions among model URIs; `none`, folders and URLs are left out.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput

    plain = without_credentials(url)
    scheme = urlsplit(plain).scheme or "file"
    kind, key = _SOURCES.get(scheme, (scheme, "uri"))
    splits = Counter(manifest.column("split"))
    dataset = Dataset(
        name=_name(plain, manifest)[:_LONGEST_NAME],
        digest=manifest.fingerprint,
        source_type=kind,
        source=json.dumps({key: plain}),
        profile=json.dumps({f"volumes of {split}": splits[split] for split in sorted(splits)}),
    )
    ids = dict.fromkeys(model_id_of(uri) for uri in starts)
    models = [LoggedModelInput(model_id) for model_id in ids if model_id]
    api.log_inputs(run_id, [DatasetInput(dataset, [InputTag(_CONTEXT, context)])], models or None)


def without_credentials(url: str) -> str:
    """A URL without user, password, query and fragment, any of which may let others in."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _name(url: str, manifest: Manifest) -> str:
    """What the data set calls itself, else the last part of its URL."""
    parts = urlsplit(url)
    return str(manifest.dataset.get("name") or PurePosixPath(parts.path).name or parts.netloc or url)
