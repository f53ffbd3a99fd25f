"""When a trial is stopped: pure functions of the scores by epoch.

Ray's schedulers keep what they know in their own memory, in the order of the reports. These decide from records, so
that a search that goes on after a death, and one whose reports come in another order, decides alike. A test holds them
to Ray's own decisions.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from jobs.configs.search import TuneConfig

Curve: TypeAlias = Sequence[float]
"""Scores of a trial, the first epoch's first."""
Rule: TypeAlias = Callable[[Curve, Sequence[Curve], int], bool]
"""Whether a trial stops after an epoch: its curve, those of its peers that reached the epoch, the epoch from 1."""
_FEWEST_PEERS = 3  # Ray's value for the median rule


def rungs(grace: int, reduction: int, epochs: int) -> tuple[int, ...]:
    """Epochs after which trials are compared: `grace * reduction ** k`, those before the last epoch."""
    levels = []
    rung = grace
    while rung < epochs:
        levels.append(rung)
        rung *= reduction
    return tuple(levels)


def levels(config: TuneConfig) -> tuple[int, ...]:
    """Epochs after which a search compares its trials."""
    epochs, grace = config.finetune.epochs, config.grace_epochs
    if config.scheduler == "none":
        return ()
    if config.scheduler == "median":
        return tuple(range(grace, epochs))
    if config.is_population:
        return tuple(range(config.population.interval, epochs, config.population.interval))
    return rungs(grace, config.reduction, epochs)


def asha(reduction: int) -> Rule:
    """Asynchronous successive halving (Li et al., 2020), with the cut-off of Ray's ASHA.

    A trial goes on where its score is not below the (1 - 1/reduction) quantile of its peers at the rung.
    """

    def stops(curve: Curve, peers: Sequence[Curve], epoch: int) -> bool:
        if not peers:
            return False
        cutoff = np.percentile([peer[epoch - 1] for peer in peers], (1 - 1 / reduction) * 100)
        return bool(curve[epoch - 1] < cutoff)

    return stops


def median(grace: int) -> Rule:
    """The median rule of Google Vizier (Golovin et al., 2017), as Ray's: at least three peers.

    A trial stops where its best score so far is below the median of its peers' means from `grace` to this epoch.
    """

    def stops(curve: Curve, peers: Sequence[Curve], epoch: int) -> bool:
        if epoch < grace or len(peers) < _FEWEST_PEERS:
            return False
        means = [np.mean(peer[grace - 1 : epoch]) for peer in peers]
        return bool(max(curve[:epoch]) < np.median(means))

    return stops


def survivors(scores: dict[int, float], reduction: int) -> set[int]:
    """Of the trials at a rung the best `1/reduction`, at least one; the earlier one where two are equal.

    Args:
        scores: Score at the rung by number of trial.
        reduction: One in this many goes on.
    """
    order = sorted(scores, key=lambda number: (-scores[number], number))
    return set(order[: max(1, len(order) // reduction)])


def brackets(trials: int, grace: int, reduction: int, epochs: int) -> tuple[tuple[int, int], ...]:
    """Brackets of HyperBand (Li et al., 2018) as (trials, first rung), the most impatient first.

    The budget is a number of trials here, dealt out in the ratio of the bracket sizes of the paper.

    Args:
        trials: In all.
        grace: First rung of the most impatient bracket.
        reduction: One in this many goes on.
        epochs: Of a whole trial.
    """
    deepest = len(rungs(grace, reduction, epochs))
    sizes = [math.ceil((deepest + 1) / (s + 1) * reduction**s) for s in range(deepest, -1, -1)]
    shares = np.array(sizes) / sum(sizes) * trials
    counts = np.floor(shares).astype(int)
    for index in np.argsort(-(shares - counts), kind="stable")[: trials - int(counts.sum())]:
        counts[index] += 1
    starts = [grace * reduction ** (deepest - s) for s in range(deepest, -1, -1)]
    return tuple((int(count), start) for count, start in zip(counts, starts, strict=True) if count)
