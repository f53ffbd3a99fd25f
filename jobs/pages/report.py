"""The demo's report: one HTML file that needs nothing else, and the same facts as a table in the terminal.

What the page says and in which order is in `report.html.j2`.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import pyplot as plt

from jobs.output import table
from jobs.pages.charts import COLOURS, INK, chart
from jobs.pages.html import Picture, page
from jobs.pages.search import setting_heading, setting_paths, setting_text
from jobs.pages.summary import CurvePoint, DemoSummary
from ssl_core.downstream.comparison import Training, subject_dice
from ssl_core.downstream.scores import METRICS
from ssl_core.downstream.search import SearchResult, Trial


def loss_figure(points: Sequence[CurvePoint]) -> bytes:
    """PNG of the loss terms over steps; `points` are journal items [step, ms, metrics]."""
    names = sorted({k for _, _, m in points for k in m if k == "loss" or k.startswith("loss/")})
    if len(names) == 2:  # a single term is the loss itself
        names = ["loss"]
    drawing, axis = plt.subplots(figsize=(7.2, 2.9))
    for number, name in enumerate(names):
        xy = [(s, m[name]) for s, _, m in points if name in m]
        label = "total" if name == "loss" else name.removeprefix("loss/")
        axis.plot(*zip(*xy, strict=True), color=COLOURS[number % len(COLOURS)], label=label, lw=1.8, marker="o", ms=2.5)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("loss")
    if len(names) > 1:
        axis.legend(frameon=False)
    return chart(drawing, [axis])


def dice_figure(trainings: Sequence[Training]) -> bytes:
    """PNG of Dice per test subject, mean over labels: a column of dots for each seed of a start, and a bar at its mean.

    Grey lines join the means of one seed, so that starts whose order depends on the seed show it.
    """
    starts = list(dict.fromkeys(training.start for training in trainings))
    seeds = list(dict.fromkeys(training.seed for training in trainings))
    step = min(0.16, 0.7 / len(seeds))
    jitter = np.random.default_rng(0)
    drawing, axis = plt.subplots(figsize=(7.2, 3.2))
    means: dict[int, list[tuple[float, float]]] = {}
    for training in trainings:
        number = starts.index(training.start)
        x = number + 1 + step * (seeds.index(training.seed) - (len(seeds) - 1) / 2)
        dice = np.array(list(subject_dice([training], training.start).values()))
        spread = jitter.uniform(-0.3 * step, 0.3 * step, len(dice))
        axis.scatter(x + spread, dice, s=13, color=COLOURS[number % len(COLOURS)], alpha=0.7, zorder=2, lw=0)
        axis.plot([x - 0.4 * step, x + 0.4 * step], [dice.mean()] * 2, color=INK, lw=1.8, zorder=4)
        means.setdefault(training.seed, []).append((x, float(dice.mean())))
    for points in means.values():
        axis.plot(*zip(*points, strict=True), color="#9aa3af", lw=0.7, alpha=0.7, zorder=1)
    axis.set_xticks(range(1, len(starts) + 1), starts)
    axis.set_ylabel("Dice of a test subject\n(mean of labels)")
    return chart(drawing, [axis])


def render(summary: DemoSummary, pictures: Mapping[str, bytes], captions: Mapping[str, str]) -> str:
    """The whole page.

    Args:
        summary: The run.
        pictures: PNGs by name: `views`, and previews named `preview-*`.
        captions: Captions by the same names.
    """
    shots = {name: Picture(png, captions.get(name, "")) for name, png in pictures.items()}
    comparison, paths = summary.finetune, setting_paths(summary.search.trials)
    dice = (
        "Each dot is a held-out subject in one training, each column of dots a seed, each bar its mean; grey lines join"
        " the same seed."
    )
    return page(
        "report.html.j2",
        summary=summary,
        caution=_caution(summary.search),
        dice=Picture(dice_figure(comparison.trainings), dice),
        loss=Picture(loss_figure(summary.pretrain.points), "Loss by step."),
        previews=[picture for name, picture in shots.items() if name.startswith("preview")],
        views=shots.get("views"),
        scores={
            "head": (
                "start",
                "label",
                *(metric.heading(comparison.nsd_tolerance_mm) for metric in METRICS),
                "cases × seeds",
            ),
            "rows": [
                (
                    row.start,
                    row.label,
                    *(f"{m.text(row.mean.of(m))} ± {m.text(row.sd.of(m))}" for m in METRICS),
                    f"{row.cases} × {row.seeds}",
                )
                for row in comparison.rows
            ],
        },
        trials={
            "head": ("trial", *map(setting_heading, paths), "epochs", "inner Dice, last epoch"),
            "rows": [_trial_cells(trial, paths, summary.search.epochs) for trial in summary.search.trials],
        },
        seconds=[(stage, f"{seconds:.1f}") for stage, seconds in summary.timings.items()],
    )


def text(summary: DemoSummary) -> str:
    """The same facts for a terminal."""
    comparison, search = summary.finetune, summary.search
    scores = [
        (row.start, row.label, *(value for m in METRICS for value in (row.mean.of(m), row.sd.of(m))))
        for row in comparison.rows
    ]
    headings = [metric.heading(comparison.nsd_tolerance_mm) for metric in METRICS]
    paths = [path for path in setting_paths(search.trials) if path != "encoder"]
    trials = [
        (t.trial, *(t.settings.get(path) for path in paths), len(t.scores), t.stopped_early, t.last, t.status)
        for t in search.trials
    ]
    head = ("trial", *map(setting_heading, paths), "epochs", "stopped early", "inner Dice, last", "ended")
    return "\n\n".join(
        [
            table(head, trials),
            table(("start", "label", *(word for heading in headings for word in (heading, "sd"))), scores),
            "\n".join(line for line in (comparison.statement, _caution(search)) if line),
            table(("stage", "seconds"), [(stage, round(seconds, 1)) for stage, seconds in summary.timings.items()]),
        ]
    )


def _trial_cells(trial: Trial, paths: Sequence[str], epochs: int) -> tuple[str | int, ...]:
    ended = trial.status if trial.error is not None or trial.last is None else f"{trial.last:.3f}"
    return (
        trial.trial,
        *(setting_text(trial.settings.get(path)) for path in paths),
        f"{len(trial.scores)} of {epochs}" + (" (stopped early)" if trial.stopped_early else ""),
        ended,
    )


def _caution(search: SearchResult) -> str:
    """What the reader of a comparison should know of a search in which one side took no part."""
    if any(trial.encoder == "none" for trial in search.trials):
        return ""
    return (
        "All starts got the settings that the search found for the encoder; random weights had no search of their own."
    )
