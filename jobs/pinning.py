"""What a job began with, kept on object storage for every later start under its name.

A search or a fine-tuning keeps its whole configuration with its moving references fixed, the latest manifest and the
aliases of models, at `<runs>/<name>/job.json`. A pre-training, whose checkpoints know the rest, keeps its manifest at
`<runs>/<name>/starts/DIGEST.json`. Without this a job that goes on after its driver's death could mix two manifests or
two encoders.
"""

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from jobs.configs import FinetuneJobConfig, LabelledConfig, PretrainConfig, ProbeConfig
from jobs.configs.groups import CheckpointConfig, ClusterConfig, changed
from jobs.configs.search import TuneConfig
from jobs.configs.space import ENCODER
from jobs.tracking.starts import version_of
from ssl_core.config import digest, parse, resolved
from ssl_core.train import checkpoint
from ssl_core.train.engine import OPERATIONAL, EngineConfig
from storage.errors import ConfigError, NotFound
from storage.format.manifest import Manifest
from storage.objects import ByteStore, join, open_store

J = TypeVar("J", TuneConfig, FinetuneJobConfig)
KEY = "job.json"
SETTINGS = "settings"
# Where, how many at a time and under which name the stored segmenter is registered, but not what comes out.
_PLACES, _AMOUNTS = ("runs", "experiment", "model"), ("concurrent", "cpus_per_trial", "gpus_per_trial")
_BUDGETS = ("hours", "money", "price_per_hour")
# What a confirmation compares is kept by itself, when it begins.
_FREE = (*_PLACES, *_AMOUNTS, "cpus_per_run", "gpus_per_run", *_BUDGETS, "confirm")
# The same of a pre-training. How often to log or save, of `engine`, may change too; it says so itself.
_FREE_OF_PRETRAIN: dict[str, Any] = {
    "probe": ProbeConfig(),
    "runs": "",
    "experiment": "",
    "cluster": ClusterConfig(),
    "checkpoints": CheckpointConfig(),
    "name": "n",
    "source": None,
    "model": None,
    "fingerprint": None,
}


def pinned(config: J) -> J:
    """The configuration with `labelled.fingerprint` and model versions filled in, the same for every start of a job.

    Raises:
        ConfigError: a job of that name has other settings.
        NotFound: no such manifest or model.
    """
    store = _store(config)
    plain = {name: type(config).model_fields[name].default for name in _FREE if name in type(config).model_fields}
    settings = digest(config.model_copy(update=plain))
    note = _note(store, KEY)
    if note is None:
        fixed = _fixed(config)
        if _keep(store, KEY, {"asked": settings, SETTINGS: resolved(config), "config": resolved(fixed)}):
            return fixed
        note = json.loads(store.get(KEY))  # another start of this job was first
    # Notes of before have the name of the model in their digest.
    of_before = {**plain, "model": note["config"]["model"]} if "model" in plain else plain
    if note["asked"] not in (settings, digest(config.model_copy(update=of_before))):
        raise ConfigError(
            f"job {config.name!r}",
            expected=f"the settings that it was started with, kept at {store.url}/{KEY}",
            found=", ".join(changed(config, note.get(SETTINGS, {}), _FREE).values()) or "others",
            remedy="choose another name for other settings",
        )
    free = {name: getattr(config, name) for name in plain}
    return parse(type(config), note["config"]).model_copy(update=free)


def as_started(config: PretrainConfig) -> PretrainConfig:
    """The configuration, with the manifest that the job of this name and these settings was first started with.

    A store that has a newer manifest by the time a job goes on, such as one with super-pixels, does not stop it. With
    other settings nothing is filled in, and the checkpoint refuses them.
    """
    if config.fingerprint is not None:
        return config
    note = _note(_store(config), _start_key(config))
    return config if note is None else config.model_copy(update={"fingerprint": note["fingerprint"]})


def note_start(config: PretrainConfig, manifest: Manifest) -> None:
    """Keep what `as_started` looks for; what the first start noted stays.

    Each choice of settings has a file of its own, so that a job sent with wrong ones, which its checkpoint refuses,
    does not take the manifest of the right ones away.
    """
    _keep(_store(config), _start_key(config), identity(config, manifest))


def with_fixed_init(config: PretrainConfig) -> PretrainConfig:
    """The configuration with the version of the model that the first start of this job found under `init`.

    Raises:
        NotFound: no such model.
    """
    if config.init is None:
        return config
    store, key = _store(config), f"inits/{config_digest(config)}.json"
    if (note := _note(store, key)) is None:
        note = {"init": _version(config.init)}
        if not _keep(store, key, note):
            note = json.loads(store.get(key))  # another start of this job was first
    return config.model_copy(update={"init": note["init"]})


def identity(config: PretrainConfig, manifest: Manifest) -> dict[str, str]:
    """What a checkpoint must agree with to be resumed: everything that changes the result."""
    return {"config_digest": config_digest(config), "fingerprint": manifest.fingerprint}


def config_digest(config: PretrainConfig) -> str:
    """Names the settings that change the result; which manifest is not among them."""
    plain = config.model_copy(update={**_FREE_OF_PRETRAIN, "engine": EngineConfig()})
    return f"{digest(plain)}-{config.engine.digest()}"


def decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of the resolved configuration of a pre-training, the settings that change the result.

    Of plain values: a setting that a later version adds is not in what an earlier one wrote.
    """
    engine = {key: value for key, value in settings["engine"].items() if key not in OPERATIONAL}
    return {key: value for key, value in settings.items() if key not in _FREE_OF_PRETRAIN} | {"engine": engine}


def require_same(config: PretrainConfig, manifest: Manifest, meta: dict[str, Any]) -> None:
    """Refuse to go on from a checkpoint of other settings or other data.

    Args:
        config: What the job is started with now.
        manifest: What it would read.
        meta: Facts of the checkpoint, `identity` and, under `SETTINGS`, the resolved configuration among them.

    Raises:
        ConfigError: names what is other than it was.
    """
    now = identity(config, manifest)
    try:
        checkpoint.require_same(meta, allow=False, **now)
    except ConfigError as error:
        before = meta.get(SETTINGS, {})
        lines = changed(config, before, _FREE_OF_PRETRAIN)
        differences = [line for key, line in lines.items() if not _is_free(config.engine, before, key)]
        remedy = "choose another name for other settings"
        if (other := meta["fingerprint"]) != now["fingerprint"]:
            differences.append(f"manifest {now['fingerprint']} (was {other})")
            remedy += f"; fingerprint={other} goes on with the data that it had"
        raise ConfigError(
            f"job {config.name!r}",
            expected="the settings and the data that its checkpoint was made with",
            found=", ".join(differences) or error.found,
            remedy=remedy,
        ) from error


def _is_free(engine: EngineConfig, before: dict[str, Any], key: str) -> bool:
    """Whether a setting of the engine changes nothing that its digest names."""
    group, _, name = key.partition(".")
    if group != "engine" or name not in before[group]:
        return False
    value = before[group][name]
    as_it_was = {name: tuple(value) if isinstance(value, list) else value}
    return engine.model_copy(update=as_it_was).digest() == engine.digest()


def _store(config: TuneConfig | FinetuneJobConfig | PretrainConfig) -> ByteStore:
    return open_store(join(config.runs, config.name))


def _start_key(config: PretrainConfig) -> str:
    return f"starts/{config_digest(config)}.json"


def _note(store: ByteStore, key: str) -> dict[str, Any] | None:
    """What the first start kept under a key; None before it."""
    try:
        note: dict[str, Any] = json.loads(store.get(key))
    except NotFound:
        return None
    return note


def _keep(store: ByteStore, key: str, note: dict[str, Any]) -> bool:
    """Keep a note for later starts; False where another start was first, whose note stays."""
    return store.put(key, json.dumps(note).encode(), if_absent=True)


def _fixed(config: J) -> J:
    labelled = config.labelled.model_copy(update={"fingerprint": _fingerprint(config.labelled)})
    if isinstance(config, TuneConfig):
        points = tuple({k: _version(v) if k == ENCODER else v for k, v in point.items()} for point in config.points)
        encoders = tuple(map(_version, config.encoders))
        return config.model_copy(update={"labelled": labelled, "encoders": encoders, "points": points})
    starts = {name: _version(uri) for name, uri in config.starts.items()}
    return config.model_copy(update={"labelled": labelled, "starts": starts})


def _fingerprint(labelled: LabelledConfig) -> str:
    return Manifest.open(labelled.data, labelled.fingerprint).fingerprint


def _version(uri: str) -> str:
    return uri if uri == "none" else version_of(uri)
