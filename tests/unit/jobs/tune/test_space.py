"""What a search may draw, checked key by key before a job is sent."""

from typing import Any

import pytest

from jobs.configs.search import TuneConfig
from jobs.configs.space import with_settings
from ssl_core.config import load, parse, resolved
from ssl_core.downstream.finetune import FinetuneConfig
from storage.errors import ConfigError

BASE = {"name": "s", "encoders": ["models:/e@candidate"], "labelled": {"data": "memory://x"}}


def config(space: dict[str, Any], **changes: Any) -> TuneConfig:
    return parse(TuneConfig, {**BASE, "space": space, **changes})


def test_any_setting_of_a_trial_is_searched_with_every_kind() -> None:
    space = {
        "finetune.lr": {"loguniform": [1e-4, 1e-2]},
        "finetune.weight_decay": {"uniform": [0, 0.1]},
        "finetune.class_balance": {"quniform": [0.1, 0.95, 0.2]},
        "finetune.batch": {"randint": [1, 8]},
        "finetune.patch_DHW": {"choice": [[16, 16, 16], [32, 32, 32]]},
    }
    dims = {dim.path: dim for dim in config(space).dimensions}
    assert list(dims) == ["encoder", *space]
    assert dims["finetune.class_balance"].high == pytest.approx(0.9), "the last step"
    assert dims["finetune.patch_DHW"].values == ([16, 16, 16], [32, 32, 32])
    settings = {"encoder": "none", "finetune.batch": 3, "finetune.patch_DHW": [16, 16, 16]}
    built = with_settings(FinetuneConfig(), settings)
    assert (built.batch, built.patch_DHW, built.lr) == (3, (16, 16, 16), FinetuneConfig().lr)


def test_the_encoder_is_named_in_the_space_or_beside_it() -> None:
    data = {key: value for key, value in BASE.items() if key != "encoders"}
    space = {"encoder": {"choice": ["models:/e@candidate", "none"]}, "finetune.lr": {"choice": [1e-3]}}
    searched = parse(TuneConfig, {**data, "space": space})
    assert searched.encoders == ("models:/e@candidate", "none")
    assert searched.dimensions[0].values == searched.encoders
    assert parse(TuneConfig, resolved(searched)) == searched, "the resolved form comes back equal"
    with pytest.raises(ConfigError, match="leave `encoders` out"):
        config(space)


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({"finetune.learning": {"uniform": [0, 1]}}, "unknown key 'finetune.learning'"),
        ({"finetune.lrr": {"uniform": [0, 1]}}, "did you mean finetune.lr"),
        ({"lr_scale": {"uniform": [0, 1]}}, "finetune.encoder_lr_scale"),
        ({"runs": {"choice": ["a", "b"]}}, "all trials of a search share it"),
        ({"name": {"choice": ["a", "b"]}}, "not a trial's own"),
        ({"labelled.subjects": {"choice": [2, 3]}}, "set labelled in the configuration itself"),
        ({"finetune.epochs": {"randint": [2, 9]}}, "its budget"),
        ({"finetune.lr": {"logunifrom": [1e-3, 1e-2]}}, "did you mean 'loguniform'"),
        ({"finetune.lr": [1e-3, 1e-2]}, "one of uniform"),
        ({"finetune.lr": {"uniform": [1e-3, 1e-2], "choice": [1]}}, "one of uniform"),
        ({"finetune.lr": {"loguniform": [0, 1e-2]}}, "above 0"),
        ({"finetune.lr": {"uniform": [1e-2, 1e-3]}}, "the lower first"),
        ({"finetune.lr": {"uniform": [1e-3]}}, "space: finetune.lr.uniform"),
        ({"finetune.lr": {"uniform": ["a", 1]}}, "space: finetune.lr.uniform"),
        ({"finetune.lr": {"choice": []}}, "at least one choice"),
        ({"finetune.lr": {"choice": [0.1, 0.1]}}, "0.1 twice"),
        ({"finetune.lr": {"choice": [0.1, -0.1]}}, "space: finetune.lr -0.1; expected greater than 0"),
        ({"finetune.class_balance": {"uniform": [0.5, 1.5]}}, "space: finetune.class_balance 1.5"),
        ({"finetune.batch": {"uniform": [1, 8]}}, "use randint"),
        ({"finetune.batch": {"randint": [0, 8]}}, "space: finetune.batch 0"),
        ({"finetune.batch": {"randint": [1, 8.5]}}, "whole numbers"),
        ({"finetune.flip": {"choice": [[0, 0], [0, 0, 0]]}}, "space: finetune.flip"),
        ({"finetune.intensity": {"choice": ["light", "lihgt"]}}, "space: finetune.intensity lihgt"),
        ({"finetune.class_balance": {"quniform": [0, 1, 2]}}, "in steps from the lowest"),
        ({"encoder": {"uniform": [0, 1]}}, "choice or grid"),
        ({"finetune.lr": {"grid": [1e-3, 1e-2]}}, "algorithm grid with finetune.lr"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused_with_its_key(space: dict[str, Any], words: str) -> None:
    data = {key: value for key, value in BASE.items() if key != "encoders" or "encoder" not in space}
    with pytest.raises(ConfigError) as caught:
        parse(TuneConfig, {**data, "space": space})
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scheduler": "bohb"}, "ray#46995"),
        ({"algorithm": "BOHB"}, "ray#46995"),
        ({"money": 3}, "price_per_hour with money"),
        ({"objectives": ["seconds"]}, "[dice] or [dice, seconds]"),
        ({"objectives": ["dice", "seconds"]}, "scheduler none with two objectives"),
        ({"deterministic": True, "hours": 1}, "time is another in every run"),
        ({"points": [{"finetune.lr": 1.0}]}, "a value that the space holds"),
        ({"points": [{"finetune.clip": 1.0}]}, "a setting of the space"),
        ({"algorithm": "random", "from_searches": ["a"]}, "algorithm tpe with from_searches"),
        ({"algorithm": "grid"}, "grid or choice for every setting"),
        ({"finetune": {"lr": 0.1}}, "draws from space.finetune.lr"),
        ({"encoders": ["none"]}, "at least one model URI"),
    ],
)
def test_modes_that_do_not_go_together_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config({"finetune.lr": {"loguniform": [1e-4, 1e-2]}}, **changes)
    assert words in str(caught.value)


def test_a_grid_has_as_many_trials_as_points() -> None:
    space = {"finetune.lr": {"grid": [1e-4, 1e-3]}, "finetune.batch": {"choice": [2, 4, 8]}}
    assert config(space, algorithm="grid").trials == 6
    assert config(space, algorithm="grid", encoders=["models:/e/1", "none"]).trials == 12
    with pytest.raises(ConfigError, match=r"trials \(7\) to be the points of the grid \(6\)"):
        config(space, algorithm="grid", trials=7)
    for encoders in (["models:/e/1", "none"], ["models:/e/1", "models:/e/2"]):
        with pytest.raises(ConfigError, match="one encoder with algorithm grid and compare_scratch, not 2"):
            config(space, algorithm="grid", encoders=encoders, compare_scratch=True)
    assert config(space, algorithm="grid", compare_scratch=True).total == 12


def test_the_form_of_before_is_the_same_search() -> None:
    old = config({"lr": [1e-3, 1e-2], "encoder_lr_scale": [0.1, 1.0]})
    kinds = {dim.path: (dim.kind, dim.low, dim.high, dim.values) for dim in old.dimensions}
    assert kinds == {
        "encoder": ("choice", 0, 0, ("models:/e@candidate",)),
        "finetune.lr": ("loguniform", 1e-3, 1e-2, ()),
        "finetune.encoder_lr_scale": ("choice", 0, 0, (0.1, 1.0)),
    }
    assert load(TuneConfig, {**BASE, "space": {"lr": [1e-4, 1e-3]}}, ["space.lr=[1e-3, 1e-2]"]).space["lr"] == [
        1e-3,
        1e-2,
    ]
