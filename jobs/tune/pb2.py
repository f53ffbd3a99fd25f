"""PB2 (Parker-Holder et al., 2020): settings of who takes over come from a model of what settings gain, and when.

A Gaussian process over (round, score before, settings) predicts the gain in score until the next round. Its covariance
is a squared exponential times (1 - e)^(rounds between / 2) (Bogunovic et al., 2016): what settings gained long ago says
little of now. The settings with the largest upper confidence bound are taken; those that others of the round have taken
count as known in the bound's width, not in its mean (Desautels et al., 2014), so that not all take the same.

Ray's own asks the process's random numbers, knows nothing after a driver's death, and leaves the settings as they are
in the first round. Here the first gain is counted from 0, the Dice of weights that know nothing.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.configs.space import Dimension
from jobs.tune.population import Explore, Standing

Array = NDArray[np.float64]
_MOST_GAINS = 300  # newest ones that the model knows; our choice, as the fit takes their cube
_BOUNDS = ((0.1, 10.0), (0.02, 20.0), (1e-3, 0.5), (1e-3, 1.0))  # of `Kernel`'s numbers; our choice
_WIDE, _NEAR = 512, 3  # settings looked at over the whole space, and times that some near the best are; our choice


@dataclass(frozen=True)
class Gain:
    """What a member gained from a round to the next.

    Attributes:
        turn: The round that it went on from, from 0, the start.
        before: Its score there, of the weights that it went on from.
        settings: By dotted path.
        gain: Its score at the next round less that.
    """

    turn: int
    before: float
    settings: Mapping[str, Any]
    gain: float


@dataclass(frozen=True)
class Kernel:
    """Numbers of the covariance of standardised gains.

    Attributes:
        variance: Of gains over all settings.
        length: Squared distance in shares of the ranges at which covariance has fallen to 1/e.
        forgetting: e of the formula.
        noise: Variance of gains of equal settings.
    """

    variance: float = 1.0
    length: float = 0.5
    forgetting: float = 0.1
    noise: float = 0.1

    def between(self, one_NF: Array, other_MF: Array) -> Array:
        """Covariances, (N, M), without noise; of F features the first is the round."""
        apart = np.abs(one_NF[:, None, 0] - other_MF[None, :, 0])
        squares = ((one_NF[:, None, 1:] - other_MF[None, :, 1:]) ** 2).sum(-1)
        covariance: Array = self.variance * np.exp(-squares / self.length) * (1 - self.forgetting) ** (apart / 2)
        return covariance


def log_likelihood(kernel: Kernel, x_NF: Array, y_N: Array) -> float:
    """Log marginal likelihood of what was observed."""
    lower = np.linalg.cholesky(kernel.between(x_NF, x_NF) + kernel.noise * np.eye(len(x_NF)))
    scaled = np.linalg.solve(lower, y_N)
    return float(-0.5 * scaled @ scaled - np.log(np.diag(lower)).sum() - 0.5 * len(y_N) * math.log(2 * math.pi))


def fitted(x_NF: Array, y_N: Array) -> Kernel:
    """The kernel under which what was observed is most likely, within bounds."""
    from scipy.optimize import minimize  # a second to import

    def loss(logs: Array) -> float:
        return -log_likelihood(Kernel(*np.exp(logs)), x_NF, y_N)

    start = np.log(astuple(Kernel()))
    bounds = [(math.log(low), math.log(high)) for low, high in _BOUNDS]
    outcome = minimize(loss, start, method="L-BFGS-B", bounds=bounds)
    return Kernel(*(float(value) for value in np.exp(outcome.x)))


def posterior(kernel: Kernel, x_NF: Array, y_N: Array, at_MF: Array) -> tuple[Array, Array]:
    """Mean and standard deviation of gains, without noise, (M,) both."""
    lower = np.linalg.cholesky(kernel.between(x_NF, x_NF) + kernel.noise * np.eye(len(x_NF)))
    across = np.linalg.solve(lower, kernel.between(x_NF, at_MF))
    mean = across.T @ np.linalg.solve(lower, y_N)
    return mean, np.sqrt(np.maximum(kernel.variance - (across**2).sum(0), 0.0))


def modelled(dims: Sequence[Dimension], gains: Sequence[Gain], turn: int) -> Explore:
    """PB2's way to explore, for one round.

    Args:
        dims: What may change; ranges.
        gains: All that the arm has shown so far.
        turn: Of the round, from 1.
    """
    newest = sorted(gains, key=lambda gain: gain.turn)[-_MOST_GAINS:]
    x_NF = np.array([_features(dims, gain.turn, gain.before, gain.settings) for gain in newest])
    y_N = np.array([gain.gain for gain in newest])
    y_N = (y_N - y_N.mean()) / (y_N.std() or 1.0)
    kernel = fitted(x_NF, y_N)
    # Weights and constants of Bogunovic et al.'s experiments.
    width = math.sqrt(0.2 + max(0.0, math.log(0.4 * len(newest))))
    taken: list[Array] = []

    def explore(source: Standing, draws: random.Random) -> dict[str, Any]:
        def bounds(shares_MF: Array) -> Array:
            fixed = np.tile([float(turn), source.score], (len(shares_MF), 1))
            at_MF = np.hstack((fixed, shares_MF))
            mean, deviation = posterior(kernel, x_NF, y_N, at_MF)
            if taken:
                _, deviation = posterior(kernel, np.vstack((x_NF, *taken)), np.zeros(len(y_N) + len(taken)), at_MF)
            return mean + width * deviation

        shares = _largest(bounds, len(dims), draws)
        new = dict(source.settings) | {dim.path: value_at(dim, share) for dim, share in zip(dims, shares, strict=True)}
        taken.append(np.array([_features(dims, turn, source.score, new)]))
        return new

    return explore


def _largest(bounds: Any, count: int, draws: random.Random) -> list[float]:
    """Shares where a function is largest: of many over the whole space, then of many ever nearer to the best."""
    best = np.array([[draws.random() for _ in range(count)] for _ in range(_WIDE)])
    for step in range(_NEAR + 1):
        top = best[int(np.argmax(bounds(best)))]
        if step < _NEAR:
            spread = 0.1 / 4**step
            near = [[draws.gauss(float(share), spread) for share in top] for _ in range(_WIDE // 4)]
            best = np.clip(np.vstack((top, near)), 0.0, 1.0)
    return [float(share) for share in top]


def value_at(dim: Dimension, share: float) -> float:
    """The value of a range at a share of it, 0 to 1, in six digits: what follows them differs between machines."""
    if dim.kind == "loguniform":
        value = dim.low * (dim.high / dim.low) ** share
    elif dim.kind == "quniform":
        return dim.low + dim.step * round(share * (dim.high - dim.low) / dim.step)
    else:
        value = dim.low + share * (dim.high - dim.low)
    return min(max(float(f"{value:.6g}"), dim.low), dim.high)


def _features(dims: Sequence[Dimension], turn: int, before: float, settings: Mapping[str, Any]) -> list[float]:
    return [float(turn), before, *(_share(dim, float(settings[dim.path])) for dim in dims)]


def _share(dim: Dimension, value: float) -> float:
    if dim.kind == "loguniform":
        return math.log(value / dim.low) / math.log(dim.high / dim.low)
    return (value - dim.low) / (dim.high - dim.low)
