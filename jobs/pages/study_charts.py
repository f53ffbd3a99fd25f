"""Charts of a study: label efficiency, differences by draw, ranks with a critical difference, learning curves."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jobs.pages.charts import COLOURS, INK, chart
from ssl_core.downstream.inference import Estimate
from ssl_core.downstream.study import Ranks, StudyResult

_MORE = ("#b0406a", "#3f8f8f", "#8c7a2f", "#6b7280", "#4653b5", "#a85a2a", "#2f8f5f", "#7a3f3f")
_EVERY = (*COLOURS, *_MORE)


def colours(starts: Sequence[str]) -> dict[str, str]:
    """A colour for each start, the same in every chart."""
    return {start: _EVERY[number % len(_EVERY)] for number, start in enumerate(starts)}


def dash(number: int) -> Literal["-", "--"]:
    """Line of a start that has the colour of an earlier one, or not."""
    return "-" if number < len(_EVERY) else "--"


def starts_of(result: StudyResult) -> list[str]:
    """Starts in the order of the rows."""
    return list(dict.fromkeys(row.start for row in result.rows))


def efficiency(result: StudyResult) -> bytes:
    """PNG of Dice by count of labels, by start where there is one count: mean, 95 % interval, a dot for each draw."""
    starts = starts_of(result)
    colour, counts = colours(starts), sorted({row.labels for row in result.rows})
    if len(counts) == 1:
        return _by_start(result, colour)
    drawing, axis = plt.subplots(figsize=(8.4, 4.2))
    for number, start in enumerate(starts):
        rows = [row for row in result.rows if row.start == start]
        # Side by side: equal counts would lie on one another.
        x = np.arange(len(counts)) + 0.5 * ((number + 0.5) / len(starts) - 0.5)
        means = [row.scores["dice"].mean for row in rows]
        axis.plot(x, means, color=colour[start], ls=dash(number), lw=1.6, marker="o", ms=4.5, label=start, zorder=3)
        for at, row in zip(x, rows, strict=True):
            axis.scatter([at] * len(row.by_draw), row.by_draw, s=10, color=colour[start], alpha=0.45, lw=0, zorder=2)
            dice = row.scores["dice"]
            if dice.low is not None and dice.high is not None:
                axis.plot([at, at], [max(0, dice.low), min(1, dice.high)], color=colour[start], lw=1, zorder=2)
    axis.set_xticks(range(len(counts)), [str(count) for count in counts])
    axis.set_xlabel("labelled subjects")
    axis.set_ylabel("Dice on test subjects")
    return chart(drawing, [axis], top=_legend(drawing, axis))


def differences(result: StudyResult) -> bytes:
    """PNG of each start against the reference: a dot for each draw, the mean and its 95 % interval."""
    base = {row.labels: row.by_draw for row in result.rows if row.start == result.reference}
    halves = [test for test in result.tests if test.labels_of_b is not None]
    tested = {(test.a, test.labels) for test in result.tests if test not in halves}
    colour = colours(starts_of(result))
    rows = [(row, row.gain) for row in result.rows if row.gain is not None]
    height = len(rows) + len(halves)
    drawing, axis = plt.subplots(figsize=(8.4, 1.2 + 0.3 * height))
    names = []
    for row, gain in rows:
        by_draw = [a - b for a, b in zip(row.by_draw, base[row.labels], strict=True)]
        face = INK if (row.start, row.labels) in tested else "white"
        names.append(f"{row.start}, {row.labels} label{'s' if row.labels > 1 else ''}")
        _line(axis, height - len(names), by_draw, gain, colour[row.start], face)
    for test in halves:
        mean = Estimate(test.difference, test.low, test.high)
        names.append(f"{test.a}, {test.labels}, against {test.labels_of_b} labels")
        _line(axis, height - len(names), test.by_draw, mean, colour[test.a], INK)
    axis.axvline(0, color="#9aa3af", lw=1)
    axis.set_yticks(range(height), names[::-1])
    axis.set_ylim(-0.6, height - 0.4)  # or the outermost lie on the frame
    axis.set_xlabel(f"Dice minus that of {result.reference}")
    return chart(drawing, [axis], grid="x")


def ranks(result: StudyResult) -> bytes:
    """PNG of average ranks over draws at each count; starts under one bar are not told apart by Nemenyi's test."""
    panels = result.ranks
    starts = starts_of(result)
    height = 1.0 + 0.22 * len(starts)
    drawing, axes = plt.subplots(len(panels), 1, figsize=(8.4, height * len(panels)), squeeze=False)
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        _ranks(axis, panel, colours(starts))
    return chart(drawing, [], grid="x")


def curves(result: StudyResult) -> bytes:
    """PNG of the curves of fine-tuning at each count, mean over draws and seeds: Dice on further subjects."""
    starts, counts = starts_of(result), sorted({row.labels for row in result.rows})
    colour = colours(starts)
    columns = min(len(counts), 3)
    lines = -(-len(counts) // columns)
    drawing, axes = plt.subplots(lines, columns, figsize=(8.4, 2.6 * lines), squeeze=False, sharey=True)
    for axis in axes.flat[len(counts) :]:
        axis.set_axis_off()
    for axis, labels in zip(axes.flat[: len(counts)], counts, strict=True):
        for number, start in enumerate(starts):
            group = [cell for cell in result.cells if (cell.start, cell.labels) == (start, labels)]
            dice = np.mean([[point["inner_dice"] for point in cell.history] for cell in group], axis=0)
            steps = group[0].steps * (np.arange(len(dice)) + 1) / len(dice)
            axis.plot(steps, dice, color=colour[start], ls=dash(number), lw=1.6, marker="o", ms=2.5, label=start)
        axis.set_title(f"{labels} label{'s' if labels > 1 else ''}", fontsize=10, color=INK)
        axis.set_xlabel("optimizer step")
    axes[0, 0].set_ylabel("Dice, further subjects")
    return chart(drawing, list(axes.flat[: len(counts)]), top=_legend(drawing, axes[0, 0]))


def _by_start(result: StudyResult, colour: Mapping[str, str]) -> bytes:
    """Where there is one count: a line a start, in their order."""
    drawing, axis = plt.subplots(figsize=(8.4, 1.2 + 0.3 * len(result.rows)))
    for y, row in enumerate(reversed(result.rows)):
        _line(axis, y, row.by_draw, row.scores["dice"], colour[row.start], INK)
    axis.set_yticks(range(len(result.rows)), [row.start for row in reversed(result.rows)])
    axis.set_ylim(-0.6, len(result.rows) - 0.4)
    labels = result.rows[0].labels
    axis.set_xlabel(f"Dice on test subjects, {labels} labelled subject{'s' if labels > 1 else ''}")
    return chart(drawing, [axis], grid="x")


def _line(axis: Axes, y: int, by_draw: Sequence[float], value: Estimate, colour: str, face: str) -> None:
    axis.scatter(by_draw, [y] * len(by_draw), s=16, color=colour, alpha=0.6, lw=0, zorder=2)
    if value.low is not None and value.high is not None:
        axis.plot([value.low, value.high], [y, y], color=INK, lw=1.4, zorder=3)
    axis.plot([value.mean], [y], marker="D", ms=5, mec=INK, mfc=face, zorder=4)


def _ranks(axis: Axes, panel: Ranks, colour: Mapping[str, str]) -> None:
    """One critical-difference diagram."""
    order = sorted(panel.ranks, key=lambda start: panel.ranks[start])
    for number, start in enumerate(order):
        rank, y = panel.ranks[start], -1.5 - number
        axis.plot([rank, rank, len(order) + 0.35], [0, y, y], color=colour[start], lw=1.2)
        axis.text(len(order) + 0.4, y, f"{start}  {rank:.2f}", va="center", fontsize=9, color=INK)
    if panel.critical is not None:
        for level, (first, last) in enumerate(cliques([panel.ranks[start] for start in order], panel.critical)):
            axis.plot([first - 0.03, last + 0.03], [-0.35 - 0.3 * level] * 2, color=INK, lw=2.6, solid_capstyle="round")
        axis.plot([1, 1 + panel.critical], [0.75, 0.75], color=INK, lw=1.4, marker="|")
        axis.text(1, 0.95, f"critical difference {panel.critical:.2f}", fontsize=8.5, color=INK, va="bottom")
    axis.set_title(f"{panel.labels} label{'s' if panel.labels > 1 else ''}", fontsize=10, color=INK, loc="right")
    axis.set_xlim(0.8, len(order) + 2.2)
    axis.set_ylim(-2.1 - len(order), 1.8)
    axis.spines[["left", "bottom", "right", "top"]].set_visible(False)
    axis.axhline(0, xmin=0, xmax=(len(order) - 0.6) / (len(order) + 1.4), color="#9aa3af", lw=1)
    axis.set_xticks(range(1, len(order) + 1))
    axis.tick_params(axis="x", length=0, labelsize=8)
    axis.set_yticks([])


def cliques(values: Sequence[float], critical: float) -> list[tuple[float, float]]:
    """Longest runs of ascending ranks that lie within a critical difference, of two or more.

    Args:
        values: Ascending.
        critical: Largest difference within a run.
    """
    runs: list[tuple[int, int]] = []
    for first in range(len(values)):
        last = max(i for i in range(first, len(values)) if values[i] - values[first] <= critical)
        if last > first and not any(a <= first and last <= b for a, b in runs):
            runs.append((first, last))
    return [(values[a], values[b]) for a, b in runs]


def _legend(drawing: Figure, axis: Axes) -> float:
    """Above the axes, which it must not cover, on a figure grown by it; returns where the axes end, of the height."""
    handles, names = axis.get_legend_handles_labels()
    columns = min(len(names), 5)
    width, height = drawing.get_size_inches()
    grown = height + 0.1 + 0.2 * -(-len(names) // columns)
    drawing.set_size_inches(width, grown)
    drawing.legend(handles, names, frameon=False, fontsize=8.5, ncols=columns, loc="upper center")
    return float(height / grown)
