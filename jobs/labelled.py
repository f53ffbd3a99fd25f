"""Which labelled subjects train, which steer the search and which are only ever tested."""

from collections.abc import Sequence

import numpy as np

from jobs.configs import LabelledConfig
from ssl_core.downstream.finetune import Subjects
from ssl_core.downstream.heads.targets import Target, target_of
from ssl_core.downstream.heads.targets import absent_classes as absent_of_target
from ssl_core.downstream.settings import Task
from storage.errors import ConfigError, RefusedInput
from storage.format.columns import column_names, column_value
from storage.format.manifest import Manifest

WITHOUT_TEST = "without_test"
"""Among the facts of a manifest: it was written without its test split, so that nothing that reads it can see one."""

_MOST_NAMES = 20
"""Of volumes without a value that a line names; our choice."""


def draw(manifest: Manifest, config: LabelledConfig) -> Subjects:
    """Draw labelled subjects from the manifest's train split; test volumes come from its test split.

    With one seed and one `inner`, a draw of more subjects contains those of fewer, and has the same inner ones.

    Raises:
        ConfigError: several draws at once.
        RefusedInput: fewer labelled subjects than asked for, or none to test on.
    """
    if len(config.draws) > 1:
        raise ConfigError("labelled.subjects_seed", expected="one seed", found=f"{len(config.draws)} of them")
    by_subject: dict[str, list[int]] = {}
    for index in _labelled(manifest, config, "train"):
        by_subject.setdefault(manifest.record(index).subject, []).append(index)
    names = sorted(by_subject)
    if len(names) < config.subjects:
        raise RefusedInput(
            f"labelled subjects of {config.data}",
            expected=f"{config.subjects} with {_what(config)} in the train split",
            found=f"{len(names)}{_elsewhere(manifest, config)}",
            remedy="lower labelled.subjects, ingest more labelled volumes, or ingest with other split fractions",
        )
    inner, train = drawn_subjects(names, config)
    test = _labelled(manifest, config, "test")
    if not test and not manifest.dataset.get(WITHOUT_TEST):
        raise RefusedInput(
            f"test split of {config.data}",
            expected=f"volumes with {_what(config)}",
            found=f"none{_elsewhere(manifest, config)}",
            remedy="ingest with a larger test fraction",
        )
    limit = len(test) if config.test_limit is None else config.test_limit
    return Subjects(
        train=tuple(i for name in train for i in by_subject[name]),
        inner=tuple(i for name in inner for i in by_subject[name]),
        test=tuple(test[:limit]),
    )


def drawn_subjects(names: Sequence[str], config: LabelledConfig) -> tuple[list[str], list[str]]:
    """Subjects that steer and subjects that train.

    Args:
        names: All labelled subjects of the train split, sorted.
        config: How many, and the seed.
    """
    order = np.random.Generator(np.random.Philox(key=config.draws[0])).permutation(len(names))
    drawn = [names[i] for i in order[: config.subjects]]
    return drawn[: config.inner], drawn[config.inner :]


def draws(manifest: Manifest, config: LabelledConfig) -> dict[int, Subjects]:
    """Each draw of a list of seeds, by seed.

    Raises:
        ConfigError: two of them train on the same subjects: a test over draws would count one as two.
        RefusedInput: as `draw`.
    """
    every = {seed: draw(manifest, config.of_draw(seed)) for seed in config.draws}
    first_of: dict[frozenset[int], int] = {}
    for seed, subjects in every.items():
        other = first_of.setdefault(frozenset(subjects.train), seed)
        if other != seed:
            raise ConfigError(
                "labelled.subjects_seed",
                expected="draws of different training subjects",
                found=f"the same with {other} and with {seed}",
                remedy="choose other seeds, or fewer labelled.subjects than there are",
            )
    return every


def absent_classes(manifest: Manifest, label: str, subjects: Subjects) -> list[str]:
    """A line for each class that no training volume, or no test volume, shows: its scores mean little then.

    Where neither truth nor mask has a class, its Dice is 1 by convention, and a mean over classes rises by it.
    """

    def values(indices: Sequence[int]) -> set[int]:
        return {value for index in indices for value in manifest.record(index).label(label).values} - {0}

    train, test = values(subjects.train), values(subjects.test)
    every = sorted(train | test | values(subjects.inner))
    names = value_names(manifest, label, every)
    lines = [
        f"class {names[value]!r} is in no training volume: nothing of it is learned, and it is scored as missed"
        for value in every
        if value not in train
    ]
    lines += [
        f"class {names[value]!r} is in no test volume: its Dice is 1 wherever no voxel is taken for it, which raises"
        " the mean"
        for value in every
        if value not in test
    ]
    return lines


def target(manifest: Manifest, config: LabelledConfig, task: Task, train: Sequence[int]) -> Target:
    """What a head learns of the volumes of the train and test splits that have a value.

    Args:
        manifest: Of the volumes.
        config: Which of them; with `column`.
        task: `classification` or `regression`.
        train: Volumes that the weights are learned from.

    Raises:
        ConfigError: see `ssl_core.downstream.heads.targets.target_of`.
    """
    values = _column(manifest, config)
    rows = [i for split in ("train", "test") for i in manifest.select(split=split).tolist() if values[i]]
    subjects, ids = manifest.subjects(), manifest.column("volume_id")
    return target_of(
        str(config.column),
        task,
        {i: values[i] for i in rows},
        {i: subjects[i] for i in rows},
        train,
        {i: ids[i] for i in rows},
    )


def target_notes(manifest: Manifest, config: LabelledConfig, task: Task) -> list[str]:
    """A line for what a job of heads leaves out, and for what its draws do not show.

    Raises:
        ConfigError: see `target`, of any draw.
        RefusedInput: see `draw`.
    """
    lines = without_value(manifest, config)
    for seed, subjects in draws(manifest, config).items():
        of_draw = "" if len(config.draws) == 1 else f" (draw {seed})"
        learned = target(manifest, config, task, subjects.train)
        lines += [f"{line}{of_draw}" for line in absent_of_target(learned, subjects.train, subjects.test)]
    return lines


def without_value(manifest: Manifest, config: LabelledConfig) -> list[str]:
    """A line for each split some of whose volumes have no value in the column, with their names."""
    values, ids = _column(manifest, config), manifest.column("volume_id")
    lines = []
    for split in ("train", "test"):
        missing = [ids[i] for i in manifest.select(split=split).tolist() if not values[i]]
        if missing:
            more = f" and {len(missing) - _MOST_NAMES} more" if len(missing) > _MOST_NAMES else ""
            count = "1 volume" if len(missing) == 1 else f"{len(missing)} volumes"
            names = ", ".join(missing[:_MOST_NAMES])
            lines.append(f"{count} of the {split} split without {_what(config)}, left out: {names}{more}")
    return lines


def _labelled(manifest: Manifest, config: LabelledConfig, split: str) -> list[int]:
    """Volumes of a split that have the label, or a value in the column."""
    if config.column is None:
        rows: list[int] = manifest.select(split=split, labelled=config.label).tolist()
        return rows
    values = _column(manifest, config)
    return [index for index in manifest.select(split=split).tolist() if values[index]]


def _column(manifest: Manifest, config: LabelledConfig) -> list[str]:
    """The value of each volume; empty where it has none."""
    ids, notes = manifest.column("volume_id"), manifest.column("notes")
    return [column_value(name, of_one, str(config.column)) for name, of_one in zip(ids, notes, strict=True)]


def _what(config: LabelledConfig) -> str:
    return f"label {config.label!r}" if config.column is None else f"a value in column {config.column!r}"


def _elsewhere(manifest: Manifest, config: LabelledConfig) -> str:
    """In which splits subjects with a label or a value are, and the others that there are where none has this one."""
    counts: dict[str, set[str]] = {}
    others: set[str] = set()
    values = None if config.column is None else _column(manifest, config)
    for index, record in enumerate(manifest.records()):
        others |= {info.name for info in record.labels}
        if config.label in record.map_names() if values is None else values[index]:
            counts.setdefault(record.split, set()).add(record.subject)
    if counts:
        return f" (by split: {', '.join(f'{split} {len(counts[split])}' for split in sorted(counts))})"
    if values is not None:
        names = column_names(manifest.column("notes"))
        known = f"its columns are {', '.join(map(repr, names))}" if names else "ingest it with a subject_table"
        return f"; {known}"
    if others:
        return f"; its labels are {', '.join(map(repr, sorted(others)))}"
    return "; no volume has a label"


def value_names(manifest: Manifest, label: str, values: Sequence[int]) -> dict[int, str]:
    """A name for each value: that of the data set's own description where it has one for each, all different."""
    described = manifest.dataset.get("labels") or {}
    names = [str(described.get(str(value), "")).strip() for value in values]
    if not all(names) or len(set(names)) < len(names):
        names = [f"{label}-{value}" for value in values]
    return dict(zip(values, names, strict=True))
