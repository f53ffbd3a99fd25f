"""What a study fixes before its first cell: data, models, and that there are enough labelled subjects."""

import json
from collections.abc import Callable
from typing import Any

from jobs.configs.groups import changed
from jobs.configs.study import StudyConfig
from jobs.labelled import draw
from jobs.pretrain.inputs import view_spec
from jobs.study.cells import Data
from jobs.study.seal import without_test
from jobs.tracking.starts import named, read_start, version_of
from ssl_core.config import digest, resolved
from storage.errors import ConfigError, NotFound, RefusedInput
from storage.format.manifest import Manifest
from storage.objects import ByteStore

KEY = "study.json"
FREE = ("runs", "cache", "experiment", "source", "until", "concurrent", "cpus_per_cell", "gpus_per_cell")
"""Where a study runs, how far and how many cells at a time, but not what comes out."""


def prepare(config: StudyConfig, store: ByteStore, say: Callable[[str], None]) -> Data:
    """What the first start of the study fixed, the same for every later one.

    Args:
        config: The study; its store is ingested.
        store: Of the study.
        say: Hears what is noteworthy.

    Raises:
        ConfigError: a study of this name has other settings, or a model is of another network.
        RefusedInput: too few labelled subjects, or subjects of the test in what is pre-trained on.
        NotFound: no such manifest or model.
    """
    plain = {name: StudyConfig.model_fields[name].get_default() for name in FREE}
    settings = digest(config.model_copy(update=plain))
    try:
        note: dict[str, Any] = json.loads(store.get(KEY))
    except NotFound:
        data = _fixed(config, say)
        note = {"settings": settings, "config": resolved(config), "data": vars(data)}
        if not store.put(KEY, json.dumps(note).encode(), if_absent=True):
            note = json.loads(store.get(KEY))  # another start of this study was first
    if note["settings"] != settings:
        raise ConfigError(
            f"study {config.name!r}",
            expected=f"the settings that it was started with, kept at {store.url}/{KEY}",
            found=", ".join(changed(config, note["config"], FREE).values()) or "others",
            remedy="choose another name for other settings; equal pre-trainings are not done again",
        )
    return Data(**note["data"])


def _fixed(config: StudyConfig, say: Callable[[str], None]) -> Data:
    _superpixels(config, say)
    manifest = Manifest.open(config.data, config.fingerprint)
    labelled = _labelled(config, manifest)
    versions = {name: version_of(start.model) for name, start in config.starts.items() if start.model is not None}
    network = config.pretraining(None, 0).backbone
    for name, uri in versions.items():
        with named(f"starts.{name}.model"):
            read_start(uri).require_network(network.name, network.arguments)
        say(f"note: whether {uri} was trained on test subjects of this study, only its maker knows")
    _refuse_tested_subjects(config, manifest)
    sealed = without_test(config.data, manifest)
    return Data(manifest.fingerprint, sealed, labelled, versions, bool(manifest.dataset.get("simulated")))


def _superpixels(config: StudyConfig, say: Callable[[str], None]) -> None:
    """Made before the manifest is fixed, so that all starts read one."""
    jobs = [config.pretraining(name, 0) for name, start in config.starts.items() if start.pretrain is not None]
    jobs = [job for job in jobs if view_spec(job).superpixels]
    if config.fingerprint is None and jobs:
        from jobs.superpixels import ensure_superpixels  # brings Ray, which no other part of a local study needs

        for job in jobs:
            ensure_superpixels(job, say=say)


def _labelled(config: StudyConfig, manifest: Manifest) -> int:
    """Labelled subjects of the train split.

    Raises:
        RefusedInput: too few for the largest count, or none to test on.
    """
    few = config.labelled(min(config.labels), 0, manifest.fingerprint, further=config.validation)
    draw(manifest, few)
    rows = manifest.select(split="train", labelled=config.label)
    subjects = manifest.subjects()
    available = len({subjects[row] for row in rows})
    needs = {
        f"{max(config.labels)} labels and validation {config.validation}": max(config.labels) + config.validation,
        f"{max(config.searched_labels)} labels and search.subjects {config.search.subjects}": max(
            config.searched_labels
        )
        + config.search.subjects,
    } | {
        f"starts.{name}.supervised.subjects {start.supervised.subjects} and 1": start.supervised.subjects + 1
        for name, start in config.starts.items()
        if start.supervised is not None
    }
    for words, need in needs.items():
        if need > available:
            raise RefusedInput(
                f"labelled subjects of {config.data}",
                expected=f"{need} in the train split, for {words}",
                found=str(available),
                remedy="lower labels or search.subjects, or ingest more labelled volumes",
            )
    return available


def _refuse_tested_subjects(config: StudyConfig, manifest: Manifest) -> None:
    """Refuse a pre-training on another store, or another split, that has subjects of the test.

    Raises:
        ConfigError: a split of the study's own store that is not there without the test.
        RefusedInput: names a subject.
    """
    subjects = manifest.subjects()
    tested = {subjects[row] for row in manifest.select(split="test")}
    for name, start in config.starts.items():
        if start.pretrain is None:
            continue
        job = config.pretraining(name, 0)
        if job.data == config.data:
            if job.stream.split == "test":
                raise ConfigError(
                    f"starts.{name}: stream.split",
                    expected="a split other than test, which pre-training must not see",
                    found="test",
                    remedy="set it to train",
                )
            continue
        other = Manifest.open(job.data, job.fingerprint)
        names = other.subjects()
        both = sorted(tested & {names[row] for row in other.select(split=job.stream.split)})
        if both:
            raise RefusedInput(
                f"pre-training data {job.data} of start {name!r}",
                expected="no subject of the study's test",
                found=f"{len(both)} of them, the first: {both[0]}",
                remedy="ingest the pool without them, or with the same split",
            )
