"""`tomoscale bench stopping`: what early stopping would have saved of a search that stopped nothing, and cost.

Curves of the whole search are real; which trials begin when and which are stopped is played again by the state of a
search, for many orders of the same trials. A trial's curve depends on its settings and seed alone, so that the one that
is stopped is a beginning of the whole one.
"""

import heapq
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.bench.measure import read_result
from jobs.configs.search import TuneConfig
from jobs.configs.space import ENCODER
from jobs.output import table
from jobs.tune.outcome import best_of
from jobs.tune.state import Search
from jobs.tune.suggest import Suggestions
from ssl_core.config import parse, resolved
from storage.errors import ConfigError

SCHEDULERS = ("asha", "halving", "hyperband", "median")
WITHIN = 0.005
"""Dice that may be lost to the best of all trials."""
_WANTED = "a search whose trials all ran to their end, over a grid, `scheduler: none`, no `compare_scratch`"


@dataclass(frozen=True)
class Curve:
    """Scores of a trial by epoch, and seconds of its whole training."""

    scores: Sequence[float]
    seconds: float


def curves_of(config: TuneConfig, result: Mapping[str, Any], place: str) -> dict[str, Curve]:
    """The curve of each point of a grid.

    Raises:
        ConfigError: the search stopped trials, or is another one than the configuration's.
    """
    trials = result["trials"]
    epochs = config.finetune.epochs
    whole = [trial for trial in trials if len(trial["scores"]) == epochs and not trial["error"]]
    if config.algorithm != "grid" or config.scheduler != "none" or len(config.arms) > 1 or config.total != len(whole):
        found = f"{len(whole)} of {len(trials)} trials with {epochs} epochs, {config.algorithm}, {config.scheduler}"
        raise ConfigError(place, expected=_WANTED, found=found, remedy="give that search's own configuration")
    return {_key(config, trial["settings"]): Curve(trial["scores"], trial["seconds"]) for trial in whole}


def replay(config: TuneConfig, curves: Mapping[str, Curve]) -> tuple[float, float]:
    """One search again.

    Args:
        config: With its scheduler, trials at a time, and the seed that orders the grid.
        curves: Of every point.

    Returns:
        Share of all epochs that was trained, and by how much the best that was found is below the best of all.
    """
    search = Search(config, config.concurrent or config.total, Suggestions(config))
    epochs = config.finetune.epochs
    running: list[tuple[float, int, int]] = []
    now = 0.0
    while True:
        while (entry := search.next()) is not None:
            curve = _of(config, curves, entry.settings)
            heapq.heappush(running, (now + curve.seconds / epochs, entry.number, entry.base + 1))
        if not running:
            break
        now, number, epoch = heapq.heappop(running)
        curve = _of(config, curves, search.entries[number].settings)
        score, each_s = curve.scores[epoch - 1], curve.seconds / epochs
        if not search.reported(number, epoch, {}, score, each_s * epoch):
            continue
        if epoch == epochs:
            search.ended(number)
        else:
            heapq.heappush(running, (now + each_s, number, epoch + 1))
    best = best_of(search.trials())
    assert best is not None, "no trial came to a result"
    spent = sum(entry.epochs_spent for entry in search.entries)
    greatest = max(curve.scores[-1] for curve in curves.values())
    return spent / (config.total * epochs), greatest - best.scores[-1]


def bench_stopping(config: TuneConfig, result: Path, *, orders: int = 200) -> dict[str, Any]:
    """Every scheduler on the curves of one search.

    Args:
        config: Of that search.
        result: Its `result.json`.
        orders: Orders of its trials, by seed from 0.

    Returns:
        JSON-able: the curves, and for each scheduler and number of trials at a time the share of epochs and the Dice
        lost in each order.

    Raises:
        ConfigError: see `curves_of`.
    """
    curves = curves_of(config, read_result(result, "trials"), str(result))
    rows = []
    for scheduler in SCHEDULERS:
        for concurrent in sorted({1, min(4, config.total), config.total}):
            changes = {"scheduler": scheduler, "concurrent": concurrent, "deterministic": False}
            played = [
                replay(parse(TuneConfig, resolved(config) | changes | {"seed": seed}), curves) for seed in range(orders)
            ]
            shares, lost = zip(*played, strict=True)
            rows.append({"scheduler": scheduler, "concurrent": concurrent, "shares": shares, "lost": lost})
    return {
        "config": resolved(config),
        "curves": [{"settings": json.loads(key), "scores": list(curve.scores)} for key, curve in curves.items()],
        "rows": rows,
    }


def format_stopping(result: dict[str, Any]) -> str:
    """The result for a person."""
    header = (
        "scheduler",
        "at a time",
        "epochs of all",
        "least to most",
        "Dice lost, mean",
        f"lost {WITHIN} or less in",
    )
    rows = []
    for row in result["rows"]:
        shares, lost = row["shares"], row["lost"]
        within = sum(value <= WITHIN for value in lost) / len(lost)
        rows.append(
            (
                row["scheduler"],
                row["concurrent"],
                f"{100 * statistics.fmean(shares):.0f} %",
                f"{100 * min(shares):.0f} to {100 * max(shares):.0f} %",
                f"{statistics.fmean(lost):.4f}",
                f"{100 * within:.0f} % of {len(lost)} orders",
            )
        )
    return table(header, rows)


def _key(config: TuneConfig, settings: Mapping[str, Any]) -> str:
    """Names a point; not by the only encoder, which a result names by its version and a configuration by an alias."""
    own = {path: value for path, value in settings.items() if path != ENCODER or len(config.encoders) > 1}
    return json.dumps(own, sort_keys=True)


def _of(config: TuneConfig, curves: Mapping[str, Curve], settings: Mapping[str, Any]) -> Curve:
    key = _key(config, settings)
    if key not in curves:
        remedy = "give that search's own configuration, with versions where it has several encoders"
        raise ConfigError("search", expected="its settings", found=key, remedy=remedy)
    return curves[key]
