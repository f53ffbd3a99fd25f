"""Searches of simulated trials, one report at a time and in any order; no Ray."""

import math
import random
from collections.abc import Callable
from typing import Any

from jobs.configs.population import POPULATIONS
from jobs.configs.search import TuneConfig
from jobs.tune.state import Search
from jobs.tune.suggest import Suggestions
from ssl_core.config import parse
from ssl_core.downstream.search import SCHEDULE
from tests.kit.simulated_trials import curve

EPOCHS = 9


def search_config(**changes: Any) -> TuneConfig:
    """A search of two settings over simulated trials."""
    data = {
        "name": "s",
        "runs": "memory://searches",
        "encoders": ["models:/e/1"],
        "labelled": {"data": "memory://x"},
        "finetune": {"epochs": EPOCHS},
        "space": {"finetune.lr": {"loguniform": [1e-5, 5e-2]}, "finetune.batch": {"randint": [1, 8]}},
        "trials": 12,
    }
    if changes.get("scheduler") not in POPULATIONS:
        data["reduction"] = 3
    return parse(TuneConfig, data | changes)


def score(settings: dict[str, Any], epoch: int) -> float:
    """Dice of a trial after an epoch; with a schedule the sum of what each epoch gains by the rate that it has."""
    batch = settings.get("finetune.batch", 6)
    if SCHEDULE not in settings:
        return curve(settings["finetune.lr"], batch, epoch)
    return sum(curve(lr, batch, e) - curve(lr, batch, e - 1) for e, lr in enumerate(rates(settings, epoch), 1))


def rates(settings: dict[str, Any], epochs: int) -> tuple[float, ...]:
    """Rate of each epoch of a trial."""
    changes = {change["epoch"]: change["settings"] for change in settings.get(SCHEDULE, ())}
    rate, by_epoch = settings["finetune.lr"], []
    for epoch in range(1, epochs + 1):
        rate = changes.get(epoch, {}).get("lr", rate)
        by_epoch.append(rate)
    return tuple(by_epoch)


def play(
    search: Search, seed: int, *, most: int | None = None, score_of: Callable[[dict[str, Any], int], float] = score
) -> int:
    """Run trials one epoch at a time, the next one drawn from those that run; returns the epochs.

    Args:
        search: Its state.
        seed: Of the order in which trials report.
        most: Epochs after which its driver dies.
        score_of: Dice of settings after an epoch; an error of it fails the trial.
    """
    order, running, epochs = random.Random(seed), {}, 0
    whole = search.epochs
    while not search.is_over():
        while (entry := search.next()) is not None:
            running[entry.number] = entry.base if entry.takeovers else 0
        assert running, f"nothing runs: {[(e.number, e.status) for e in search.entries]}"
        number = order.choice(sorted(running))
        epoch = running[number] = running[number] + 1
        epochs += 1
        try:
            dice = score_of(search.settings_of(search.entries[number]), epoch)
        except ArithmeticError as error:
            search.ended(number, str(error))
            del running[number]
            continue
        goes_on = search.reported(number, epoch, {"inner_dice": dice}, dice, float(epoch))
        if goes_on and epoch == whole:
            search.ended(number)
        if not goes_on or epoch == whole:
            del running[number]
        if epochs == most:
            break
    return epochs


def searched(config: TuneConfig, seed: int = 0, concurrent: int = 4, **options: Any) -> Search:
    """A search that was played to its end."""
    search = Search(config, concurrent, Suggestions(config), **options)
    play(search, seed)
    assert all(math.isfinite(value) for entry in search.entries for value in entry.scores)
    return search
