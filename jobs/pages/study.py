"""The report of a study: one page that needs nothing else, and the same in Markdown."""

from collections.abc import Sequence

from jobs.pages import study_charts as charts
from jobs.pages.html import Picture, page
from ssl_core.downstream.inference import DrawTest, Estimate
from ssl_core.downstream.scores import METRICS, Metric
from ssl_core.downstream.study import StudyResult, StudyRow

Table = tuple[tuple[str, ...], Sequence[tuple[str, ...]]]


def scores_table(result: StudyResult) -> Table:
    """Metrics with their intervals by start and count."""
    tolerance = float(result.choice["study"]["nsd_tolerance_mm"])
    head = ("labels", "start", *(metric.heading(tolerance) for metric in METRICS))
    rows = [
        (str(row.labels), row.start, *(_interval(row.scores[metric.name], metric) for metric in METRICS))
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
            test.b,
            _difference(test),
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


def cases_table(result: StudyResult, most: int = 8) -> Table:
    """Cases of the same draw in which a start and the reference differ most."""
    head = ("labels", "start", "draw", "case", "label", "Dice", f"Dice of {result.reference}", "difference")
    reference = {
        (cell.labels, cell.draw, case.volume_id, case.label): case.scores.dice
        for cell in result.cells
        if cell.start == result.reference
        for case in cell.cases
    }
    pairs = [
        (cell, case, reference[cell.labels, cell.draw, case.volume_id, case.label])
        for cell in result.cells
        if cell.start != result.reference and cell.seed == 0
        for case in cell.cases
    ]
    pairs.sort(key=lambda pair: -abs(pair[1].scores.dice - pair[2]))
    rows = [
        (
            str(cell.labels),
            cell.start,
            str(cell.draw),
            case.volume_id,
            case.label,
            f"{case.scores.dice:.3f}",
            f"{other:.3f}",
            f"{case.scores.dice - other:+.3f}",
        )
        for cell, case, other in pairs[:most]
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
        "Mean, and 95 % interval over draws, pre-trainings and test subjects.",
        _markdown(scores_table(result)),
        "## Tests",
        _markdown(tests_table(result.tests)),
        "p over draws is of the exact sign-flip test, p crossed of draws, pre-trainings and subjects together; the"
        " larger of the two is corrected by Holm.",
        "## Cost",
        _markdown(cost_table(result)),
        "## Settings",
        f"Recorded before the test was opened, digest {result.choice['digest']}.",
        _markdown(settings_table(result)),
        edges(result),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def html(result: StudyResult, command: str, config: str) -> str:
    """The whole page: one file that needs no script and no request.

    Args:
        result: The study.
        command: What repeats it.
        config: Its configuration, as YAML.
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
            charts.differences(result), "Difference of each draw, the mean (diamond) and its 95 % interval."
        ),
        ranks=Picture(
            charts.ranks(result),
            "Average rank over draws, 1 the best. Nemenyi's test over draws at 5 % does not tell apart what a bar"
            " joins.",
        ),
        curves=Picture(charts.curves(result), "Dice on further subjects while fine-tuning, mean over draws and seeds."),
        scores=scores_table(result),
        tests=_without(tests_table(result.tests), "by draw"),  # which the chart shows
        cost=cost_table(result),
        settings=settings_table(result),
        cases=cases_table(result),
        edges=edges(result),
    )


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


def _difference(test: DrawTest) -> str:
    if test.low is None or test.high is None:
        return f"{test.difference:+.3f}"
    return f"{test.difference:+.3f} ({test.low:+.3f} to {test.high:+.3f})"


def _gain(row: StudyRow, reference: StudyRow) -> str:
    extra = row.minutes + row.pretraining_minutes - reference.minutes
    if row is reference or extra <= 0:
        return "-"
    return f"{(row.scores['dice'].mean - reference.scores['dice'].mean) / extra:+.4f}"


def _markdown(table: Table) -> str:
    head, rows = table
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
