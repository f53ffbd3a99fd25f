"""What a head learns of each volume: the value of a column of the manifest, as a class or as a number."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ssl_core.downstream.settings import Task
from storage.errors import ConfigError

MOST_CLASSES = 100
"""Of a classification; a column with more is a number or a name. Our choice."""
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_EXAMPLES = 5


@dataclass(frozen=True)
class Target:
    """Values of a column.

    Attributes:
        column: Its name.
        task: `classification` or `regression`.
        classes: Names of the classes, in order; empty of a regression.
        value_of: By manifest index the number of the class, or the value in the column's unit.
        mean: Of a regression, over the training subjects; 0 otherwise.
        sd: The same, their standard deviation (divided by n); 1 otherwise.
    """

    column: str
    task: Task
    classes: tuple[str, ...]
    value_of: Mapping[int, float]
    mean: float = 0.0
    sd: float = 1.0

    def truth(self, index: int) -> str | float:
        """What a volume is, for a person."""
        value = self.value_of[index]
        return self.classes[int(value)] if self.classes else value


def target_of(
    column: str,
    task: Task,
    text_of: Mapping[int, str],
    subject_of: Mapping[int, str],
    train: Sequence[int],
    volume_of: Mapping[int, str],
) -> Target:
    """The target of a training.

    Args:
        column: Name of the column.
        task: `classification` or `regression`.
        text_of: By manifest index the value of every volume that could be drawn, so that classes do not depend on a
            draw.
        subject_of: Whose each volume is.
        train: Volumes that the weights are learned from.
        volume_of: Name of each volume, for messages.

    Raises:
        ConfigError: one class or too many, two spellings of one class, a value that is no number, or targets of
            training without any spread; names the key.
    """
    key = f"labelled.column {column!r}"
    if task == "classification":
        classes = _classes(key, set(text_of.values()))
        return Target(column, task, classes, {i: float(classes.index(text)) for i, text in text_of.items()})
    otherwise = ", or set finetune.task=classification"
    value_of = _numbers(key, text_of, volume_of, "as finetune.task=regression learns", otherwise)
    of_subject: dict[str, list[float]] = {}
    for i in train:
        of_subject.setdefault(subject_of[i], []).append(value_of[i])
    means = np.array([np.mean(values) for values in of_subject.values()])
    mean, sd = float(means.mean()), float(means.std())
    if not sd > 1e-9 * max(abs(mean), 1e-300):
        raise ConfigError(
            key,
            expected="training subjects whose values differ",
            found=f"{mean:g} for all {len(means)}",
            remedy="draw more subjects (labelled.subjects), or others (labelled.subjects_seed)",
        )
    return Target(column, task, (), value_of, mean, sd)


def target_of_model(
    column: str, classes: Sequence[str], text_of: Mapping[int, str], volume_of: Mapping[int, str]
) -> Target:
    """The target that a trained model is held to.

    Args:
        column: Name of the column that it learned.
        classes: Those that it tells apart, in order; empty of a regression.
        text_of: By manifest index the value of every volume.
        volume_of: Name of each volume, for messages.

    Raises:
        ConfigError: a class that it does not know, or a value that is no number; names volumes.
    """
    key = f"column {column!r}"
    if not classes:
        return Target(column, "regression", (), _numbers(key, text_of, volume_of, "as the model predicts"))
    unknown = [f"{text!r} of {volume_of[i]}" for i, text in text_of.items() if text not in classes]
    if unknown:
        raise ConfigError(
            key,
            expected=f"the classes of the model: {', '.join(map(repr, classes))}",
            found=_first(unknown),
            remedy="write them as the model's table did, or leave the cells empty, and ingest again",
        )
    return Target(column, "classification", tuple(classes), {i: classes.index(t) for i, t in text_of.items()})


def absent_classes(target: Target, train: Sequence[int], test: Sequence[int]) -> list[str]:
    """A line for each class that no training volume, or no test volume, has: its scores mean little then."""
    if not target.classes:
        return []

    def numbers(indices: Sequence[int]) -> set[int]:
        return {int(target.value_of[i]) for i in indices}

    lines = [
        f"class {name!r} of {target.column!r} is of no training volume: nothing of it is learned"
        for number, name in enumerate(target.classes)
        if number not in numbers(train)
    ]
    lines += [
        f"class {name!r} of {target.column!r} is of no test volume: balanced accuracy and AUROC leave it out"
        for number, name in enumerate(target.classes)
        if number not in numbers(test)
    ]
    return lines


def _numbers(
    key: str, text_of: Mapping[int, str], volume_of: Mapping[int, str], what: str, otherwise: str = ""
) -> dict[int, float]:
    """The number of each text.

    Raises:
        ConfigError: one is none, or not finite.
    """
    wrong = [f"{text!r} of {volume_of[i]}" for i, text in text_of.items() if not _NUMBER.fullmatch(text)]
    if wrong:
        raise ConfigError(
            key,
            expected=f"a number for every volume, {what}",
            found=_first(wrong),
            remedy=f"leave the cell empty where nothing is known, write numbers with a point{otherwise}",
        )
    value_of = {i: float(text) for i, text in text_of.items()}
    if not np.isfinite(list(value_of.values())).all():
        raise ConfigError(key, expected="finite numbers", found="one that is beyond any", remedy="correct the table")
    return value_of


def _first(items: Sequence[str]) -> str:
    """The first of many, and how many more."""
    return ", ".join(items[:_EXAMPLES]) + (f" and {len(items) - _EXAMPLES} more" if items[_EXAMPLES:] else "")


def _classes(key: str, texts: set[str]) -> tuple[str, ...]:
    """Different values, numbers by size before names.

    Raises:
        ConfigError: as `target_of`.
    """
    spelling: dict[float | str, str] = {}
    for text in sorted(texts):
        same: float | str = float(text) if _NUMBER.fullmatch(text) else text.casefold()
        if same in spelling:
            raise ConfigError(
                key,
                expected="one spelling of each class",
                found=f"{spelling[same]!r} and {text!r}",
                remedy="write them alike in the subject table, and ingest again",
            )
        spelling[same] = text
    if not 2 <= len(texts) <= MOST_CLASSES:
        raise ConfigError(
            key,
            expected=f"2 to {MOST_CLASSES} classes, as finetune.task=classification learns",
            found=f"{len(texts)}: {', '.join(sorted(texts)[:_EXAMPLES])}{', ...' if len(texts) > _EXAMPLES else ''}",
            remedy="name another column, or set finetune.task=regression for a number",
        )
    numbers = sorted(same for same in spelling if isinstance(same, float))
    names = sorted(same for same in spelling if isinstance(same, str))
    return (*(spelling[number] for number in numbers), *(spelling[name] for name in names))
