"""PB2's model of gains, beside scikit-learn with Ray's kernel, and what it chooses."""

import itertools
import random
from typing import Any

import numpy as np
import pytest
from ray.tune.schedulers.pb2_utils import TV_SquaredExp
from sklearn.gaussian_process import GaussianProcessRegressor

from jobs.configs.space import Dimension
from jobs.tune import pb2
from jobs.tune.population import Standing, draws_of
from jobs.tune.state import Search
from jobs.tune.suggest import Suggestions
from storage.errors import ConfigError
from tests.kit.searches import play, search_config, searched

LR = Dimension("finetune.lr", "loguniform", 1e-5, 1e-1)
SHARE = Dimension("finetune.class_balance", "uniform", 0.0, 1.0)
SPACE = {"finetune.lr": {"loguniform": [1e-5, 5e-2]}, "finetune.class_balance": {"uniform": [0.1, 0.9]}}


def observed(count: int) -> tuple[Any, Any, Any]:
    source = np.random.default_rng(1)
    x = np.hstack((source.integers(0, 5, (count, 1)), source.uniform(0, 1, (count, 3))))
    at = np.hstack((np.full((7, 1), 5.0), source.uniform(0, 1, (7, 3))))
    return x, np.sin(4 * x[:, 2]) + 0.1 * source.normal(size=count), at


@pytest.mark.parametrize(("length", "forgetting", "noise"), [(0.5, 0.1, 0.1), (2.0, 0.4, 0.01)])
def test_the_model_is_that_of_scikit_learn_with_rays_kernel(length: float, forgetting: float, noise: float) -> None:
    x, y, at = observed(20)
    kernel = pb2.Kernel(1.3, length, forgetting, noise)
    theirs = TV_SquaredExp(variance=1.3, lengthscale=length, epsilon=forgetting)
    model = GaussianProcessRegressor(kernel=theirs, optimizer=None, alpha=noise).fit(x, y)
    mean, deviation = pb2.posterior(kernel, x, y, at)
    expected_mean, expected_deviation = model.predict(at, return_std=True)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-7)
    np.testing.assert_allclose(deviation, expected_deviation, rtol=1e-6)
    assert pb2.log_likelihood(kernel, x, y) == pytest.approx(model.log_marginal_likelihood_value_)


def test_the_fit_is_likelier_than_any_of_many_kernels() -> None:
    x, y, _ = observed(25)
    best = pb2.log_likelihood(pb2.fitted(x, y), x, y)
    source = np.random.default_rng(0)
    low, high = np.log(np.array(pb2._BOUNDS)).T
    others = [pb2.log_likelihood(pb2.Kernel(*np.exp(source.uniform(low, high))), x, y) for _ in range(300)]
    assert best >= max(others) - 1e-3


def gain_of(lr: float) -> float:
    return 0.2 - 0.05 * abs(np.log10(lr) + 3)


def gains(turns: int, members: int = 6) -> list[pb2.Gain]:
    source = random.Random(0)
    rows = []
    for turn in range(turns):
        for _ in range(members):
            lr, share = pb2.value_at(LR, source.random()), source.random()
            rows.append(pb2.Gain(turn, 0.1 * turn, {LR.path: lr, SHARE.path: share}, gain_of(lr)))
    return rows


def test_settings_that_gain_most_are_chosen_and_others_of_a_round_keep_apart() -> None:
    explore = pb2.modelled((LR, SHARE), gains(5), 5)
    source = Standing(0, 0.5, {LR.path: 1e-5, SHARE.path: 0.5, "encoder": "e"})
    chosen = [explore(source, draws_of(0, number, 10)) for number in range(4)]
    assert gain_of(chosen[0][LR.path]) > 0.15
    assert all(settings["encoder"] == "e" for settings in chosen)
    distances = [
        abs(a[SHARE.path] - b[SHARE.path]) + abs(np.log(a[LR.path] / b[LR.path])) for a, b in itertools.pairwise(chosen)
    ]
    assert min(distances) > 0.05
    again = pb2.modelled((LR, SHARE), gains(5), 5)
    assert [again(source, draws_of(0, number, 10)) for number in range(4)] == chosen


def test_what_was_long_ago_counts_less() -> None:
    """Early rounds say that large rates gain, late ones that small ones do."""
    rows = []
    for turn in range(8):
        for share in (0.1, 0.3, 0.5, 0.7, 0.9):
            value = share if turn < 4 else 1 - share
            rows.append(pb2.Gain(turn, 0.5, {SHARE.path: share}, value))
    explore = pb2.modelled((SHARE,), rows, 8)
    assert explore(Standing(0, 0.5, {SHARE.path: 0.9}), draws_of(0, 0, 8))[SHARE.path] < 0.4


def test_gains_that_are_all_equal_choose_something_of_the_space() -> None:
    rows = [pb2.Gain(0, 0.0, {SHARE.path: 0.5}, 0.0)] * 3
    value = pb2.modelled((SHARE,), rows, 1)(Standing(0, 0.0, {SHARE.path: 0.5}), draws_of(0, 0, 1))[SHARE.path]
    assert 0 <= value <= 1


def test_values_lie_in_the_space_and_on_its_steps() -> None:
    steps = Dimension("finetune.class_balance", "quniform", 0.1, 0.9, 0.2)
    for dim in (LR, SHARE, steps):
        for share in (0.0, 0.31, 0.5, 1.0):
            assert dim.holds(pb2.value_at(dim, share))
    assert pb2.value_at(steps, 0.31) == pytest.approx(0.3)


def test_gains_are_counted_from_the_weights_that_were_taken_over() -> None:
    config = search_config(
        scheduler="pb2", space=SPACE, trials=4, finetune={"epochs": 6}, population={"interval": 2, "quantile": 0.5}
    )
    search = Search(config, 4, Suggestions(config))
    play(search, 0)
    taker = next(entry for entry in search.entries if entry.takeovers)
    first = taker.takeovers[0]
    gain = search._gain(taker, first.epoch, first.epoch + 2)
    assert gain.before == search.entries[first.source].scores[first.epoch - 1]
    assert gain.gain == pytest.approx(taker.scores[first.epoch + 1] - gain.before)
    assert gain.settings == first.settings
    assert search._gain(taker, 0, 2).before == 0.0
    assert all(dim.holds(t.settings[dim.path]) for e in search.entries for t in e.takeovers for dim in config.changing)
    assert search._gain(taker, 0, 2).settings == taker.settings


def test_lists_stay_as_they_are_and_settings_of_pbt_are_refused() -> None:
    space = SPACE | {"finetune.encoder_lr_scale": {"choice": [0.1, 1.0]}}
    config = search_config(scheduler="pb2", space=space)
    assert [dim.path for dim in config.changing] == list(SPACE)
    search = searched(config)
    assert any(entry.takeovers for entry in search.entries)
    with pytest.raises(ConfigError, match="give a range, or take pbt"):
        search_config(scheduler="pb2", space=space, population={"change": ["finetune.encoder_lr_scale"]})
    with pytest.raises(ConfigError, match=r"no population.resample or factors with scheduler pb2"):
        search_config(scheduler="pb2", space=space, population={"resample": 0.5})
