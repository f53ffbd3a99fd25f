"""A job's moving references, fixed at its first start: the latest manifest, an alias of a model.

Without this a job that goes on under its name after its driver's death could mix two manifests or two encoders.
"""

import json
from pathlib import Path
from typing import TypeVar

from jobs.configs import FinetuneJobConfig, LabelledConfig, TuneConfig, changed
from jobs.tracking import models as registry
from ssl_core.config import digest, parse, resolved
from storage.errors import ConfigError, NotFound
from storage.format.manifest import Manifest
from storage.objects import join, open_store

J = TypeVar("J", TuneConfig, FinetuneJobConfig)
KEY = "job.json"
# Where and how many at a time, but not what comes out.
_FREE = ("runs", "experiment", "concurrent", "cpus_per_trial", "gpus_per_trial", "cpus_per_run", "gpus_per_run")


def pinned(config: J) -> J:
    """The configuration with `labelled.fingerprint` and model versions filled in, the same for every start of a job.

    It is kept at `<runs>/<name>/job.json`.

    Raises:
        ConfigError: a job of that name has other settings.
        NotFound: no such manifest or model.
    """
    store = open_store(join(config.runs, config.name))
    plain = {name: type(config).model_fields[name].default for name in _FREE if name in type(config).model_fields}
    asked = digest(config.model_copy(update=plain))
    try:
        kept = json.loads(store.get(KEY))
    except NotFound:
        fixed = _fixed(config)
        kept = {"asked": asked, "settings": resolved(config), "config": resolved(fixed)}
        if store.put(KEY, json.dumps(kept).encode(), if_absent=True):
            return fixed
        kept = json.loads(store.get(KEY))  # another start of this job was first
    if kept["asked"] != asked:
        raise ConfigError(
            f"job {config.name!r}",
            expected=f"the settings that it was started with, kept at {store.url}/{KEY}",
            found=", ".join(changed(config, kept.get("settings", {}), _FREE).values()) or "others",
            remedy="choose another name for other settings",
        )
    free = {name: getattr(config, name) for name in plain}
    return parse(type(config), kept["config"]).model_copy(update=free)


def _fixed(config: J) -> J:
    labelled = config.labelled.model_copy(update={"fingerprint": _fingerprint(config.labelled)})
    if isinstance(config, TuneConfig):
        return config.model_copy(update={"labelled": labelled, "encoders": tuple(map(_version, config.encoders))})
    starts = {name: _version(uri) for name, uri in config.starts.items()}
    return config.model_copy(update={"labelled": labelled, "starts": starts})


def _fingerprint(labelled: LabelledConfig) -> str:
    return Manifest.open(labelled.data, labelled.fingerprint).fingerprint


def _version(uri: str) -> str:
    return uri if uri == "none" or Path(uri).is_dir() else registry.resolve(uri).uri
