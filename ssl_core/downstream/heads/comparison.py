"""Several starts of the same classification or regression compared over the same test subjects."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ssl_core.downstream.comparison import ONE_START, differences_by_draw, over_draws
from ssl_core.downstream.heads.scores import Outcome, overall
from ssl_core.downstream.inference import DrawTest, draw_test
from ssl_core.downstream.paired_test import PairedTrainings, compare_trainings
from ssl_core.downstream.records import from_fields

ONE_DRAW = "This is of one draw of labelled subjects; another may say otherwise, and a list of `labelled.subjects_seed`"
ONE_DRAW += " goes over draws."
UNTESTED = "Other scores are of each training over all test volumes; their differences are shown and not tested."


@dataclass(frozen=True)
class HeadTraining:
    """One training's result.

    Attributes:
        start: Name of the start.
        seed: Its seed.
        history: Metrics of each epoch.
        cases: What it says of every test volume.
        version: Version under which it was registered; None where it was not.
        seconds: Wall time, scoring included.
        draw: Seed of its draw of labelled subjects, where the job has several.
        classes: In the order of the probabilities; empty of a regression.
    """

    start: str
    seed: int
    history: tuple[Mapping[str, float], ...]
    cases: tuple[Outcome, ...]
    version: str | None
    seconds: float
    draw: int | None
    classes: tuple[str, ...]

    @property
    def names(self) -> dict[str, Any]:
        """What tells it from the others of its job."""
        return {"start": self.start, "seed": self.seed} | ({} if self.draw is None else {"draw": self.draw})

    @property
    def scores(self) -> dict[str, float | None]:
        """Over its test volumes, see `ssl_core.downstream.heads.scores`."""
        return overall(self.classes, self.cases)

    @property
    def headline(self) -> str:
        """Its first scores, for a log."""
        names = ("accuracy", "auroc") if self.classes else ("mae", "r2")
        values = {name: self.scores[name] for name in names}
        return ", ".join(f"test {name} {'none' if x is None else f'{x:.3f}'}" for name, x in values.items())

    def to_json(self) -> dict[str, Any]:
        """As stored."""
        return {**vars(self), "cases": [case.to_json() for case in self.cases]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "HeadTraining":
        """Inverse of `to_json`.

        Raises:
            RefusedInput: an entry is missing.
        """
        return from_fields(cls, {**data, "cases": [Outcome.from_json(case) for case in data["cases"]]})


@dataclass(frozen=True)
class HeadComparison:
    """What a job of heads came to.

    Attributes:
        task: `classification` or `regression`.
        column: What was learned.
        trainings: In the order of the starts, draws and seeds.
        starts: Names, in order.
        test: First start against the second, paired by draw, seed and subject; None where there is one start.
        measure: What the test compares.
        model: Registered name.
        version: Its version; None where none was registered.
        registered_start: The start whose first seed was registered.
        run_id: MLflow run.
        seconds: Wall time of the job.
    """

    task: str
    column: str
    trainings: tuple[HeadTraining, ...]
    starts: tuple[str, ...]
    test: PairedTrainings | DrawTest | None
    measure: str
    model: str
    version: str | None
    registered_start: str
    run_id: str
    seconds: float

    @property
    def statement(self) -> str:
        """What the test says of these trainings, and of what none was made."""
        if self.test is None:
            return ONE_START
        if isinstance(self.test, DrawTest):
            return f"{over_draws(self.test, self.measure)} {UNTESTED}"
        return f"{self.test.statement} {UNTESTED}"

    def rows(self) -> list[dict[str, Any]]:
        """One a start: mean and standard deviation (divided by n) of each score over its trainings.

        Trainings without a score are left out of its mean; `trainings` says of how many it is.
        """
        rows = []
        for start in self.starts:
            group = [training.scores for training in self.trainings if training.start == start]
            row: dict[str, Any] = {"start": start, "trainings": len(group), "scores": {}}
            for name in group[0]:
                values = [value for scores in group if (value := scores[name]) is not None]
                row["scores"][name] = {
                    "mean": float(np.mean(values)) if values else None,
                    "sd": float(np.std(values)) if values else None,
                    "trainings": len(values),
                }
            rows.append(row)
        return rows

    def to_json(self) -> dict[str, Any]:
        """As written to `result.json`."""
        test = {} if self.test is None else asdict(self.test)
        if isinstance(self.test, DrawTest):
            test["significant"] = self.test.significant
        return {
            "task": self.task,
            "column": self.column,
            "classes": list(self.trainings[0].classes),
            "rows": self.rows(),
            "cases": [{**t.names, **case.to_json()} for t in self.trainings for case in t.cases],
            "test": {**test, "measure": self.measure, "statement": self.statement},
            "model": self.model,
            "version": self.version,
            "registered_start": self.registered_start,
            "runs": [
                {**t.names, "scores": t.scores, "history": t.history, "seconds": t.seconds} for t in self.trainings
            ],
            "run_id": self.run_id,
            "seconds": self.seconds,
        }


def measure_of(task: str, column: str) -> str:
    """What starts are compared by."""
    return "accuracy" if task == "classification" else f"minus absolute error of {column}"


def paired_test_of(
    trainings: Sequence[HeadTraining], starts: Sequence[str], measure: str, labels: int = 0
) -> PairedTrainings | DrawTest | None:
    """The first start against the second, paired by draw, seed and subject; None where there is one start.

    Args:
        trainings: All of a job.
        starts: Their names, in order.
        measure: What the scores are.
        labels: Labelled subjects of a draw, where there are several draws.

    Raises:
        ConfigError: a draw, a seed or a subject of one start is missing in the other.
    """
    if len(starts) < 2:
        return None
    a, b = starts[:2]
    box_DSN = differences_by_draw(trainings, a, b, subject_scores)
    if any(training.draw is not None for training in trainings):
        return draw_test(box_DSN, a=a, b=b, labels=labels)
    test = compare_trainings(box_DSN[0], a=a, b=b, measure=measure)
    return replace(test, statement=f"{test.statement} {ONE_DRAW}")


def subject_scores(training: HeadTraining) -> dict[str, float]:
    """Mean score of each test subject over its volumes."""
    values: dict[str, list[float]] = {}
    for case in training.cases:
        values.setdefault(case.subject, []).append(case.score)
    return {subject: float(np.mean(scores)) for subject, scores in sorted(values.items())}
