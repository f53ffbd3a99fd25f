"""Which labelled subjects train, which steer the search and which are only ever tested."""

from collections.abc import Sequence

import numpy as np

from jobs.configs import LabelledConfig
from ssl_core.downstream.finetune import Subjects
from storage.errors import ConfigError, RefusedInput
from storage.format.manifest import Manifest

WITHOUT_TEST = "without_test"
"""Among the facts of a manifest: it was written without its test split, so that nothing that reads it can see one."""


def draw(manifest: Manifest, config: LabelledConfig) -> Subjects:
    """Draw labelled subjects from the manifest's train split; test volumes come from its test split.

    With one seed and one `inner`, a draw of more subjects contains those of fewer, and has the same inner ones.

    Raises:
        ConfigError: several draws at once.
        RefusedInput: fewer labelled subjects than asked for, or none to test on.
    """
    if len(config.draws) > 1:
        raise ConfigError("labelled.subjects_seed", expected="one seed", found=f"{len(config.draws)} of them")
    labelled = manifest.select(split="train", labelled=config.label)
    by_subject: dict[str, list[int]] = {}
    for index in labelled.tolist():
        by_subject.setdefault(manifest.record(index).subject, []).append(index)
    names = sorted(by_subject)
    if len(names) < config.subjects:
        raise RefusedInput(
            f"labelled subjects of {config.data}",
            expected=f"{config.subjects} with label {config.label!r} in the train split",
            found=f"{len(names)}{_elsewhere(manifest, config.label)}",
            remedy="lower labelled.subjects, ingest more labelled volumes, or ingest with other split fractions",
        )
    order = np.random.Generator(np.random.Philox(key=config.draws[0])).permutation(len(names))
    drawn = [names[i] for i in order[: config.subjects]]
    inner, train = drawn[: config.inner], drawn[config.inner :]
    test = manifest.select(split="test", labelled=config.label).tolist()
    if not test and not manifest.dataset.get(WITHOUT_TEST):
        raise RefusedInput(
            f"test split of {config.data}",
            expected=f"volumes with label {config.label!r}",
            found=f"none{_elsewhere(manifest, config.label)}",
            remedy="ingest with a larger test fraction",
        )
    limit = len(test) if config.test_limit is None else config.test_limit
    return Subjects(
        train=tuple(i for name in train for i in by_subject[name]),
        inner=tuple(i for name in inner for i in by_subject[name]),
        test=tuple(test[:limit]),
    )


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


def _elsewhere(manifest: Manifest, label: str) -> str:
    """In which splits subjects with a label are, and the labels that there are where none has this one."""
    counts: dict[str, set[str]] = {}
    others: set[str] = set()
    for record in manifest.records():
        others |= {info.name for info in record.labels}
        if label in record.map_names():
            counts.setdefault(record.split, set()).add(record.subject)
    if counts:
        return f" (by split: {', '.join(f'{split} {len(counts[split])}' for split in sorted(counts))})"
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
