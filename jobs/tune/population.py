"""Population based training (Jaderberg et al., 2017): who goes on from whose weights, and with which settings.

Pure functions of what is recorded. Ray's own scheduler keeps scores, choices and checkpoints in memory, draws from the
process's random numbers, and decides in the order of the reports: after a driver's death it would decide otherwise.
Here all members of a round are there before it is decided, and draws are keyed by the search's seed, the member and the
epoch. A test holds the choices to those of Ray's functions.
"""

import hashlib
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from jobs.configs.population import PopulationConfig
from jobs.configs.space import Dimension, same
from ssl_core.downstream.search import Takeover


@dataclass(frozen=True)
class Standing:
    """A member in a round.

    Attributes:
        number: Of the trial.
        score: After the round's epoch.
        settings: What its last epoch was trained with, by dotted path.
    """

    number: int
    score: float
    settings: Mapping[str, Any]


Explore: TypeAlias = Callable[[Standing, random.Random], dict[str, Any]]
"""Settings of a member that takes another over: from the other's standing and a source of draws."""


def draws_of(seed: int, number: int, epoch: int) -> random.Random:
    """Draws of a member in a round, the same whenever it is decided."""
    text = f"{seed} {number} {epoch} takeover"
    return random.Random(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"))


def worst_and_best(scores: Mapping[int, float], quantile: float) -> tuple[list[int], list[int]]:
    """The worst and the best members of a round, the worst first; as many of both, at most half.

    The sizes are those of Ray's scheduler: `ceil(members * quantile)`. Of equal members the earlier one is the better.

    Args:
        scores: By number of trial.
        quantile: Share of the members, above 0 and at most 0.5.
    """
    order = sorted(scores, key=lambda number: (scores[number], -number))
    size = math.ceil(len(order) * quantile)
    size = len(order) // 2 if size > len(order) / 2 else size
    return order[:size], order[len(order) - size :]


def takeovers(
    members: Sequence[Standing], epoch: int, *, quantile: float, seed: int, explore: Explore
) -> dict[int, Takeover]:
    """What a round decides: for each of the worst one of the best, drawn, and settings to go on with.

    Args:
        members: All that have reached the round.
        epoch: After which it is.
        quantile: See `worst_and_best`.
        seed: Of the search.
        explore: Makes settings from those of the one that is taken over.
    """
    by_number = {member.number: member for member in members}
    worst, best = worst_and_best({member.number: member.score for member in members}, quantile)
    decided = {}
    for number in worst:
        draws = draws_of(seed, number, epoch)
        source = by_number[draws.choice(best)]
        decided[number] = Takeover(epoch, source.number, explore(source, draws))
    return decided


def perturbed(dims: Sequence[Dimension], population: PopulationConfig) -> Explore:
    """PBT's way to explore: each setting is drawn again, or moved a little, as Ray's scheduler does it.

    Unlike there, a number stays in its range, which a setting may refuse to leave; one of `quniform` stays on its steps
    and moves by one at least.

    Args:
        dims: What may change.
        population: Probability and factors.
    """

    def explore(source: Standing, draws: random.Random) -> dict[str, Any]:
        new = dict(source.settings)
        for dim in dims:
            value = new[dim.path]
            again = draws.random() < population.resample
            if dim.is_list:
                new[dim.path] = draws.choice(dim.values) if again else _neighbour(dim, value, draws.choice((-1, 1)))
            elif again:
                new[dim.path] = drawn(dim, draws.random())
            else:
                new[dim.path] = _scaled(dim, value, draws.choice(population.factors))
        return new

    return explore


def drawn(dim: Dimension, share: float) -> float:
    """The value of a range at a share of its probability, 0 to 1."""
    if dim.kind == "loguniform":
        return _inside(dim, dim.low * (dim.high / dim.low) ** share)
    if dim.kind == "quniform":
        steps = round((dim.high - dim.low) / dim.step)
        return _inside(dim, dim.low + dim.step * min(steps, math.floor(share * (steps + 1))))
    return _inside(dim, dim.low + share * (dim.high - dim.low))


def _neighbour(dim: Dimension, value: Any, shift: int) -> Any:
    place = next(index for index, item in enumerate(dim.values) if same(item, value))
    return dim.values[min(max(place + shift, 0), len(dim.values) - 1)]


def _scaled(dim: Dimension, value: float, factor: float) -> float:
    if dim.kind == "quniform":
        place, aim = round((value - dim.low) / dim.step), round((value * factor - dim.low) / dim.step)
        if aim == place and factor != 1:
            aim = place + (1 if factor > 1 else -1)
        return _inside(dim, dim.low + dim.step * aim)
    return _inside(dim, value * factor)


def _inside(dim: Dimension, value: float) -> float:
    return min(max(value, dim.low), dim.high)
