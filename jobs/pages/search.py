"""The page of a search: what its trials were, how they learned, where they were stopped, and what matters.

What the page says and in which order is in `search.html.j2`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from jobs.pages.charts import COLOURS, INK, chart
from jobs.pages.html import Picture, page
from ssl_core.downstream.search import SearchResult, Trial, lineage

_SCORES = "viridis"
_BRIGHTEST = 0.88  # its yellow cannot be seen on white
_MOST_ROWS = 200  # of the table; the figures have every trial


def setting_paths(trials: Sequence[Trial]) -> list[str]:
    """Dotted path of every setting that some trial has, in the order of the first one that has it."""
    return list(dict.fromkeys(path for trial in trials for path in trial.settings))


def setting_heading(path: str) -> str:
    """A short name of a setting for a table."""
    return path.removeprefix("finetune.").replace("encoder_lr_scale", "encoder lr ×")


def setting_text(value: Any) -> str:
    """A value of a setting for a table."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return value if isinstance(value, str) else json.dumps(value)


def curves_figure(result: SearchResult) -> bytes:
    """PNG of every learning curve; a cross where a trial was stopped, a triangle after a takeover, the best in bold."""
    drawing, axis = plt.subplots(figsize=(7.2, 3.4))
    for trial in result.trials:
        if not trial.scores:
            continue
        is_best = trial.trial == result.best_trial
        colour = COLOURS[1] if is_best else COLOURS[0] if trial.arm == 0 else COLOURS[2]
        epochs = range(1, len(trial.scores) + 1)
        width, alpha, order = (2.4, 1.0, 3) if is_best else (0.9, 0.6, 2)
        axis.plot(epochs, trial.scores, color=colour, lw=width, alpha=alpha, zorder=order, marker="o", ms=2)
        for takeover in trial.takeovers:
            axis.axvline(takeover.epoch + 0.5, color=INK, lw=0.4, alpha=0.3, zorder=1)
            if takeover.epoch < len(trial.scores):
                place = (takeover.epoch + 1, trial.scores[takeover.epoch])
                axis.plot(*place, marker="^", ms=5, color=colour, zorder=4)
        if trial.stopped_early:
            axis.plot(len(trial.scores), trial.scores[-1], marker="x", ms=7, mew=1.6, color=INK, zorder=4)
        elif trial.error is not None:
            axis.plot(len(trial.scores), trial.scores[-1], marker="s", ms=6, mfc="none", color="#b03a2e", zorder=4)
    axis.set_xlabel("epoch")
    axis.set_ylabel("inner Dice")
    axis.set_xlim(0.7, result.epochs + 0.3)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len({trial.arm for trial in result.trials}) > 1:
        kinds = (("chosen", COLOURS[1]), ("pre-trained start", COLOURS[0]), ("random weights", COLOURS[2]))
        handles = [Line2D([], [], color=colour, label=name) for name, colour in kinds]
        axis.legend(handles=handles, frameon=False, fontsize=8)
    return chart(drawing, [axis])


def parallel_figure(trials: Sequence[Trial]) -> bytes:
    """PNG of parallel coordinates: an axis for each setting and one for the last Dice, a line a trial."""
    rows = [trial for trial in trials if trial.scores]
    paths = [path for path in setting_paths(rows) if len({_key(t.settings.get(path)) for t in rows}) > 1]
    columns = [_places([t.settings.get(path) for t in rows]) for path in paths]
    last = [float(t.scores[-1]) for t in rows]
    columns.append(_places(last))
    names = [*map(setting_heading, paths), "inner Dice, last"]
    drawing, axis = plt.subplots(figsize=(max(7.2, 1.5 * len(names)), 3.6))
    colours = colormaps[_SCORES](_BRIGHTEST * np.asarray(_places(last)[0]))
    for number in np.argsort(last):
        heights = [places[number] for places, _ in columns]
        style = "--" if rows[number].stopped_early else "-"
        axis.plot(range(len(names)), heights, color=colours[number], ls=style, alpha=0.85, lw=1.3)
    for x, (_, ticks) in enumerate(columns):
        axis.axvline(x, color=INK, lw=0.8, zorder=0)
        for height, text in ticks:
            axis.annotate(
                text,
                (x, height),
                (4, 0),
                textcoords="offset points",
                fontsize=7,
                va="center",
                color=INK,
                bbox={"fc": "white", "ec": "none", "pad": 1, "alpha": 0.85},
            )
    axis.set_xticks(range(len(names)), names, fontsize=8)
    axis.set_yticks([])
    axis.set_xlim(-0.2, len(names) - 0.3)
    return chart(drawing, [axis], grid="x")


def importance_figure(importance: Mapping[str, float]) -> bytes:
    """PNG of bars: the share of the differences in Dice that each setting explains."""
    names = list(importance)[::-1]
    drawing, axis = plt.subplots(figsize=(7.2, 0.6 + 0.4 * len(names)))
    axis.barh(list(map(setting_heading, names)), [importance[name] for name in names], color=COLOURS[0], height=0.6)
    axis.set_xlabel("share of the differences in Dice")
    axis.set_xlim(0, 1)
    return chart(drawing, [axis], grid="x")


def front_figure(result: SearchResult) -> bytes:
    """PNG of Dice against seconds of the complete trials; those of the front are joined."""
    drawing, axis = plt.subplots(figsize=(7.2, 3.2))
    complete = [t for t in result.trials if t.scores and t.error is None and not t.stopped_early]
    axis.scatter([t.seconds for t in complete], [t.scores[-1] for t in complete], s=18, color=COLOURS[0])
    by_number = {t.trial: t for t in complete}
    front = [by_number[number] for number in result.front]
    axis.plot([t.seconds for t in front], [t.scores[-1] for t in front], color=COLOURS[1], marker="o", ms=5)
    for trial in front:
        place = (trial.seconds, trial.scores[-1])
        axis.annotate(str(trial.trial), place, (4, -9), textcoords="offset points", fontsize=8)
    axis.set_xlabel("seconds of training")
    axis.set_ylabel("inner Dice, last epoch")
    return chart(drawing, [axis])


def render(result: SearchResult, *, name: str, best_yaml: str, config_yaml: str, facts: Mapping[str, Any]) -> str:
    """The whole page.

    Args:
        result: The search.
        name: Of the search.
        best_yaml: The best configuration as a file that `tomoscale finetune` takes.
        config_yaml: The search's own.
        facts: Further numbers by what they are.
    """
    trials = result.trials
    paths = setting_paths(trials)
    with_scores = [trial for trial in trials if trial.scores]
    stops = "Each line is a trial. A cross: stopped early. A square: failed. Bold: the chosen one."
    lines = "Each line is a trial, brighter for a higher Dice; dashed: stopped early."
    takeovers = sum(len(trial.takeovers) for trial in trials)
    if takeovers:
        stops += " A triangle: the first epoch with weights that it took over from another."
        lines += " Settings are those that a trial began with."
    shown_rows = sorted(trials, key=_rank)[:_MOST_ROWS]
    return page(
        "search.html.j2",
        name=name,
        result=result,
        cards=_cards(result, facts),
        curves=Picture(curves_figure(result), stops) if with_scores else None,
        parallel=Picture(parallel_figure(trials), lines) if len(with_scores) > 1 else None,
        importance=Picture(importance_figure(result.importance), "By fANOVA over the complete trials.")
        if result.importance
        else None,
        front=Picture(front_figure(result), "Complete trials; numbered: no other is better in both.")
        if result.front
        else None,
        draws=_draws(result),
        takeovers=takeovers,
        schedule=_schedule(result) if takeovers else None,
        arms=[trial for trial in trials if trial.trial in result.best_by_arm],
        failed=[(trial.trial, trial.error) for trial in trials if trial.error is not None],
        table={
            "head": ("trial", *map(setting_heading, paths), "epochs", "inner Dice, last", "ended"),
            "rows": [_row(trial, paths, result.epochs) for trial in shown_rows],
        },
        left_out=len(trials) - len(shown_rows),
        best_yaml=best_yaml,
        config_yaml=config_yaml,
    )


def _cards(result: SearchResult, facts: Mapping[str, Any]) -> dict[str, Any]:
    spent, whole = sum(t.epochs_spent for t in result.trials), result.epochs * len(result.trials)
    best = next((t for t in result.trials if t.trial == result.best_trial), None)
    return {
        "trials": len(result.trials),
        "best inner Dice": f"{best.scores[-1]:.3f}" if best else "-",
        "stopped early": sum(t.stopped_early for t in result.trials),
        "failed": sum(t.error is not None for t in result.trials),
        "epochs of those of whole trials": f"{100 * spent / whole:.0f} %" if whole else "-",
        "minutes": f"{result.seconds / 60:.1f}",
        **facts,
    }


def _draws(result: SearchResult) -> dict[str, Any] | None:
    """Test Dice by draw, of both sides of a confirmation."""
    if (confirmation := result.confirmation) is None:
        return None
    best, reference = confirmation.best, confirmation.reference
    pairs = zip(confirmation.draws, best.by_draw, reference.by_draw, strict=True)
    return {
        "head": ("draw of labelled subjects", best.name, reference.name, "difference"),
        "rows": [(draw, f"{a:.3f}", f"{b:.3f}", f"{a - b:+.3f}") for draw, a, b in pairs],
    }


def _schedule(result: SearchResult) -> dict[str, Any]:
    """Which settings the weights of the best had in which epochs, and in which trial."""
    members = [next(t for t in result.trials if t.trial == number) for number in range(len(result.trials))]
    whole = lineage(members, result.best_trial, result.epochs)
    ends = [*(stretch.first - 1 for stretch in whole[1:]), result.epochs]
    values = [stretch.settings for stretch in whole]
    paths = [path for path in values[0] if any(one[path] != values[0][path] for one in values)]
    rows = [
        (f"{s.first} to {end}", s.trial, *(setting_text(s.settings[path]) for path in paths))
        for s, end in zip(whole, ends, strict=True)
    ]
    return {"head": ("epochs", "in trial", *map(setting_heading, paths)), "rows": rows}


def _row(trial: Trial, paths: Sequence[str], epochs: int) -> tuple[str | int, ...]:
    return (
        trial.trial,
        *(setting_text(trial.settings.get(path)) for path in paths),
        f"{len(trial.scores)} of {epochs}",
        "-" if trial.last is None else f"{trial.last:.3f}",
        "failed" if trial.error is not None else trial.why or "complete",
    )


def _rank(trial: Trial) -> tuple[bool, bool, float]:
    return trial.error is not None, trial.stopped_early, -(trial.last if trial.last is not None else -math.inf)


def _key(value: Any) -> str:
    return json.dumps(value)


def _places(values: Sequence[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    """Heights 0 to 1 of values on an axis, and its ticks; numbers over several tens on a logarithmic one."""
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) < len(values):
        names = sorted({_key(value) for value in values})
        step = 1 / max(1, len(names) - 1)
        return [names.index(_key(v)) * step for v in values], [(i * step, _short(n)) for i, n in enumerate(names)]
    low, high = min(numbers), max(numbers)
    scale = math.log10 if low > 0 and high / low > 30 else float
    width = scale(high) - scale(low)
    heights = [(scale(v) - scale(low)) / width if width else 0.5 for v in numbers]
    return heights, [(0.0, f"{low:.3g}"), (1.0, f"{high:.3g}")] if width else [(0.5, f"{low:.3g}")]


def _short(text: str) -> str:
    plain = text.strip('"')
    return plain if len(plain) <= 24 else f"…{plain[-23:]}"
