"""Whether what a job starts from is there and fits, asked where the job is sent from, of metadata alone."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from jobs import driver
from jobs import labelled as split
from jobs.configs import FinetuneJobConfig, LabelledConfig, PretrainConfig
from jobs.configs.search import TuneConfig
from jobs.configs.study import StudyConfig
from jobs.output import last_line
from jobs.tracking.outage import is_away
from jobs.tracking.starts import Start, named, read_start
from ssl_core.downstream.settings import Task, Transfer
from storage.errors import ConfigError, NotFound, StackError, StoreError
from storage.format.manifest import Manifest
from storage.objects import open_store
from storage.objects.retry import RetryPolicy

_PATIENCE = RetryPolicy(deadline_s=8.0, attempt_s=3.0)
"""For a store that the nodes may reach and this machine may not."""
_TRANSFER, _CHANNELS, _LEVELS = "finetune.transfer", "finetune.channels", "finetune.deep_supervision"


@dataclass(frozen=True)
class _Asked:
    """A start of a job.

    Attributes:
        key: Of the configuration.
        uri: What it says.
        transfers: What is to be taken over from it, by the key that says so.
    """

    key: str
    uri: str
    transfers: tuple[tuple[str, Transfer], ...] = ()


def require_starts(
    config: PretrainConfig | TuneConfig | FinetuneJobConfig | StudyConfig, note: Callable[[str], None]
) -> None:
    """Refuse a job whose starts are not there, cannot be read by this version, or do not fit it.

    What cannot be asked from here, since MLflow or a store does not answer this machine, is a note: the job asks again.

    Args:
        config: The job.
        note: Hears what could not be looked at.

    Raises:
        NotFound: no such model, version or alias.
        RefusedInput: no bundle of tomoscale's, or one of a newer version; too few labelled subjects.
        ConfigError: its network cannot be built, is another, lacks what is to be taken over, or has fewer levels than
            are supervised; volumes of another number of channels.
    """
    starts: list[tuple[_Asked, Start]] = []
    for asked in _asked(config):
        start = _looked_at(asked, note)
        if start is not None:
            with named(asked.key):
                _require(config, asked, start)
            starts.append((asked, start))
    if isinstance(config, TuneConfig):
        _require_data(config.labelled, starts, config.values_of(_CHANNELS), note)
    elif isinstance(config, FinetuneJobConfig):
        _require_data(config.labelled, starts, (config.finetune.channels,), note, config.finetune.task)


def _asked(config: PretrainConfig | TuneConfig | FinetuneJobConfig | StudyConfig) -> Iterator[_Asked]:
    if isinstance(config, PretrainConfig):
        if config.init is not None:
            yield _Asked("init", config.init)
    elif isinstance(config, StudyConfig):
        for name, study_start in config.starts.items():
            if study_start.model is not None:
                settings = config.settings(name, config.search.lr[0], config.search.steps[0])
                yield _Asked(
                    f"starts.{name}.model", study_start.model, ((f"starts.{name}.transfer", settings.transfer),)
                )
    elif isinstance(config, TuneConfig):
        key = f"space: {_TRANSFER}" if _TRANSFER in config.space else _TRANSFER
        transfers = tuple((key, value) for value in config.values_of(_TRANSFER))
        for uri in config.encoders:
            if uri != "none":
                yield _Asked("encoders" if len(config.encoders) == 1 else f"encoders {uri}", uri, transfers)
    else:
        for name, uri in config.starts.items():
            if uri != "none":
                yield _Asked(f"starts.{name}", uri, ((_TRANSFER, config.finetune.transfer),))


def _looked_at(asked: _Asked, note: Callable[[str], None]) -> Start | None:
    """The start; None where only the job can see it."""
    try:
        with named(asked.key):
            return read_start(asked.uri)
    except NotFound as error:
        if not _is_of_nodes(asked.uri):
            raise
        note(f"{error}; it may be there on the nodes")
    except (StackError, StoreError) as error:
        note(f"not looked at from here: {error}")
    except Exception as error:
        if not is_away(error):
            raise
        note(f"{asked.key}: {asked.uri} is not looked at from here: {last_line(error)}")
    return None


def _is_of_nodes(uri: str) -> bool:
    """Whether it names a place on the nodes' own disks."""
    return uri.startswith(("/", "file://"))


def _require(config: Any, asked: _Asked, start: Start) -> None:
    if isinstance(config, PretrainConfig):
        start.require_encoder(config.backbone.name, config.backbone.arguments)
        return
    if isinstance(config, StudyConfig):
        network = config.pretraining(None, 0).backbone
        start.require_network(network.name, network.arguments)
    start.require_crop(config.finetune.patch_DHW, "finetune.patch_DHW")
    for key, transfer in asked.transfers:
        with named(key):
            start.require_transfer(transfer)
    with named(asked.key):
        for levels in (
            config.values_of(_LEVELS) if isinstance(config, TuneConfig) else (config.finetune.deep_supervision,)
        ):
            start.require_levels(levels)
        if config.finetune.task != "segmentation":
            start.require_pooled(config.finetune.head.levels)


def _require_data(
    labelled: LabelledConfig,
    starts: list[tuple[_Asked, Start]],
    ways: tuple[str, ...],
    note: Callable[[str], None],
    task: Task = "segmentation",
) -> None:
    """Refuse too few labelled subjects, a column that cannot be learned, and volumes of channels that a start lacks."""
    try:
        manifest = Manifest.open(open_store(labelled.data, _PATIENCE), labelled.fingerprint)
    except (StoreError, ConfigError) as error:
        note(f"labelled.data is not looked at from here: {error}")
        return
    if task != "segmentation":
        for line in split.target_notes(manifest, labelled, task):
            note(line)
    draws = list(split.draws(manifest, labelled).values())
    volumes = sorted({i for subjects in draws for i in (*subjects.train, *subjects.inner, *subjects.test)})
    count = manifest.record(draws[0].train[0]).channels
    for asked, start in starts:
        for way in ways:
            repeated = way == "repeat" and count > 1 and start.channels == 1
            arguments = {"in_channels": count} if repeated else start.arguments
            with named(asked.key):
                driver.check_channels(manifest, volumes, f"the encoder of {asked.uri}", arguments)
