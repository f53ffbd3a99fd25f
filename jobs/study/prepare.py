"""What a study fixes before its first cell: data, models, draws, and that there are enough labelled subjects."""

import json
from collections.abc import Callable, Collection, Sequence
from typing import Any

from jobs.configs.groups import changed
from jobs.configs.study import VALIDATION, StudyConfig
from jobs.labelled import draw, drawn_subjects
from jobs.pretrain.inputs import reads_labels, view_spec
from jobs.study.cells import Data
from jobs.study.seal import without_test
from jobs.tracking.starts import named, read_start, version_of
from ssl_core.config import digest, resolved
from storage.errors import ConfigError, NotFound, RefusedInput
from storage.format.manifest import Manifest
from storage.objects import ByteStore

KEY = "study.json"
FREE = ("runs", "cache", "experiment", "source", "slices", "until", "concurrent", "cpus_per_cell", "gpus_per_cell")
"""Where a study runs, how far, how many cells at a time and what its report shows, but not what comes out."""
_TRIES = 1000
"""Seeds in a row that bring no other subjects, after which there are taken to be none; our choice."""


def prepare(config: StudyConfig, store: ByteStore, say: Callable[[str], None]) -> Data:
    """What the first start of the study fixed, the same for every later one.

    Args:
        config: The study; its store is ingested.
        store: Of the study.
        say: Hears what is noteworthy.

    Raises:
        ConfigError: a study of this name has other settings, or a model is of another network.
        RefusedInput: too few labelled subjects, or a start would learn from subjects that it is scored on.
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
    search = config.search
    draws = _different(config, manifest, "draws", 0, config.draws, config.labels, config.validation)
    searched = _different(
        config, manifest, "search.draws", VALIDATION, search.draws, config.searched_labels, search.subjects
    )
    scored = _scored(config, manifest, searched)
    _refuse_scored_subjects(config, manifest, scored)
    return Data(
        fingerprint=manifest.fingerprint,
        without_test=without_test(config.data, manifest),
        labelled=labelled,
        models=versions,
        simulated=bool(manifest.dataset.get("simulated")),
        draws=draws,
        searched=searched,
        unscored=without_test(config.data, manifest, scored) if scored else "",
    )


def _names(config: StudyConfig, manifest: Manifest) -> list[str]:
    """Labelled subjects of the train split."""
    subjects = manifest.subjects()
    return sorted({subjects[row] for row in manifest.select(split="train", labelled=config.label)})


def _different(
    config: StudyConfig, manifest: Manifest, key: str, first: int, draws: int, counts: Sequence[int], further: int
) -> list[int]:
    """Seeds of draws no two of which train on the same subjects, with any count: a test would take one for two.

    Args:
        config: The study.
        manifest: Of its volumes.
        key: The setting that says how many.
        first: First seed.
        draws: How many.
        counts: Of labels.
        further: Subjects of a draw that do not train.

    Raises:
        RefusedInput: there are not so many.
    """
    names, seeds, seen, seed = _names(config, manifest), list[int](), set[frozenset[str]](), first
    while len(seeds) < draws:
        if seed - (seeds[-1] if seeds else first) > _TRIES:
            raise RefusedInput(
                f"draws of labelled subjects of {config.data}",
                expected=f"{draws} ({key}) that train on different subjects, at {', '.join(map(str, counts))} labels",
                found=f"{len(seeds)}, of {len(names)} subjects of which {further} only steer",
                remedy=f"lower {key}, or ingest more labelled volumes",
            )
        configs = (config.labelled(count, seed, manifest.fingerprint, further=further) for count in counts)
        sets = [frozenset(drawn_subjects(names, labelled)[1]) for labelled in configs]
        if seen.isdisjoint(sets):
            seeds.append(seed)
            seen.update(sets)
        seed += 1
    return seeds


def _scored(config: StudyConfig, manifest: Manifest, searched: Sequence[int]) -> set[str]:
    """Subjects that settings are scored on, which a start must not have learned the labels of; none without such a one.

    Raises:
        RefusedInput: the others are too few for such a start.
    """
    needs = {
        f"starts.{name}": 1 if start.supervised is None else start.supervised.subjects + 1
        for name, start in config.starts.items()
        if start.supervised is not None or (start.pretrain is not None and reads_labels(config.pretraining(name, 0)))
    }
    if not needs:
        return set()
    names, further = _names(config, manifest), config.search.subjects
    scored = {
        subject
        for seed in searched
        for subject in drawn_subjects(names, config.labelled(1, seed, manifest.fingerprint, further=further))[0]
    }
    for key, need in needs.items():
        if need > len(names) - len(scored):
            raise RefusedInput(
                f"labelled subjects of {config.data} that no setting is scored on",
                expected=f"{need} in the train split, for {key}, which learns from labels",
                found=f"{len(names) - len(scored)} of {len(names)}: {config.search.draws} search.draws of {further}"
                " search.subjects take the others",
                remedy="lower search.draws, search.subjects or that start's subjects, or ingest more labelled volumes",
            )
    return scored


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
    available = len(_names(config, manifest))
    needs = {
        f"{max(config.labels)} labels and validation {config.validation}": max(config.labels) + config.validation,
        f"{max(config.searched_labels)} labels and search.subjects {config.search.subjects}": max(
            config.searched_labels
        )
        + config.search.subjects,
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


def _refuse_scored_subjects(config: StudyConfig, manifest: Manifest, scored: Collection[str]) -> None:
    """Refuse a pre-training on another store, or another split, that has subjects of the test, or learns from `scored`.

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
        barred = tested.union(scored) if reads_labels(job) else tested
        both = sorted(barred & {names[row] for row in other.select(split=job.stream.split)})
        if both:
            raise RefusedInput(
                f"pre-training data {job.data} of start {name!r}",
                expected="no subject of the study's test, nor with labels one that settings are scored on",
                found=f"{len(both)} of them, the first: {both[0]}",
                remedy="ingest the pool without them, or with the same split",
            )
