"""Which settings each start is tested with: the best of the grid on validation draws, by the same search for all."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jobs.configs.study import StudyConfig
from jobs.study.cells import Cells
from jobs.study.prepare import FREE
from jobs.study.work import score
from ssl_core.config import resolved
from ssl_core.downstream.inference import Power, power_of

Grid = dict[tuple[float, int], list[float]]
"""Validation Dice of each draw by learning rate and steps."""


def choose(cells: Cells, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What is recorded before the test is opened: settings by start and count, what will be tested, and the power.

    Args:
        cells: Of the study.
        results: Of the search, by key.
    """
    config, grids = cells.config, grids_of(cells, results)
    best = {key: best_of(grid) for key, grid in grids.items()}
    settings: dict[str, dict[str, Any]] = {}
    for start in config.starts:
        for labels in config.labels:
            at = config.nearest_searched(labels)
            lr, steps = best[start, at]
            whole = config.settings(start, lr, steps)
            settings.setdefault(start, {})[str(labels)] = {
                "lr": lr,
                "steps": steps,
                "whole_steps": whole.epochs * whole.steps_per_epoch,
                "searched_at": at,
                "validation_dice": float(np.mean(grids[start, at][lr, steps])),
                "at_the_edge": edges(grids[start, at], lr, steps),
            }
    return {
        "study": {key: value for key, value in resolved(config).items() if key not in FREE},
        "data": config.data,
        "simulated": cells.data.simulated,
        "fingerprint": cells.data.fingerprint,
        "settings": settings,
        "grids": {
            f"{start}, {labels} labels": [[lr, steps, scores] for (lr, steps), scores in grid.items()]
            for (start, labels), grid in grids.items()
        },
        "compared": [list(pair) for pair in config.compared],
        # Not there without any, or a choice that was recorded before there were halves would be another one.
        **({"halved": [list(pair) for pair in config.halved]} if config.halved else {}),
        "power": vars(_power(config, grids, best)),
    }


def grids_of(cells: Cells, results: Mapping[str, Mapping[str, Any]]) -> dict[tuple[str, int], Grid]:
    """Validation scores of the search by start and count."""
    config, grids = cells.config, dict[tuple[str, int], Grid]()
    steps_of = {
        (start, config.settings(start, 1.0, steps, points=1).steps_per_epoch): steps
        for start, steps in itertools.product(config.starts, config.search.steps)
    }
    for cell in cells.search():
        finetune = cell.spec["finetune"]
        point = finetune["lr"], steps_of[cell.start, finetune["steps_per_epoch"]]
        grid = grids.setdefault((cell.start, cell.labels), {})
        grid.setdefault(point, []).append(score(results[cell.key]))
    return grids


def validation_table(cells: Cells, results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines of a Markdown table: each start's settings with their scores, and what they gain on the reference's best.

    Numbers to choose by, not to claim with: settings were picked on these draws.
    """
    grids = grids_of(cells, results)
    lines = ["| labels | start | lr | steps | validation Dice | by draw | difference by draw |", "|---" * 7 + "|"]
    for (start, labels), grid in sorted(grids.items(), key=lambda item: item[0][1]):
        against = grids[cells.config.reference, labels]
        base = against[best_of(against)]
        for (lr, steps), scores in grid.items():
            row = f"| {labels} | {start} | {lr:g} | {steps} | {np.mean(scores):.3f} | "
            row += " ".join(f"{score:.3f}" for score in scores)
            if start == cells.config.reference:
                lines.append(f"{row} | {'the best' if scores is base else ''} |")
                continue
            gains = [a - b for a, b in zip(scores, base, strict=True)]
            lines.append(f"{row} | {np.mean(gains):+.3f}: {' '.join(f'{gain:+.3f}' for gain in gains)} |")
    return lines


def best_of(grid: Grid) -> tuple[float, int]:
    """Learning rate and steps with the best mean; of equal ones the shorter, then the lower rate."""
    return max(grid, key=lambda point: (float(np.mean(grid[point])), -point[1], -point[0]))


def edges(grid: Grid, lr: float, steps: int) -> list[str]:
    """Which of the values lie at an end of what was tried, where a further one might be better."""
    rates, lengths = ({point[i] for point in grid} for i in (0, 1))
    lines = []
    if len(rates) > 1 and lr in (min(rates), max(rates)):
        lines.append("lr")
    if len(lengths) > 1 and steps == max(lengths):
        lines.append("steps")
    return lines


def beyond(cells: Cells, results: Mapping[str, Mapping[str, Any]]) -> dict[tuple[str, int], float]:
    """The next learning rate of each start and count whose best one lies at an end, a step of that end further."""
    further = {}
    for key, grid in grids_of(cells, results).items():
        lr, steps = best_of(grid)
        if "lr" in edges(grid, lr, steps):
            nearest = min({rate for rate, _ in grid} - {lr}, key=lambda rate: abs(math.log(rate / lr)))
            further[key] = float(f"{lr * lr / nearest:.3g}")
    return further


def _power(config: StudyConfig, grids: Mapping[tuple[str, int], Grid], best: Mapping[Any, tuple[float, int]]) -> Power:
    """From the differences of validation draws where there are three or more, else from the assumption."""
    spreads = []
    sides = [((start, labels), (config.reference, labels)) for start, labels in config.compared]
    sides += [((start, labels), (config.reference, 2 * labels)) for start, labels in config.halved]
    for pair in sides:
        keys = [(name, config.nearest_searched(labels)) for name, labels in pair]
        a, b = (np.array(grids[key][best[key]]) for key in keys)
        if len(a) > 2:
            spreads.append(float(np.var(a - b, ddof=1)))
    sd = math.sqrt(float(np.mean(spreads))) if spreads else 0.0
    return power_of(config.draws, config.comparisons, sd or config.sd, is_pilot=sd > 0)
