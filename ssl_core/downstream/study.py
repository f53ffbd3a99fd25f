"""What a study came to: scores by start, count of labels, draw and seed, with intervals, tests and words.

The words are computed from the tests. They say over what they generalise, and claim nothing that the tests do not.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssl_core.downstream.inference import (
    LEVEL,
    DrawTest,
    Estimate,
    Power,
    corrected,
    draw_test,
    estimate,
)
from ssl_core.downstream.records import from_fields
from ssl_core.downstream.scores import METRICS, CaseScore, CaseSlice
from storage.errors import ConfigError

# scipy.stats takes a second to import, and every job reads this module: functions import it.

Box = NDArray[np.float64]


@dataclass(frozen=True)
class StudyCell:
    """A tested training.

    Attributes:
        start: Name of its start.
        labels: Labelled subjects.
        draw: Number of the draw.
        seed: Pre-training seed.
        subjects: Those that it learned from.
        cases: Scores of every test case.
        history: Metrics of each point of its curve.
        steps: Optimizer steps in all.
        seconds: Wall time of the training alone.
        peak_gb: Most memory in use, GB.
        slices: Of each test case, by id, the slice that a report shows; none of trainings from before there were any.
    """

    start: str
    labels: int
    draw: int
    seed: int
    subjects: tuple[str, ...]
    cases: tuple[CaseScore, ...]
    history: tuple[Mapping[str, float], ...]
    steps: int
    seconds: float
    peak_gb: float
    slices: Mapping[str, CaseSlice] = field(default_factory=dict)


@dataclass(frozen=True)
class StudyPretraining:
    """A pre-training of a study.

    Attributes:
        start: Name of its start.
        seed: Its seed.
        minutes: How long it took.
        losses: Some steps and their losses.
        probes: Last value of each probe, by name.
    """

    start: str
    seed: int
    minutes: float
    losses: tuple[tuple[int, float], ...]
    probes: Mapping[str, float]


@dataclass(frozen=True)
class StudyRow:
    """One start with one count of labels.

    Attributes:
        start: Name of the start.
        labels: Labelled subjects.
        scores: By name of the metric, its mean over draws, seeds and subjects with a 95 % interval over all three.
        by_draw: Mean Dice of each draw.
        gain: Dice minus that of the reference on the same draws and subjects; None of the reference. No test.
        lr: Learning rate of the recorded choice.
        steps: Steps of it.
        minutes: Of one fine-tuning, mean.
        pretraining_minutes: Of one pre-training, mean; 0 without.
        peak_gb: Most memory that a fine-tuning had in use, GB.
    """

    start: str
    labels: int
    scores: Mapping[str, Estimate]
    by_draw: tuple[float, ...]
    gain: Estimate | None
    lr: float
    steps: int
    minutes: float
    pretraining_minutes: float
    peak_gb: float


@dataclass(frozen=True)
class Ranks:
    """Average ranks of all starts over draws at one count, 1 the best (Demsar 2006).

    Attributes:
        labels: Labelled subjects.
        ranks: By start.
        critical: Difference of ranks that Nemenyi's test at 5 % calls one; None with fewer than two draws.
    """

    labels: int
    ranks: Mapping[str, float]
    critical: float | None


@dataclass(frozen=True)
class StudyResult:
    """What all cells of a study come to.

    Attributes:
        name: Of the study.
        reference: The start that others are tested against.
        rows: By count and start.
        tests: Of the primary comparisons, corrected together.
        ranks: By count.
        power: As stated before.
        choice: The sealed choice.
        cells: All tested trainings.
        pretrainings: All pre-trainings.
        generalises: Over what.
        conclusion: Sentences.
    """

    name: str
    reference: str
    rows: tuple[StudyRow, ...]
    tests: tuple[DrawTest, ...]
    ranks: tuple[Ranks, ...]
    power: Power
    choice: Mapping[str, Any]
    cells: tuple[StudyCell, ...]
    pretrainings: tuple[StudyPretraining, ...]
    generalises: str
    conclusion: tuple[str, ...]


def cell_from_json(data: Mapping[str, Any]) -> StudyCell:
    """A tested training from the result of its cell.

    Raises:
        RefusedInput: an entry is missing.
    """
    finetune = data["spec"]["finetune"]
    cases = tuple(CaseScore.from_json(case) for case in data["cases"])
    steps = finetune["epochs"] * finetune["steps_per_epoch"]
    slices = {name: CaseSlice.from_json(one) for name, one in data.get("slices", {}).items()}
    known = {"cases": cases, "slices": slices, "steps": steps, "seconds": data["trained_s"]}
    return from_fields(StudyCell, {**data, **known})


def box_of(cells: Sequence[StudyCell], start: str, labels: int, metric: str = "dice") -> Box:
    """Values by draw, pre-training seed and test subject, each the mean of a subject's volumes and labels.

    Raises:
        ConfigError: a draw, a seed or a subject is missing.
    """
    group = [cell for cell in cells if (cell.start, cell.labels) == (start, labels)]
    draws, seeds = sorted({cell.draw for cell in group}), sorted({cell.seed for cell in group})
    subjects = sorted({case.subject for cell in group for case in cell.cases})
    box = np.full((len(draws), len(seeds), len(subjects)), np.nan)
    for cell in group:
        values: dict[str, list[float]] = {}
        for case in cell.cases:
            values.setdefault(case.subject, []).append(float(getattr(case.scores, metric)))
        for subject, scores in values.items():
            box[draws.index(cell.draw), seeds.index(cell.seed), subjects.index(subject)] = np.mean(scores)
    if not box.size or np.isnan(box).any():
        raise ConfigError(
            f"cells of {start} with {labels} labels",
            expected="every draw with every seed and test subject",
            found=f"{int(np.isnan(box).sum())} of {box.size} missing" if box.size else "none",
            remedy="run the study again: it goes on with what is missing",
        )
    return box


def difference(
    cells: Sequence[StudyCell], a: str, b: str, labels: int, metric: str = "dice", *, labels_of_b: int | None = None
) -> Box:
    """a - b by draw, pre-training seed and subject; what has one training a draw stands beside each seed of the other.

    Args:
        cells: All tested trainings.
        a: Name of the first start.
        b: Name of the second.
        labels: Labelled subjects of both.
        metric: Name of the score.
        labels_of_b: Of the second, where it has others; those of a draw contain those of fewer.

    Raises:
        ConfigError: the two were not tested on the same draws and subjects.
    """
    first, second = (box_of(cells, start, count, metric) for start, count in ((a, labels), (b, labels_of_b or labels)))
    seeds = {first.shape[1], second.shape[1]}
    if first.shape[::2] != second.shape[::2] or len(seeds - {1}) > 1:
        raise ConfigError(
            f"{a} against {b} with {labels} labels",
            expected="the same draws, seeds and test subjects",
            found=f"{first.shape} and {second.shape} draws, seeds and subjects",
        )
    return first - second


def summarise(
    name: str,
    reference: str,
    compared: Sequence[tuple[str, int]],
    cells: Sequence[StudyCell],
    *,
    halved: Sequence[tuple[str, int]] = (),
    power: Power,
    choice: Mapping[str, Any],
    pretrainings: Sequence[StudyPretraining],
    data: str,
) -> StudyResult:
    """Rows, tests and words of a study.

    Args:
        name: Of the study.
        reference: The start that others are tested against.
        compared: Pairs of a start and a count whose tests share the level.
        cells: All tested trainings.
        halved: Further such pairs, which are tested against the reference with twice their labels.
        power: As stated before the test was opened.
        choice: The sealed choice.
        pretrainings: All of them.
        data: What the sentences call the data.

    Raises:
        ConfigError: a cell is missing.
    """
    starts = list(dict.fromkeys(cell.start for cell in cells))
    counts = sorted({cell.labels for cell in cells})
    rows = [_row(cells, start, reference, labels, choice, pretrainings) for labels in counts for start in starts]
    tests = corrected(
        [_test(cells, start, reference, labels) for start, labels in compared]
        + [_test(cells, start, reference, labels, 2 * labels) for start, labels in halved]
    )
    ranks = [ranks_of(cells, starts, labels) for labels in counts]
    halves = _halves(cells, [pair for pair in compared if pair not in halved], reference)
    scope = _scope(cells, data)
    return StudyResult(
        name=name,
        reference=reference,
        rows=tuple(rows),
        tests=tests,
        ranks=tuple(ranks),
        power=power,
        choice=choice,
        cells=tuple(cells),
        pretrainings=tuple(pretrainings),
        generalises=scope,
        conclusion=conclusion(tests, halves, reference, scope),
    )


def _test(cells: Sequence[StudyCell], a: str, b: str, labels: int, labels_of_b: int | None = None) -> DrawTest:
    box_DSN = difference(cells, a, b, labels, labels_of_b=labels_of_b)
    return draw_test(box_DSN, a=a, b=b, labels=labels, labels_of_b=labels_of_b)


def ranks_of(cells: Sequence[StudyCell], starts: Sequence[str], labels: int) -> Ranks:
    """Average ranks over draws and Nemenyi's critical difference at one count."""
    from scipy import stats as scipy_stats  # see the top of this file

    by_draw = np.array([box_of(cells, start, labels).mean((1, 2)) for start in starts])
    ranks = scipy_stats.rankdata(-by_draw, axis=0).mean(1)
    k, draws = by_draw.shape
    critical = None
    if draws > 1:
        # Nemenyi's q is the studentized range of infinitely many degrees of freedom, over the root of 2.
        q = float(scipy_stats.studentized_range.ppf(1 - LEVEL, k, np.inf)) / math.sqrt(2)
        critical = q * math.sqrt(k * (k + 1) / (6 * draws))
    return Ranks(labels, {start: float(rank) for start, rank in zip(starts, ranks, strict=True)}, critical)


def conclusion(tests: Sequence[DrawTest], halves: Sequence[str], reference: str, scope: str) -> tuple[str, ...]:
    """What the tests say, a sentence each, the first being the whole in one."""
    better = [test for test in tests if test.significant and test.difference > 0]
    worse = [test for test in tests if test.significant and test.difference < 0]
    shared = f"{_count(len(tests), 'comparison')} with {reference}, corrected together"
    if tests and not any(test.attainable for test in tests):
        head = f"These draws are too few to show any difference: of {shared}, none could be significant."
    elif not better and not worse:
        head = f"No start is shown to differ from {reference}: of {shared}, none is significant."
    else:
        parts = [f"{len(better)} higher" if better else "", f"{len(worse)} lower" if worse else ""]
        head = f"Of {shared}, {' and '.join(part for part in parts if part)} with p < {LEVEL:g}."
    return (head, *(sentence(test) for test in tests), *halves, scope)


def sentence(test: DrawTest, measure: str = "Dice") -> str:
    """One comparison in words, of a measure whose larger values are better."""
    where = f"With {_count(test.labels, 'label')}"
    b = test.b if test.labels_of_b is None else f"{test.b} with {test.labels_of_b}"
    facts = f"{test.difference:+.3f} {measure}"
    if test.low is not None and test.high is not None:
        facts += f" (95 % interval {test.low:+.3f} to {test.high:+.3f}; "
    else:
        facts += " (no interval from one draw; "
    facts += f"p = {test.p:.2g}, corrected {test.corrected:.2g}; {_count(test.draws, 'draw')})"
    if test.significant:
        word = "higher" if test.difference > 0 else "lower"
        return f"{where} {test.a} scores {word} than {b}: {facts}."
    if not test.attainable:
        return f"{where} {test.a} minus {b} is {facts}; so few draws cannot show that one is better."
    return f"{where} no difference between {test.a} and {b} is shown: {facts}."


def _halves(cells: Sequence[StudyCell], compared: Sequence[tuple[str, int]], reference: str) -> list[str]:
    """Each compared start against the reference with twice the labels, where the study has those."""
    counts = {cell.labels for cell in cells if cell.start == reference}
    lines = []
    for start, labels in compared:
        if 2 * labels not in counts:
            continue
        of = estimate(difference(cells, start, reference, labels, labels_of_b=2 * labels))
        word = "reaches" if of.mean >= 0 else "stays below"
        interval = "" if of.low is None or of.high is None else f"95 % interval {of.low:+.3f} to {of.high:+.3f}; "
        lines.append(
            f"{start} with {_count(labels, 'label')} {word} the mean of {reference} with {2 * labels}: {of.mean:+.3f}"
            f" Dice ({interval}no test of that was made)."
        )
    return lines


def _scope(cells: Sequence[StudyCell], data: str) -> str:
    draws = len({cell.draw for cell in cells})
    seeds = len({cell.seed for cell in cells})
    subjects = len({case.subject for cell in cells for case in cell.cases})
    training = "1 pre-training a start, so of these networks only" if seeds == 1 else f"{seeds} pre-trainings a start"
    over = "labelled subjects" if seeds == 1 else "labelled subjects, other pre-trainings"
    return (
        f"Intervals and tests are over {_count(draws, 'draw')} of labelled subjects, {training}, and"
        f" {_count(subjects, 'test subject')}: they speak of other {over} and other test subjects of {data}, trained as"
        " the recorded choice says; not of other data, networks or budgets."
    )


def _row(
    cells: Sequence[StudyCell],
    start: str,
    reference: str,
    labels: int,
    choice: Mapping[str, Any],
    pretrainings: Sequence[StudyPretraining],
) -> StudyRow:
    minutes = [one.minutes for one in pretrainings if one.start == start]
    group = [cell for cell in cells if (cell.start, cell.labels) == (start, labels)]
    settings = choice["settings"][start][str(labels)]
    return StudyRow(
        start=start,
        labels=labels,
        scores={metric.name: estimate(box_of(cells, start, labels, metric.name)) for metric in METRICS},
        by_draw=tuple(float(x) for x in box_of(cells, start, labels).mean((1, 2))),
        gain=None if start == reference else estimate(difference(cells, start, reference, labels)),
        lr=float(settings["lr"]),
        steps=group[0].steps,
        minutes=float(np.mean([cell.seconds for cell in group])) / 60,
        pretraining_minutes=float(np.mean(minutes)) if minutes else 0.0,
        peak_gb=max(cell.peak_gb for cell in group),
    )


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
