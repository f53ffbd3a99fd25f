"""Several starts of the same fine-tuning compared over the same test subjects."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ssl_core.downstream.inference import DrawTest, draw_test
from ssl_core.downstream.paired_test import PairedTrainings, compare_trainings
from ssl_core.downstream.records import from_fields
from ssl_core.downstream.scores import METRICS, CaseScore, Scores, mean_scores, sd_scores
from ssl_core.downstream.study import sentence
from storage.errors import ConfigError

ONE_START = "One start only: nothing to compare."
ONE_DRAW = "This is of one draw of labelled subjects; another may say otherwise, and `tomoscale study` goes over draws."
"""Behind each sentence: which subjects are labelled often moves Dice more than the start does."""


@dataclass(frozen=True)
class Training:
    """One training's result.

    Attributes:
        start: Name of the start.
        seed: Its seed.
        history: Metrics of each epoch.
        cases: Scores of every test case.
        version: Version under which its segmenter was registered; None where it was not.
        seconds: Wall time, scoring included.
        draw: Seed of its draw of labelled subjects, where the job has several.
    """

    start: str
    seed: int
    history: tuple[Mapping[str, float], ...]
    cases: tuple[CaseScore, ...]
    version: str | None
    seconds: float
    draw: int | None = None

    @property
    def names(self) -> dict[str, Any]:
        """What tells it from the others of its job."""
        return {"start": self.start, "seed": self.seed} | ({} if self.draw is None else {"draw": self.draw})

    @property
    def scores(self) -> dict[str, float]:
        """Mean of each metric over its cases, by name."""
        means = mean_scores(self.cases)
        return {metric.name: means.of(metric) for metric in METRICS}

    @property
    def headline(self) -> str:
        """Its Dice, for a log."""
        return f"test Dice {mean_scores(self.cases).dice:.3f}"

    def to_json(self) -> dict[str, Any]:
        """As stored; each case says which training it is of. One of a single draw has no `draw`, as before."""
        facts = {key: value for key, value in vars(self).items() if key != "draw" or value is not None}
        return {**facts, "cases": cases_to_json([self])}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Training":
        """Inverse of `to_json`.

        Raises:
            RefusedInput: an entry is missing.
        """
        cases = [CaseScore.from_json(case) for case in data["cases"]]
        return from_fields(cls, {"draw": None, **data, "cases": cases})


@dataclass(frozen=True)
class StartRow:
    """One label of one start over all its seeds and cases.

    Attributes:
        start: Name of the start.
        label: Name of the label.
        seeds: Trainings.
        cases: Test volumes.
        mean: Mean of each metric over cases and seeds.
        sd: Standard deviation of each metric over cases and seeds.
    """

    start: str
    label: str
    seeds: int
    cases: int
    mean: Scores
    sd: Scores

    def to_json(self) -> dict[str, Any]:
        """One flat object: `dice_mean`, `dice_sd` and so on."""
        row: dict[str, Any] = {"start": self.start, "label": self.label, "seeds": self.seeds, "cases": self.cases}
        for metric in METRICS:
            row |= {f"{metric.stem}_mean": self.mean.of(metric), f"{metric.stem}_sd": self.sd.of(metric)}
        return row

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "StartRow":
        """Inverse of `to_json`.

        Raises:
            RefusedInput: an entry is missing.
        """
        columns = {
            part: {m.name: data[key] for m in METRICS if (key := f"{m.stem}_{part}") in data} for part in ("mean", "sd")
        }
        return from_fields(cls, {**data, **{part: from_fields(Scores, scores) for part, scores in columns.items()}})


@dataclass(frozen=True)
class Comparison:
    """What a fine-tuning job came to.

    Attributes:
        rows: One for each start and label.
        trainings: In the order of the starts and seeds.
        test: First start against the second over trainings and subjects, and over draws where there are several; None
            where there is one start.
        model: Registered name of the segmenter.
        version: Its version; None where none was registered.
        registered_start: The start whose first seed was registered.
        nsd_tolerance_mm: Tolerance of the NSD, mm.
        run_id: MLflow run.
        seconds: Wall time of the job.
    """

    rows: tuple[StartRow, ...]
    trainings: tuple[Training, ...]
    test: PairedTrainings | DrawTest | None
    model: str
    version: str | None
    registered_start: str
    nsd_tolerance_mm: float
    run_id: str
    seconds: float

    @property
    def statement(self) -> str:
        """What the test says of these trainings."""
        if self.test is None:
            return ONE_START
        return over_draws(self.test) if isinstance(self.test, DrawTest) else self.test.statement

    def to_json(self) -> dict[str, Any]:
        """As written to `result.json`; the cases of all trainings stand in one list."""
        return {
            "rows": [row.to_json() for row in self.rows],
            "cases": cases_to_json(self.trainings),
            "test": _test_to_json(self.test) | {"statement": self.statement},
            "model": self.model,
            "version": self.version,
            "registered_start": self.registered_start,
            "nsd_tolerance_mm": self.nsd_tolerance_mm,
            "runs": [{**t.names, "history": t.history, "seconds": t.seconds} for t in self.trainings],
            "run_id": self.run_id,
            "seconds": self.seconds,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Comparison":
        """Inverse of `to_json`, but for the trainings' versions, of which it has the one that was registered.

        Results of before hold a test over subjects alone. It is made again of their cases, over trainings and subjects.

        Raises:
            RefusedInput: an entry is missing.
        """
        trainings = tuple(
            Training.from_json(
                {
                    **run,
                    "cases": [case for case in data["cases"] if _names(case) == _names(run)],
                    "version": None,
                }
            )
            for run in data["runs"]
        )
        rows = tuple(StartRow.from_json(row) for row in data["rows"])
        test = _stored_test(data["test"], trainings)
        return from_fields(cls, {**data, "rows": rows, "trainings": trainings, "test": test})


def cases_to_json(trainings: Sequence[Training]) -> list[dict[str, Any]]:
    """All cases, each with the start, the seed and the draw of its training."""
    return [{**t.names, **case.to_json()} for t in trainings for case in t.cases]


def subject_dice(trainings: Sequence[Training], start: str) -> dict[str, float]:
    """Mean Dice of each test subject over the volumes, labels and seeds of a start, subjects in order."""
    values: dict[str, list[float]] = {}
    for training in trainings:
        if training.start == start:
            for case in training.cases:
                values.setdefault(case.subject, []).append(case.scores.dice)
    return {subject: float(np.mean(values[subject])) for subject in sorted(values)}


def start_rows(trainings: Sequence[Training], starts: Sequence[str]) -> tuple[StartRow, ...]:
    """A row for each start and label, starts as listed, labels in order."""
    labels = sorted({case.label for training in trainings for case in training.cases})
    rows = []
    for start in starts:
        group = [training for training in trainings if training.start == start]
        for label in labels:
            cases = [case for training in group for case in training.cases if case.label == label]
            volumes = len({case.volume_id for case in cases})
            rows.append(StartRow(start, label, len(group), volumes, mean_scores(cases), sd_scores(cases)))
    return tuple(rows)


def paired_test_of(
    trainings: Sequence[Training], starts: Sequence[str], labels: int = 0
) -> PairedTrainings | DrawTest | None:
    """The first start against the second, paired by draw, seed and subject; None where there is one start.

    Args:
        trainings: All of a job.
        starts: Their names, in order.
        labels: Labelled subjects of a draw, where there are several draws.

    Raises:
        ConfigError: a draw, a seed or a subject of one start is missing in the other.
    """
    if len(starts) < 2:
        return None
    a, b = starts[:2]
    if any(training.draw is not None for training in trainings):
        return draw_test(differences_by_draw(trainings, a, b, _dice), a=a, b=b, labels=labels)
    first, second = (_dice_by_seed(trainings, start) for start in (a, b))
    if {seed: set(dice) for seed, dice in first.items()} != {seed: set(dice) for seed, dice in second.items()}:
        raise ConfigError(
            f"trainings of {a} and {b}", expected="the same seeds and test subjects", found="others", remedy=_REMEDY
        )
    d_SN = np.array([[dice[s] - second[seed][s] for s in dice] for seed, dice in first.items()])
    test = compare_trainings(d_SN, a=a, b=b)
    return replace(test, statement=f"{test.statement} {ONE_DRAW}")


_REMEDY = "run the job again under another name"


def _stored_test(data: Mapping[str, Any], trainings: Sequence[Training]) -> PairedTrainings | DrawTest | None:
    if data["statement"] == ONE_START:
        return None
    if "by_draw" in data:
        return from_fields(DrawTest, data)
    if "n_seeds" in data:
        return from_fields(PairedTrainings, data)
    return paired_test_of(trainings, list(dict.fromkeys(training.start for training in trainings)))


def over_draws(test: DrawTest, measure: str = "Dice") -> str:
    """What a test over draws says, and over what it generalises."""
    seeds = "1 training" if test.pretrainings == 1 else f"{test.pretrainings} trainings"
    subjects = "1 test subject" if test.subjects == 1 else f"{test.subjects} test subjects"
    return (
        f"{sentence(test, measure)} Interval and test are over {test.draws} draws of labelled subjects, {seeds} of each"
        f" start on each, and {subjects}; not over other pre-trainings."
    )


def _test_to_json(test: PairedTrainings | DrawTest | None) -> dict[str, Any]:
    if test is None:
        return {}
    return asdict(test) | ({"significant": test.significant} if isinstance(test, DrawTest) else {})


def _names(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    return entry["start"], entry["seed"], entry.get("draw")


class Compared(Protocol):
    """A training, as far as it is told from the others of its job."""

    @property
    def start(self) -> str:
        """Name of its start."""
        ...

    @property
    def seed(self) -> int:
        """Its seed."""
        ...

    @property
    def draw(self) -> int | None:
        """Seed of its draw of labelled subjects, where the job has several."""
        ...


T = TypeVar("T", bound=Compared)


def differences_by_draw(
    trainings: Sequence[T], a: str, b: str, scores_of: Callable[[T], Mapping[str, float]]
) -> NDArray[np.float64]:
    """Score of one start less that of another, by draw, seed and test subject.

    Args:
        trainings: All of a job.
        a, b: The starts.
        scores_of: Score of each test subject of a training.

    Raises:
        ConfigError: one of them is missing.
    """
    values: list[dict[tuple[Any, ...], float]] = [
        {(t.draw, t.seed, s): score for t in trainings if t.start == start for s, score in scores_of(t).items()}
        for start in (a, b)
    ]
    axes = [list(dict.fromkeys(keys)) for keys in zip(*values[0], strict=True)]
    every = list(itertools.product(*axes))
    if any(set(of_start) != set(every) for of_start in values):
        raise ConfigError(
            f"trainings of {a} and {b}",
            expected="every draw with the same seeds and test subjects",
            found="others",
            remedy=_REMEDY,
        )
    return np.array([values[0][key] - values[1][key] for key in every]).reshape([len(axis) for axis in axes])


def _dice(training: Training) -> dict[str, float]:
    return subject_dice([training], training.start)


def _dice_by_seed(trainings: Sequence[Training], start: str) -> dict[int, dict[str, float]]:
    """Mean Dice of each test subject over its volumes and labels, for each seed of a start."""
    group = [training for training in trainings if training.start == start]
    return {training.seed: subject_dice([training], start) for training in group}
