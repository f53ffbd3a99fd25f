"""aligned beyond the contract: its loss worked out again, and its ablations."""

import numpy as np
import pytest
import torch
from torch import nn

from ssl_core.config import digested
from ssl_core.methods.parts.masking import block_mask
from ssl_core.testing.method import context, tiny_method, trained
from storage.errors import ConfigError
from tests.kit.method_formulas import (
    aligned_distance,
    encoder_maps,
    hang_over,
    outputs,
    position_error,
    restoration_error,
    values_of,
)
from tests.kit.methods import (
    QUARTER,
    assert_gradient_is_the_derivative,
    assert_padding_is_not_compared,
    assert_targets_follow_by_the_schedule,
    batch_of,
    changed,
    perturbed,
)


def test_the_loss_is_its_formula() -> None:
    method, batch = perturbed("aligned", w_restore=3.0, feature_levels=(1, 2))
    views = batch.roles["global"]
    hang_over(batch)
    views[1].valid_B1DHW[0, :, :5] = 0
    each, errors = [], []
    for slot, i in enumerate(method.compared):
        online, target = ([encoder_maps(net, v)[i] for v in views] for net in (method.backbone, method.target_backbone))
        both = nn.Sequential(method.projectors[slot], method.predictors[slot])
        said, told = [outputs(both, m) for m in online], [outputs(method.target_projectors[slot], m) for m in target]
        each += aligned_distance(said, told, batch, method.backbone.levels[i])
    for v, view in enumerate(views):
        hidden = block_mask(7, batch.sample_B, view.size_DHW, 4, 0.75, f"aligned {v}")
        errors.append(restoration_error(method, view, hidden, view.clean_BCDHW))
    wanted = {"restoration": 3.0 * float(np.mean(errors)), "consistency": 2.0 * float(np.mean(each))}
    assert values_of(method, batch) == pytest.approx(wanted, abs=1e-10)


UPRIGHT = {"size_DHW": (16, 16, 16), "flip": (0, 0, 0), "scale": (0.7, 1.3), "rotate_degrees": 20.0}


@pytest.mark.parametrize("w_restore", [1.0, 0.0])
def test_the_place_of_each_voxel_is_told_from_what_the_decoder_sees(w_restore: float) -> None:
    method, batch = perturbed("aligned", w_position=2.0, w_restore=w_restore, w_consistency=0.0, crops=UPRIGHT)
    hang_over(batch)
    views = batch.roles["global"]
    views[1].valid_B1DHW[0, :, :5] = 0
    errors = []
    for v, view in enumerate(views):
        hidden = block_mask(7, batch.sample_B, view.size_DHW, 4, 0.75, f"aligned {v}")
        errors.append(position_error(method, view, hidden & (w_restore > 0), batch.shape_B3))
    assert values_of(method, batch)["position"] == pytest.approx(2.0 * float(np.mean(errors)), abs=1e-10)


def test_a_start_without_places_is_what_it_was_before_there_were_any() -> None:
    config = changed("aligned")
    assert "w_position" not in digested(config)
    assert not any("locate" in key for key in tiny_method("aligned", config).state_dict())


def test_places_of_mirrored_views_are_refused() -> None:
    with pytest.raises(ConfigError, match="mirrored"):
        changed("aligned", w_position=1.0)


def test_the_gradient_is_the_derivative_of_the_loss() -> None:
    assert_gradient_is_the_derivative("aligned")


def test_targets_follow_by_the_schedule_that_the_page_says() -> None:
    assert_targets_follow_by_the_schedule("aligned", QUARTER)


def test_padding_is_not_compared() -> None:
    assert_padding_is_not_compared("aligned", "consistency")


ABLATIONS = {
    "both": ({}, {"restoration", "consistency"}),
    "restoration only": ({"w_consistency": 0.0}, {"restoration"}),
    "consistency only": ({"w_restore": 0.0}, {"consistency"}),
    "consistency without masks": ({"w_restore": 0.0, "ratio": 0.0}, {"consistency"}),
    "consistency of masked views": ({"consistency_sees": "masked"}, {"restoration", "consistency"}),
    "masked consistency only": ({"w_restore": 0.0, "consistency_sees": "masked"}, {"consistency"}),
    "places too": ({"w_position": 1.0, "crops": UPRIGHT}, {"restoration", "position", "consistency"}),
    "places only": ({"w_position": 1.0, "crops": UPRIGHT, "w_restore": 0.0, "w_consistency": 0.0}, {"position"}),
    "places, whole": ({"w_position": 1.0, "crops": UPRIGHT, "w_restore": 0.0}, {"position", "consistency"}),
    "two levels": ({"feature_levels": (0, 2)}, {"restoration", "consistency"}),
}


@pytest.mark.parametrize("case", ABLATIONS)
def test_ablations_take_their_part_out_with_its_weights(case: str) -> None:
    settings, wanted = ABLATIONS[case]
    method = tiny_method("aligned", changed("aligned", **settings))
    terms = method(batch_of(method, [0, 1]), context(0))
    terms.total.backward()
    assert set(terms.terms) == wanted
    assert all(p.grad is not None for p in trained(method))
    has_target = any(n.startswith("target_") for n, _ in method.named_parameters())
    assert has_target == ("consistency" in wanted)


@pytest.mark.parametrize("sees", ["whole", "masked"])
def test_only_consistency_of_masked_views_depends_on_the_mask(sees: str) -> None:
    method = tiny_method("aligned", changed("aligned", consistency_sees=sees)).double()
    batch = batch_of(method, [0, 1], torch.float64)
    found = []
    for ratio in (0.25, 0.75):
        method.config = changed("aligned", consistency_sees=sees, ratio=ratio)
        found.append(method(batch, context(0)).terms)
    assert found[0]["restoration"].item() != pytest.approx(found[1]["restoration"].item(), rel=1e-6)
    same = found[0]["consistency"].item() == pytest.approx(found[1]["consistency"].item(), rel=1e-9)
    assert same == (sees == "whole")


def test_a_view_that_one_block_hides_whole_is_refused() -> None:
    changed("aligned", block=15)
    with pytest.raises(ConfigError, match="hidden whole"):
        changed("aligned", block=16)
    changed("aligned", block=16, w_restore=0.0)


@pytest.mark.parametrize("settings", [{"w_restore": 0.0, "w_consistency": 0.0}, {"ratio": 0.0}])
def test_settings_that_leave_nothing_to_learn_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        changed("aligned", **settings)
