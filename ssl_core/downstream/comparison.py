"""Several starts of the same fine-tuning compared over the same test subjects."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ssl_core.downstream.paired_test import Paired, compare
from ssl_core.downstream.records import from_fields
from ssl_core.downstream.scores import METRICS, CaseScore, Scores, mean_scores, sd_scores

ONE_START = "One start only: nothing to compare."


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
    """

    start: str
    seed: int
    history: tuple[Mapping[str, float], ...]
    cases: tuple[CaseScore, ...]
    version: str | None
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As stored; each case says which training it is of."""
        return {**vars(self), "cases": cases_to_json([self])}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Training":
        """Inverse of `to_json`.

        Raises:
            RefusedInput: an entry is missing.
        """
        return from_fields(cls, {**data, "cases": [CaseScore.from_json(case) for case in data["cases"]]})


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
        test: First start against the second over subjects; None where there is one start.
        model: Registered name of the segmenter.
        version: Its version; None where none was registered.
        registered_start: The start whose first seed was registered.
        nsd_tolerance_mm: Tolerance of the NSD, mm.
        run_id: MLflow run.
        seconds: Wall time of the job.
    """

    rows: tuple[StartRow, ...]
    trainings: tuple[Training, ...]
    test: Paired | None
    model: str
    version: str | None
    registered_start: str
    nsd_tolerance_mm: float
    run_id: str
    seconds: float

    @property
    def statement(self) -> str:
        """What the paired test says, in one sentence."""
        return ONE_START if self.test is None else self.test.statement

    def to_json(self) -> dict[str, Any]:
        """As written to `result.json`; the cases of all trainings stand in one list."""
        return {
            "rows": [row.to_json() for row in self.rows],
            "cases": cases_to_json(self.trainings),
            "test": {"statement": self.statement} if self.test is None else asdict(self.test),
            "model": self.model,
            "version": self.version,
            "registered_start": self.registered_start,
            "nsd_tolerance_mm": self.nsd_tolerance_mm,
            "runs": [
                {"start": t.start, "seed": t.seed, "history": t.history, "seconds": t.seconds} for t in self.trainings
            ],
            "run_id": self.run_id,
            "seconds": self.seconds,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Comparison":
        """Inverse of `to_json`, but for the trainings' versions, of which it has the one that was registered.

        Raises:
            RefusedInput: an entry is missing.
        """
        trainings = tuple(
            Training.from_json(
                {
                    **run,
                    "cases": [c for c in data["cases"] if (c["start"], c["seed"]) == (run["start"], run["seed"])],
                    "version": None,
                }
            )
            for run in data["runs"]
        )
        rows = tuple(StartRow.from_json(row) for row in data["rows"])
        test = None if data["test"]["statement"] == ONE_START else from_fields(Paired, data["test"])
        return from_fields(cls, {**data, "rows": rows, "trainings": trainings, "test": test})


def cases_to_json(trainings: Sequence[Training]) -> list[dict[str, Any]]:
    """All cases, each with the start and the seed of its training."""
    return [{"start": t.start, "seed": t.seed, **case.to_json()} for t in trainings for case in t.cases]


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


def paired_test_of(trainings: Sequence[Training], starts: Sequence[str]) -> Paired | None:
    """Paired test of the first start against the second over subjects; None where there is one start."""
    if len(starts) < 2:
        return None
    a, b = starts[:2]
    first, second = (subject_dice(trainings, start) for start in (a, b))
    subjects = sorted({*first, *second})
    seeds = sum(training.start == a for training in trainings)
    a_N, b_N = (np.array([scores[subject] for subject in subjects]) for scores in (first, second))
    return compare(a_N, b_N, a=a, b=b, seeds=seeds)
