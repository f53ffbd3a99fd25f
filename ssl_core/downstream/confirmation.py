"""What the best settings of a search are worth on subjects that it never saw, over draws of labelled ones.

The words are computed from the test. They are of these two configurations, fixed before a test subject was read.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl_core.downstream.inference import LEVEL, DrawTest, draw_test, estimate, least_draws
from ssl_core.downstream.records import from_fields


@dataclass(frozen=True)
class Side:
    """One of the two configurations that are compared.

    Attributes:
        name: What sentences call it.
        settings: Values by dotted path, the `encoder` among them.
        trials: Trials that it is the best of; 0 where it was not searched.
        mean: Test Dice over draws, trainings and subjects.
        sd: Of the means of the draws, with n - 1.
        low: Lower end of the mean's 95 % interval over draws and subjects.
        high: Upper end.
        by_draw: Mean of each draw.
    """

    name: str
    settings: Mapping[str, Any]
    trials: int
    mean: float
    sd: float
    low: float
    high: float
    by_draw: tuple[float, ...]


@dataclass(frozen=True)
class Confirmation:
    """The best of a search and its reference on the same draws of labelled subjects and the same test subjects.

    Attributes:
        best: What is registered was trained so.
        reference: What it is compared with.
        test: best - reference.
        labels: Labelled subjects of a draw, those of the inner split left out.
        draws: Seeds of the draws.
        seeds: Trainings of each side and draw.
        model: Registered name.
        version: Its version.
    """

    best: Side
    reference: Side
    test: DrawTest
    labels: int
    draws: tuple[int, ...]
    seeds: int
    model: str
    version: str

    @property
    def statement(self) -> str:
        """What came of it, in sentences."""
        each = f"{self.seeds} trainings a draw, " if self.seeds > 1 else ""
        words = [
            f"Over {len(self.draws)} draws of {self.labels} labelled subjects ({each}{self.test.subjects} test"
            f" subjects) {_of(self.best)}; {_of(self.reference)}.",
            f"Difference {self.test.difference:+.3f} (95 % interval {_signed(self.test.low)} to"
            f" {_signed(self.test.high)}), p = {self.test.p:.2g}: {_verdict(self.test)}.",
        ]
        counts = {side.trials for side in (self.best, self.reference) if side.trials}
        if len(counts) > 1:
            words.append("Their searches were of unequal size, which favours the larger.")
        return " ".join(words)

    @property
    def metrics(self) -> dict[str, float]:
        """For the card: mean and spread of what is registered."""
        draws = f"over {len(self.draws)} draws"
        return {f"mean test Dice {draws}": self.best.mean, f"SD of test Dice {draws}": self.best.sd}

    def to_json(self) -> dict[str, Any]:
        """As written to `result.json`."""
        return {**asdict(self), "statement": self.statement}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Confirmation":
        """Inverse of `to_json`.

        Raises:
            RefusedInput: an entry is missing.
        """
        sides = {key: from_fields(Side, data[key]) for key in ("best", "reference")}
        return from_fields(cls, {**data, **sides, "test": from_fields(DrawTest, data["test"])})


@dataclass(frozen=True)
class Scored:
    """A side and its scores.

    Attributes:
        name: See `Side.name`.
        settings: See `Side.settings`.
        trials: See `Side.trials`.
        dice_DN: Mean Dice by draw and test subject, over the trainings of the draw.
    """

    name: str
    settings: Mapping[str, Any]
    trials: int
    dice_DN: NDArray[np.float64]


def confirmed(
    best: Scored, reference: Scored, *, labels: int, draws: Sequence[int], seeds: int, model: str, version: str
) -> Confirmation:
    """The comparison of two sides.

    Args:
        best: With the same draws and subjects as `reference`, 2 draws or more.
        reference: See `Confirmation`, as the others.
        labels: Labelled subjects of a draw.
        draws: Their seeds.
        seeds: Trainings of each side and draw.
        model: Registered name.
        version: Its version.

    Raises:
        ConfigError: a score that is not finite.
    """
    box_DSN = (best.dice_DN - reference.dice_DN)[:, None, :]
    test = draw_test(box_DSN, a=best.name, b=reference.name, labels=labels)
    return Confirmation(_side(best), _side(reference), test, labels, tuple(draws), seeds, model, version)


def _side(scored: Scored) -> Side:
    by_draw = scored.dice_DN.mean(1)
    of = estimate(scored.dice_DN[:, None, :])
    low, high = (math.nan if end is None else end for end in (of.low, of.high))
    sd = float(by_draw.std(ddof=1))
    return Side(scored.name, dict(scored.settings), scored.trials, of.mean, sd, low, high, tuple(map(float, by_draw)))


def _of(side: Side) -> str:
    return (
        f"{side.name}{f', best of {side.trials} trials,' if side.trials else ''} came to a test Dice of {side.mean:.3f}"
        f" (SD over draws {side.sd:.3f}, {min(side.by_draw):.3f} to {max(side.by_draw):.3f})"
    )


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"


def _verdict(test: DrawTest) -> str:
    if test.p < LEVEL:
        return "higher" if test.difference > 0 else "lower"
    if not test.attainable:
        return f"so few draws show no difference, whatever it is; {least_draws(1)} could"
    return "no difference is shown"
