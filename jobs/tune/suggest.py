"""What a trial is to try: by Optuna, at random, or the next point of a grid.

Each suggestion is a function of the seed, its number and the trials that it may know. No sampler keeps a state that a
driver's death could lose.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jobs.configs.search import TuneConfig
from jobs.configs.space import ENCODER, Dimension, Settings
from jobs.tune.journal import FAILED, STOPPED, Entry

# Optuna is imported in functions: it takes a second, which a wrong configuration need not wait for.


@dataclass(frozen=True)
class Earlier:
    """A trial of another search.

    Attributes:
        settings: By dotted path.
        scores: By epoch, as far as they are on record.
        stopped: Whether it was stopped early.
        seconds: Of its training.
    """

    settings: Settings
    scores: tuple[float, ...]
    stopped: bool
    seconds: float = 0.0


class Suggestions:
    """Makes settings of trials; see `jobs.tune.state.Suggest`.

    Args:
        config: The search.
        earlier: Trials of other searches to start from.
    """

    def __init__(self, config: TuneConfig, earlier: Iterable[Earlier] = ()) -> None:
        self._config = config
        self._arms = [_of_arm(config.dimensions, encoders) for encoders in config.arms]
        self._earlier = [[item for item in earlier if fits(item.settings, dims)] for dims in self._arms]

    def __call__(self, position: int, arm: int, history: Sequence[Entry]) -> dict[str, Any]:
        """Settings of the trial at a position of an arm, by dotted path."""
        config, dims = self._config, self._arms[arm]
        if config.algorithm == "grid":
            return _grid_point(dims, position, _seed(config.seed, arm, -1))
        import optuna

        seed = _seed(config.seed, arm, position)
        samplers = optuna.samplers
        if config.algorithm == "random":
            sampler: Any = samplers.RandomSampler(seed=seed)
        else:
            # Our choice: Optuna's ten random trials would be all of a small search.
            first = min(10, max(2, config.trials // 3))
            sampler = samplers.TPESampler(seed=seed, n_startup_trials=first)
        study = study_of(config, dims, history, self._earlier[arm], sampler)
        if position < len(config.points):
            fixed = {path: _coded(dim, config.points[position][path]) for path, dim in _named(config, dims, position)}
            study.enqueue_trial(fixed)
        trial = study.ask(distributions(dims))
        return {dim.path: _decoded(dim, trial.params[dim.path]) for dim in dims}


def study_of(
    config: TuneConfig,
    dims: Sequence[Dimension],
    history: Iterable[Entry],
    earlier: Iterable[Earlier] = (),
    sampler: Any = None,
) -> Any:
    """Optuna's study of ended trials: those stopped early count as pruned, failed ones as failed.

    Args:
        config: The search.
        dims: What settings are drawn from.
        history: Trials of this search.
        earlier: Trials of others, before them.
        sampler: Optuna's; its default where the study is only looked at.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    two = len(config.objectives) > 1
    directions: list[Any] = ["maximize", "minimize"]
    study = optuna.create_study(directions=directions[: 1 + two], sampler=sampler)
    spread = distributions(dims)
    states = optuna.trial.TrialState
    rows = [(item.settings, item.scores, states.PRUNED if item.stopped else None, item.seconds) for item in earlier]
    of_status = {STOPPED: states.PRUNED, FAILED: states.FAIL}
    rows += [(e.settings, tuple(e.scores), of_status.get(e.status), e.seconds) for e in history]
    for settings, scores, state, seconds in rows:
        state = state or states.COMPLETE
        if (two and state == states.PRUNED) or (state != states.FAIL and not scores):
            continue
        values = None
        if state == states.COMPLETE:
            values = [scores[-1], seconds][: 1 + two]
        study.add_trial(
            optuna.trial.create_trial(
                params={dim.path: _coded(dim, settings[dim.path]) for dim in dims},
                distributions=spread,
                values=values,
                intermediate_values={} if two else dict(enumerate(scores, 1)),
                state=state,
            )
        )
    return study


def distributions(dims: Iterable[Dimension]) -> dict[str, Any]:
    """Optuna's, by dotted path; the values of a list as JSON texts, since Optuna takes no lists as choices."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    spread: dict[str, Any] = {}
    for dim in dims:
        if dim.is_list:
            spread[dim.path] = CategoricalDistribution([json.dumps(value) for value in dim.values])
        elif dim.kind == "randint":
            spread[dim.path] = IntDistribution(int(dim.low), int(dim.high))
        else:
            spread[dim.path] = FloatDistribution(dim.low, dim.high, log=dim.kind == "loguniform", step=dim.step or None)
    return spread


def fits(settings: Settings, dims: Iterable[Dimension]) -> bool:
    """Whether a trial of another search could have been one of this space."""
    return all(dim.path in settings and dim.holds(settings[dim.path]) for dim in dims)


def _of_arm(dims: Sequence[Dimension], encoders: tuple[str, ...]) -> tuple[Dimension, ...]:
    return tuple(Dimension(ENCODER, "choice", values=encoders) if dim.path == ENCODER else dim for dim in dims)


def _named(config: TuneConfig, dims: Sequence[Dimension], position: int) -> list[tuple[str, Dimension]]:
    """Settings that a point gives; an encoder of another arm is left out, and drawn from this one."""
    point = config.points[position]
    return [(dim.path, dim) for dim in dims if dim.path in point and dim.holds(point[dim.path])]


def _grid_point(dims: Sequence[Dimension], position: int, seed: int) -> dict[str, Any]:
    """A point of the grid, in an order drawn from the seed.

    In the order of the file rates would rise from trial to trial, and asha, which goes by those before, stop none.
    """
    sizes = [len(dim.values) for dim in dims]
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(math.prod(sizes))
    places = np.unravel_index(order[position], sizes)
    return {dim.path: dim.values[int(place)] for dim, place in zip(dims, places, strict=True)}


def _coded(dim: Dimension, value: Any) -> Any:
    return json.dumps(value) if dim.is_list else value


def _decoded(dim: Dimension, value: Any) -> Any:
    return json.loads(value) if dim.is_list else value


def _seed(seed: int, arm: int, position: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {arm} {position}".encode()).digest()[:4], "big")
