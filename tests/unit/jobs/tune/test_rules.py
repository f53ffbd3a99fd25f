"""The rules that stop trials, beside those of Ray Tune."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule

from jobs.tune import rules

EPOCHS = 9


def curves(count: int) -> list[list[float]]:
    random = np.random.default_rng(4)
    return [sorted(random.uniform(0, 1, EPOCHS)) for _ in range(count)]


def by_ray(scheduler: Any, all_curves: list[list[float]]) -> list[int]:
    """Epochs of each trial, run one after another."""
    scheduler.set_search_properties("dice", "max")
    lengths = []
    for number, curve in enumerate(all_curves):
        trial: Any = SimpleNamespace(trial_id=str(number), config={}, __hash__=None)
        trial = type("T", (), {"trial_id": str(number), "config": {}, "status": "RUNNING"})()
        controller: Any = SimpleNamespace(get_live_trials=list)
        scheduler.on_trial_add(controller, trial)
        for epoch, dice in enumerate(curve, 1):
            result = {"epoch": epoch, "dice": dice}
            if epoch == EPOCHS:
                scheduler.on_trial_complete(controller, trial, result)
            elif scheduler.on_trial_result(controller, trial, result) == "STOP":
                break
        lengths.append(epoch)
    return lengths


def by_rule(rule: rules.Rule, levels: tuple[int, ...], all_curves: list[list[float]]) -> list[int]:
    lengths: list[int] = []
    for curve in all_curves:
        for epoch in levels:
            peers = [c[:n] for c, n in zip(all_curves, lengths, strict=False) if n >= epoch]
            if rule(curve[:epoch], peers, epoch):
                lengths.append(epoch)
                break
        else:
            lengths.append(EPOCHS)
    return lengths


@pytest.mark.parametrize(("grace", "reduction"), [(1, 3), (2, 2), (1, 2)])
def test_asha_stops_what_ray_stops(grace: int, reduction: int) -> None:
    every = curves(40)
    scheduler = AsyncHyperBandScheduler(time_attr="epoch", max_t=EPOCHS, grace_period=grace, reduction_factor=reduction)
    ours = by_rule(rules.asha(reduction), rules.rungs(grace, reduction, EPOCHS), every)
    assert ours == by_ray(scheduler, every)
    assert len(set(ours)) > 2


def test_the_median_rule_stops_what_ray_stops() -> None:
    every = curves(40)
    scheduler = MedianStoppingRule(time_attr="epoch", grace_period=2)
    ours = by_rule(rules.median(2), tuple(range(2, EPOCHS)), every)
    assert ours == by_ray(scheduler, every)
    assert len(set(ours)) > 2


def test_brackets_of_the_papers_example() -> None:
    """Li et al., 2018, table 1: 81 epochs, a third goes on; the sizes 81, 34, 15, 8, 5."""
    assert rules.brackets(143, 1, 3, 81) == ((81, 1), (34, 3), (15, 9), (8, 27), (5, 81))
    assert sum(size for size, _ in rules.brackets(10, 1, 3, 81)) == 10
    assert rules.survivors({0: 0.5, 1: 0.7, 2: 0.7, 3: 0.1}, 3) == {1}
