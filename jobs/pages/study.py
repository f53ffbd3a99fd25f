"""The report of a study: one page that needs nothing else, and the same in Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass

from jobs.pages import study_charts as charts
from jobs.pages.html import Picture, page
from jobs.pages.pictures import ComparedSlice, comparison_picture
from ssl_core.downstream.inference import DrawTest, Estimate
from ssl_core.downstream.scores import METRICS, CaseScore, Metric
from ssl_core.downstream.study import StudyCell, StudyResult, StudyRow

Table = tuple[tuple[str, ...], Sequence[tuple[str, ...]]]
UNTESTED = "Of the differences from the reference only the comparisons are tested; the others have intervals alone."
_LEAST_EXTRA = 0.1
"""Share of the reference's minutes that a start takes beyond them before a gain is divided by it; less is noise."""


def scores_table(result: StudyResult) -> Table:
    """Metrics with their intervals by start and count, and Dice against the reference."""
    tolerance = float(result.choice["study"]["nsd_tolerance_mm"])
    dice, *others = METRICS
    head = ("labels", "start", "Dice", "against the reference", *(metric.heading(tolerance) for metric in others))
    rows = [
        (
            str(row.labels),
            row.start,
            _interval(row.scores[dice.name], dice),
            "-" if row.gain is None else _signed(row.gain.mean, row.gain.low, row.gain.high),
            *(_interval(row.scores[metric.name], metric) for metric in others),
        )
        for row in result.rows
    ]
    return head, rows


def tests_table(tests: Sequence[DrawTest]) -> Table:
    """Each comparison: difference, interval, p values."""
    head = ("labels", "start", "against", "difference in Dice", "by draw", "p, draws", "p, crossed", "p, corrected")
    rows = [
        (
            str(test.labels),
            test.a,
            test.b if test.labels_of_b is None else f"{test.b}, {test.labels_of_b} labels",
            _signed(test.difference, test.low, test.high),
            " ".join(f"{x:+.3f}" for x in test.by_draw),
            f"{test.p_draws:.2g}",
            f"{test.p_crossed:.2g}",
            f"{test.corrected:.2g}",
        )
        for test in tests
    ]
    return head, rows


def cost_table(result: StudyResult) -> Table:
    """Minutes and memory, and what of Dice they bring against the reference."""
    head = (
        "labels",
        "start",
        "pre-training (min)",
        "fine-tuning (min)",
        "GB at most",
        "Dice gained per extra minute",
    )
    reference = {row.labels: row for row in result.rows if row.start == result.reference}
    rows = [
        (
            str(row.labels),
            row.start,
            f"{row.pretraining_minutes:.1f}" if row.pretraining_minutes else "-",
            f"{row.minutes:.2f}",
            f"{row.peak_gb:.1f}",
            _gain(row, reference[row.labels]),
        )
        for row in result.rows
    ]
    return head, rows


def settings_table(result: StudyResult) -> Table:
    """The sealed choice."""
    head = ("labels", "start", "lr", "steps", "validation Dice", "at an end of the grid")
    rows = []
    for row in result.rows:
        choice = result.choice["settings"][row.start][str(row.labels)]
        rows.append(
            (
                str(row.labels),
                row.start,
                f"{row.lr:g}",
                str(row.steps),
                f"{choice['validation_dice']:.3f}",
                ", ".join(choice["at_the_edge"]) or "-",
            )
        )
    return head, rows


@dataclass(frozen=True)
class Contrast:
    """A case of a draw as a start and the reference segmented it.

    Attributes:
        cell: The start's training.
        reference: The reference's, on the same draw.
        dice: Dice of the reference.
        case: The start's scores.
    """

    cell: StudyCell
    reference: StudyCell
    dice: float
    case: CaseScore


def contrasts(result: StudyResult) -> list[Contrast]:
    """Cases of first seeds, those first in which a start and the reference differ most in Dice."""
    reference = {
        (cell.labels, cell.draw, case.volume_id, case.label): (cell, case.scores.dice)
        for cell in result.cells
        if cell.start == result.reference and cell.seed == 0
        for case in cell.cases
    }
    pairs = [
        Contrast(cell, *reference[cell.labels, cell.draw, case.volume_id, case.label], case)
        for cell in result.cells
        if cell.start != result.reference and cell.seed == 0
        for case in cell.cases
    ]
    return sorted(pairs, key=lambda pair: -abs(pair.case.scores.dice - pair.dice))


def cases_table(result: StudyResult, most: int = 8) -> Table:
    """Cases of the same draw in which a start and the reference differ most."""
    head = ("labels", "start", "draw", "case", "label", "Dice", f"Dice of {result.reference}", "difference")
    rows = [
        (
            str(pair.cell.labels),
            pair.cell.start,
            str(pair.cell.draw),
            pair.case.volume_id,
            pair.case.label,
            f"{pair.case.scores.dice:.3f}",
            f"{pair.dice:.3f}",
            f"{pair.case.scores.dice - pair.dice:+.3f}",
        )
        for pair in contrasts(result)[:most]
    ]
    return head, rows


def pictured(result: StudyResult, most: int = 4) -> list[Contrast]:
    """The contrasts that the page shows: the largest of each case, of those whose slices were kept."""
    first: dict[str, Contrast] = {}
    for pair in contrasts(result):
        name = pair.case.volume_id
        if name in pair.cell.slices and name in pair.reference.slices:
            first.setdefault(name, pair)
    return list(first.values())[:most]


def pretraining_table(result: StudyResult) -> Table:
    """Each pre-training: its time, first and last loss, and what probes said last."""
    probes = sorted({name for one in result.pretrainings for name in one.probes})
    titles = (name.removeprefix("probe/").replace("_", " ") for name in probes)
    head = ("start", "seed", "minutes", "first loss", "last loss", *titles)
    rows = [
        (
            one.start,
            str(one.seed),
            f"{one.minutes:.1f}",
            *((f"{one.losses[0][1]:.3g}", f"{one.losses[-1][1]:.3g}") if one.losses else ("-", "-")),
            *(f"{one.probes[name]:.3g}" if name in one.probes else "-" for name in probes),
        )
        for one in result.pretrainings
    ]
    return head, rows


def markdown(result: StudyResult, command: str) -> str:
    """The report in Markdown; its first line is the command that repeats it."""
    parts = [
        f"Repeat with: `{command}`",
        f"# Study {result.name}",
        "\n".join(f"- {line}" for line in result.conclusion),
        f"Power, stated before the test was opened: {result.power.statement}",
        "## Scores",
        f"Mean, and 95 % interval over draws, pre-trainings and test subjects. {UNTESTED}",
        _markdown(scores_table(result)),
        "## Tests",
        _markdown(tests_table(result.tests)),
        "p over draws is of the exact sign-flip test, p crossed of draws, pre-trainings and subjects together; the"
        " larger of the two is corrected by Holm.",
        "## Cost",
        _markdown(cost_table(result)),
        *(("## Pre-trainings", _markdown(pretraining_table(result))) if result.pretrainings else ()),
        "## Settings",
        f"Recorded before the test was opened, digest {result.choice['digest']}.",
        _markdown(settings_table(result)),
        edges(result),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def html(result: StudyResult, command: str, config: str, examples: Sequence[ComparedSlice] = ()) -> str:
    """The whole page: one file that needs no script and no request.

    Args:
        result: The study.
        command: What repeats it.
        config: Its configuration, as YAML.
        examples: Slices of the cases that differ most.
    """
    power = result.power
    headline = {
        "starts": str(len(charts.starts_of(result))),
        "draws of labelled subjects": str(power.draws),
        "tested trainings": str(len(result.cells)),
        "comparisons": str(power.comparisons),
        "significant": str(sum(test.significant for test in result.tests)),
    }
    return page(
        "study.html.j2",
        result=result,
        command=command,
        config=config,
        simulated=result.choice["simulated"],
        headline=headline,
        efficiency=Picture(
            charts.efficiency(result), "Dice by labelled subjects: a dot a draw, the mean and its 95 % interval."
        ),
        differences=Picture(
            charts.differences(result),
            "Difference of each draw, the mean (diamond) and its 95 % interval; an open diamond was not tested.",
        ),
        ranks=Picture(
            charts.ranks(result),
            "Average rank over draws, 1 the best. Nemenyi's test over draws at 5 % does not tell apart what a bar"
            " joins.",
        ),
        curves=Picture(charts.curves(result), "Dice on further subjects while fine-tuning, mean over draws and seeds."),
        scores=scores_table(result),
        untested=UNTESTED,
        tests=_without(tests_table(result.tests), "by draw"),  # which the chart shows
        cost=cost_table(result),
        settings=settings_table(result),
        cases=cases_table(result),
        examples=_examples(examples),
        pretrainings=pretraining_table(result),
        edges=edges(result),
    )


def _examples(examples: Sequence[ComparedSlice]) -> Picture | None:
    if not examples:
        return None
    caption = (
        "One slice of each of the cases that differ most, where the truth is largest. The dashed line is the truth; the"
        " patient's right is on the left."
    )
    return Picture(comparison_picture(examples), caption)


def edges(result: StudyResult) -> str:
    """Which settings lie at an end of the grid, in a sentence; empty where none does."""
    settings = result.choice["settings"]
    at_the_end = sorted({key for counts in settings.values() for one in counts.values() for key in one["at_the_edge"]})
    if not at_the_end:
        return ""
    return f"Some best {' and '.join(at_the_end)} lie at an end of what was tried: a wider search might find better."


def _without(table: Table, column: str) -> Table:
    """A table without one of its columns."""
    head, rows = table
    at = head.index(column)
    return head[:at] + head[at + 1 :], [row[:at] + row[at + 1 :] for row in rows]


def _interval(value: Estimate, metric: Metric) -> str:
    if value.low is None or value.high is None:
        return metric.text(value.mean)
    return f"{metric.text(value.mean)} ({metric.text(value.low)} to {metric.text(value.high)})"


def _signed(difference: float, low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return f"{difference:+.3f}"
    return f"{difference:+.3f} ({low:+.3f} to {high:+.3f})"


def _gain(row: StudyRow, reference: StudyRow) -> str:
    extra = row.minutes + row.pretraining_minutes - reference.minutes
    if row.gain is None or extra < _LEAST_EXTRA * reference.minutes:
        return "-"
    return f"{row.gain.mean / extra:+.4f}"


def _markdown(table: Table) -> str:
    head, rows = table
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
