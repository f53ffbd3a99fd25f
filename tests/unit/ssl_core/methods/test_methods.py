"""What single methods promise beyond the contract."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ssl_core.config import parse
from ssl_core.methods.base import Crops, level_for, method_class, method_names
from ssl_core.methods.compose import merge
from ssl_core.methods.mocov2 import _told_apart
from ssl_core.methods.parts.masking import block_mask
from ssl_core.methods.parts.points import sample_features, shared_points
from ssl_core.methods.pcrlv2 import mid_weight
from ssl_core.methods.simclr import _similarities
from ssl_core.networks import build
from ssl_core.networks.backbone import Level
from ssl_core.testing.method import (
    assert_targets_follow,
    context,
    tiny_config,
    tiny_method,
    train,
    trained,
)
from ssl_core.testing.views import synthetic_views, take
from ssl_core.views import placement
from ssl_core.views.placement_size import host_size
from ssl_core.views.types import View, ViewBatch, ViewSpec
from storage.errors import ConfigError


def changed(name: str, **settings: Any) -> Any:
    config = tiny_config(name)
    return parse(type(config), config.model_dump() | settings)


def batch_of(method: Any, samples: list[int], dtype: torch.dtype = torch.float32) -> ViewBatch:
    return synthetic_views(type(method).view_spec(method.config), samples, dtype)


def swap(batch: ViewBatch, role: str) -> ViewBatch:
    views = {**batch.roles, role: batch.roles[role][::-1]}
    return ViewBatch(views, batch.volume_B, batch.sample_B, batch.spacing_B3, batch.shape_B3)


def test_every_promised_method_is_there() -> None:
    wanted = "aligned byol compose lrc mae mocov2 models_genesis pcl pcrlv2 pgl simclr ssal supervised"
    assert set(wanted.split()) <= set(method_names())


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="simclr"):
        method_class("simclr2")
    with pytest.raises(ConfigError, match="a start in tune and finetune"):
        method_class("none")


@pytest.mark.parametrize(
    ("name", "role"), [("pgl", "global"), ("byol", "global"), ("simclr", "global"), ("pcl", "slice"), ("ssal", "slice")]
)
def test_swapping_the_views_leaves_the_loss(name: str, role: str) -> None:
    method = tiny_method(name).double()
    batch = batch_of(method, [0, 1], torch.float64)
    here = method(batch, context(0)).total.item()
    assert method(swap(batch, role), context(0)).total.item() == pytest.approx(here, abs=1e-10)


def ramp_view(size: int, flip: bool, start: float) -> View:
    """A view along W whose intensities are the volume's own W coordinate."""
    centre = torch.arange(size, dtype=torch.float64) + 0.5
    position = start + (size - centre if flip else centre)
    to_volume = torch.eye(3, 4, dtype=torch.float64)[None].clone()
    if flip:
        to_volume[0, 2, 2] = -1.0
    to_volume[0, 2, 3] = start + (size if flip else 0.0)
    image = position.expand(1, 1, 8, 8, size)
    return View(image, to_volume, torch.full((1, 3), 0.5).double(), torch.ones_like(image))


def skeleton(image: torch.Tensor, halvings: int, kernel: int, padding: int) -> torch.Tensor:
    """Averaging kernels along W, the ramp continued linearly beyond the borders."""
    x = image
    for _ in range(halvings):
        if padding:
            x = torch.cat([2 * x[..., :1] - x[..., 1:2], x, 2 * x[..., -1:] - x[..., -2:-1]], dim=-1)
        x = nn.functional.avg_pool3d(x, (1, 1, kernel), (1, 1, 2))
    return x


@pytest.mark.parametrize(("kernel", "padding", "shift"), [(3, 1, [1, 3, 7, 15]), (2, 0, [0, 0, 0, 0])])
@pytest.mark.parametrize("halvings", [1, 2, 3, 4])
def test_flipped_views_register_with_the_measured_centre_and_not_without(
    kernel: int, padding: int, shift: list[int], halvings: int
) -> None:
    stride = 2**halvings
    views = ramp_view(128, False, 0.0), ramp_view(128, True, 8.0)
    maps = [skeleton(v.image_BCDHW, halvings, kernel, padding) for v in views]
    points_a, points_b, shared = shared_points(*views, (1, 1, 16), torch.full((1, 3), 1000.0))

    def gap(offset: float) -> float:
        level = Level(1, (1, 1, stride), (0.5, 0.5, offset))
        (a, in_a), (b, in_b) = (sample_features(m, level, p) for m, p in zip(maps, (points_a, points_b), strict=True))
        return float((a - b).abs()[..., 0][shared & in_a & in_b].max())

    assert gap(0.5 if padding else stride / 2) < 1e-3
    assert gap(stride / 2) == pytest.approx(shift[halvings - 1], abs=1e-3)


def test_pgl_is_zero_for_the_same_view_and_an_online_network_that_equals_its_target() -> None:
    method = tiny_method("pgl", changed("pgl", norm="none")).double()
    method.predictor = nn.Identity()
    batch = batch_of(method, [0, 1], torch.float64)
    first = batch.roles["global"][0]
    same = ViewBatch({"global": (first, first)}, batch.volume_B, batch.sample_B, batch.spacing_B3, batch.shape_B3)
    assert method(same, context(0)).total.item() == pytest.approx(0.0, abs=1e-12)
    assert method(batch, context(0)).total.item() > 1e-3


def test_pgl_without_overlap_is_zero_with_a_gradient_of_zero() -> None:
    method = tiny_method("pgl")
    batch = batch_of(method, [0, 1])
    batch.roles["global"][1].to_volume_B34[:, :, 3] += 1000.0
    terms = method(batch, context(0))
    terms.total.backward()
    assert terms.total.item() == 0.0
    assert terms.monitors["shared_points"].item() == 0.0
    assert all(not p.grad.any() for p in trained(method))


@pytest.mark.parametrize(("name", "term"), [("pgl", "local"), ("aligned", "consistency")])
def test_padding_is_not_compared(name: str, term: str) -> None:
    method = tiny_method(name)
    batch = batch_of(method, [0, 1])
    assert method(batch, context(0)).terms[term].item() > 0
    batch.shape_B3.zero_()  # everything that the views show lies beyond the volume
    assert method(batch, context(0)).terms[term].item() == 0.0


def test_the_global_term_trains_the_deepest_level() -> None:
    local, both = tiny_method("pgl"), tiny_method("pgl", changed("pgl", w_global=1.0))
    deepest = "bottleneck.conv1.conv.weight"
    flags = [dict(m.backbone.net.named_parameters())[deepest].requires_grad for m in (local, both)]
    assert flags == [False, True]
    terms = both(batch_of(both, [0, 1]), context(0)).terms
    assert set(terms) == {"local", "global"}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mocov2", {}),
        ("mocov2", {"pool": "last"}),
        ("simclr", {"pool": "last"}),
        ("pgl", {"feature_level": 2, "w_global": 1.0}),
    ],
)
def test_what_the_loss_depends_on_is_trained_where_skips_have_layers_of_their_own(
    name: str, settings: dict[str, Any]
) -> None:
    pytest.importorskip("einops")
    few = {"depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "window_size": 2}
    backbone = build("swin_unetr", feature_size=12, **few)
    crops = tiny_config(name).crops.model_dump() | {"size_DHW": (32, 32, 64)}
    method = method_class(name)(changed(name, crops=crops, **settings), backbone).train()
    chosen = {n for n, p in backbone.net.named_parameters() if p.requires_grad}
    backbone.net.requires_grad_(True)
    method(batch_of(method, [0]), context(0)).total.backward()
    assert chosen == {n for n, p in backbone.net.named_parameters() if p.grad is not None}


def test_the_targets_of_the_global_term_follow_too() -> None:
    method = tiny_method("pgl", changed("pgl", w_global=1.0)).double()
    assert_targets_follow(method, batch_of(method, [0, 1], torch.float64))


def test_a_target_keeps_the_running_statistics_of_its_own_passes() -> None:
    method = tiny_method("byol")
    with torch.no_grad():
        for parameter in trained(method):
            parameter.mul_(1.5)
    method(batch_of(method, [0, 1]), context(0))
    before = {n: b.clone() for n, b in method.target_projector.named_buffers()}
    method.after_step(context(0))
    online = dict(method.projector.named_buffers())
    for name, buffer in method.target_projector.named_buffers():
        assert torch.equal(buffer, before[name])
    assert any(not torch.equal(online[n], b) for n, b in before.items())


def test_views_of_pgl_share_no_sliver() -> None:
    """Ten percent of overlap may lie in a thin slab; the host crop keeps it at a sixth of a view along every axis."""
    kind = method_class("pgl")
    spec = kind.view_spec(kind.Config())
    count, host = 4000, host_size(spec)
    made = placement.draw(
        spec,
        seed=0,
        sample_B=np.arange(count),
        start_B3=np.zeros((count, 3), np.int64),
        host_DHW=host,
        shape_B3=np.tile(np.array(host, np.float64), (count, 1)),
        spacing_B3=np.ones((count, 3)),
    )["global"]
    side = np.abs(np.diagonal(made[..., :3], axis1=2, axis2=3)) * 64
    centre = made[..., :3].sum(3) * 32 + made[..., 3]
    low, high = centre - side / 2, centre + side / 2
    shared = high.min(0) - low.max(0)
    assert (shared / side.min(0)).min() > 1 / 6


def test_the_level_compared_is_the_deepest_with_enough_positions() -> None:
    backbone = build("basic_unet", features=(4, 4, 8, 8, 8, 4))
    sizes = {(96, 96, 96): 4, (16, 96, 96): 4, (64, 64, 64): 3, (32, 32, 32): 2, (16, 16, 16): 1, (4, 4, 4): 0}
    assert {size: level_for(backbone, size, None) for size in sizes} == sizes
    assert level_for(backbone, (96, 96, 96), 1) == 1
    with pytest.raises(ConfigError, match="feature_level"):
        level_for(backbone, (96, 96, 96), 5)


def test_the_queue_holds_the_newest_keys_in_order() -> None:
    method = tiny_method("mocov2")
    keys = []
    for step, samples in enumerate(([0, 1, 2], [3, 4, 5], [6, 7, 8])):
        method(batch_of(method, samples), context(step))
        keys.append(method._fresh[0][0].clone())
        method.after_step(context(step))
    newest = torch.cat(keys)[-8:]
    assert method.queue_next.item() == 1
    assert torch.equal(method.queue_KE.roll(-1, 0), newest)
    assert method.queue_volume_K.roll(-1).tolist() == list(range(1, 9))


def test_crops_of_the_own_volume_are_no_negatives() -> None:
    method = tiny_method("mocov2")
    batch = batch_of(method, [0, 1])
    batch.volume_B.zero_()
    method.queue_volume_K.zero_()
    assert method(batch, context(0)).total.item() == pytest.approx(0.0, abs=1e-6)
    method.queue_volume_K[3:] = 1
    assert method(batch, context(0)).total.item() > 0.1
    kept = tiny_method("mocov2", changed("mocov2", same_volume_negatives=True))
    kept.queue_volume_K.zero_()
    assert kept(batch, context(0)).total.item() > 0.1


def test_a_queue_shorter_than_the_batch_keeps_its_newest_part() -> None:
    method = tiny_method("mocov2", changed("mocov2", queue=2))
    method(batch_of(method, [0, 1, 2]), context(0))
    method.after_step(context(0))
    assert sorted(method.queue_volume_K.tolist()) == [1, 2]


def test_the_queue_is_in_the_order_of_samples_however_ranks_share_them() -> None:
    shared, whole = (tiny_method("mocov2", changed("mocov2", queue=3)).double() for _ in range(2))
    for step, samples in enumerate(([0, 1, 2, 3], [4, 5, 6, 7])):
        batch = batch_of(whole, samples, torch.float64)
        # Lanes of even samples on one rank, of odd ones on another: so their keys are gathered.
        for method, views in ((whole, batch), (shared, take(batch, [0, 2, 1, 3]))):
            method(views, context(step))
            method.after_step(context(step))
        assert torch.equal(shared.queue_volume_K, whole.queue_volume_K)
        torch.testing.assert_close(shared.queue_KE, whole.queue_KE, rtol=0, atol=1e-10)
    assert sorted(whole.queue_volume_K.tolist()) == [5, 6, 7]


def test_cosines_that_are_watched_keep_their_digits_under_autocast() -> None:
    a = torch.nn.functional.normalize(1 + 0.01 * torch.randn(6, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    b, queue = a.flip(0), a.roll(1, 0)
    for watch in (lambda: _told_apart(a, b, queue, None), lambda: _similarities([a, b])):
        wanted = watch()
        with torch.autocast("cpu", torch.bfloat16):
            assert watch() == wanted


def test_pcl_with_a_vanishing_threshold_is_simclr() -> None:
    method = tiny_method("pcl", changed("pcl", threshold=1e-6))
    batch = batch_of(method, list(range(12)))
    place = batch.roles["slice"][0].position_B3[:, 0].tolist()
    apart = take(batch, [place.index(p) for p in sorted(set(place))[:3]])
    assert method(apart, context(0)).monitors["positives"].item() == 1.0
    wide = tiny_method("pcl", changed("pcl", threshold=2.0))
    assert wide(apart, context(0)).monitors["positives"].item() == 5.0


def test_pcl_never_flips_along_the_body_by_default_and_shows_one_box_twice() -> None:
    kind = method_class("pcl")
    (role,) = kind.view_spec(kind.Config()).roles
    assert role.flip[0] == 0.0
    assert role.offset_vox == (0, 0)


def test_ssal_is_refused_without_what_keeps_it_from_collapsing() -> None:
    with pytest.raises(ConfigError, match="w_position"):
        changed("ssal", w_position=0.0)


def test_ssal_pairs_too_far_apart_do_not_align() -> None:
    near = tiny_method("ssal", changed("ssal", gap_mm=1.0))
    batch = batch_of(near, [0, 1])
    assert near(batch, context(0)).terms["align"].item() > 0.0
    far = tiny_method("ssal", changed("ssal", gap_mm=0.5))
    assert far(batch, context(0)).terms["align"].item() == 0.0
    batch.spacing_B3[0, 0] = 1.5  # the next slice of the first sample is now too far as well
    alone = near(take(batch, [1]), context(0)).terms["align"].item()
    assert near(batch, context(0)).terms["align"].item() == pytest.approx(alone / 2, rel=1e-5)


@pytest.mark.parametrize("base", ["mocov2", "byol", "simclr", "supervised"])
def test_lrc_adds_to_its_base_without_changing_it(base: str) -> None:
    settings = {"views": 2, "values": [223, 322]} if base == "supervised" else {"hidden": 16, "out": 8}
    lrc = tiny_method("lrc", changed("lrc", base=base, base_settings=settings)).double()
    batch = batch_of(lrc, [0, 1], torch.float64)
    terms = lrc(batch, context(0)).terms
    alone = copy.deepcopy(lrc.base)(batch, context(0)).terms
    assert set(terms) == {*alone, "region"}
    assert all(terms[k].item() == pytest.approx(alone[k].item(), abs=1e-12) for k in alone)


@pytest.mark.parametrize("form", ["A", "B"])
def test_lrc_on_a_single_region_adds_nothing(form: str) -> None:
    lrc = tiny_method("lrc", changed("lrc", form=form))
    batch = batch_of(lrc, [0, 1])
    for view in batch.roles["global"]:
        view.maps[lrc.config.superpixels.name].fill_(1)
    terms = lrc(batch, context(0))
    terms.total.backward()
    assert terms.terms["region"].item() == 0.0
    assert all(torch.isfinite(p.grad).all() for p in trained(lrc))


def test_lrc_form_b_learns() -> None:
    lrc = tiny_method("lrc", changed("lrc", form="B", base="simclr", base_settings={"hidden": 16, "out": 8}))
    batch = batch_of(lrc, [0, 1])
    first = lrc(batch, context(0)).terms["region"].item()
    train(lrc, batch, range(15), torch.optim.AdamW(trained(lrc), lr=1e-2))
    assert lrc(batch, context(15)).terms["region"].item() < first


def test_lrc_form_b_wants_two_views_of_a_sample() -> None:
    with pytest.raises(ConfigError, match="two views"):
        changed("lrc", form="B", base="supervised", base_settings={})
    lrc = tiny_method("lrc", changed("lrc", form="B", base="supervised", base_settings={"views": 2}))
    assert lrc(batch_of(lrc, [0, 1]), context(0)).terms["region"] > 0


def test_lrc_and_a_base_that_decodes_share_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    lrc = tiny_method("lrc", changed("lrc", base="supervised", base_settings={"views": 2}))
    passes: list[int] = []
    decode = lrc.backbone.decode
    monkeypatch.setattr(lrc.backbone, "decode", lambda features: passes.append(1) or decode(features))
    lrc(batch_of(lrc, [0, 1]), context(0))
    assert len(passes) == 2  # one a view


def test_supervised_learns_its_values_and_takes_all_others_for_background() -> None:
    method = tiny_method("supervised", changed("supervised", values=[222, 223])).double()
    batch = batch_of(method, [0, 1], torch.float64)
    (view,) = batch.roles["global"]
    label = view.maps["label"]
    classes = (label == 222) * 1 + (label == 223) * 2
    terms = method(batch, context(0))
    logits = method.classifier(method.backbone.decode(method.backbone.features(view.image_BCDHW))[-1])
    share = logits.softmax(1)
    entropy = -share.gather(1, classes[:, None]).log().mean()
    dice = []
    for b in range(2):
        for value in (1, 2):
            p, y = share[b, value], (classes[b] == value).double()
            dice.append(1 - (2 * (p * y).sum() + 1e-5) / (p.sum() + y.sum() + 1e-5))
    wanted = entropy + torch.stack(dice).mean()
    assert terms.terms["segmentation"].item() == pytest.approx(wanted.item(), rel=1e-9)
    assert terms.monitors["accuracy"].item() == pytest.approx((logits.argmax(1) == classes).double().mean().item())
    # Which other values there are means nothing.
    label[label < 222] = 7
    assert method(batch, context(0)).total.item() == pytest.approx(terms.total.item(), rel=1e-12)


@pytest.mark.parametrize("values", [[], [0, 1], [2, 2]])
def test_supervised_refuses_values_that_are_no_classes(values: list[int]) -> None:
    with pytest.raises(ConfigError, match="values"):
        changed("supervised", values=values)


def test_settings_of_an_inner_method_are_checked_at_once() -> None:
    with pytest.raises(ConfigError, match="temprature"):
        changed("lrc", base_settings={"temprature": 0.1})
    with pytest.raises(ConfigError, match="nothing"):
        changed("compose", parts=[{"name": "nothing"}])


def test_crops_that_an_inner_method_would_not_get_are_refused() -> None:
    crops = {"size_DHW": (16, 16, 16)}
    with pytest.raises(ConfigError, match="crops"):
        changed("lrc", base_settings={"crops": crops})
    with pytest.raises(ConfigError, match="crops"):
        changed("compose", parts=[{"name": "byol", "settings": {"crops": crops}}])


def test_the_coarse_restoration_fades_on_a_cosine() -> None:
    assert [mid_weight(e / 240) for e in (0, 60, 120, 180, 240)] == pytest.approx([1, 0.8535534, 0.5, 0.1464466, 0])


def test_pcrlv2_draws_one_level_for_each_comparison() -> None:
    method = tiny_method("pcrlv2", changed("pcrlv2", levels="draw"))
    weights = [method._weights(context(step), draw) for step in range(20) for draw in range(4)]
    assert all(sorted(w) == [0.0, 1.0] for w in weights)
    assert {tuple(w) for w in weights} == {(0.0, 1.0), (1.0, 0.0)}
    terms = method(batch_of(method, [0, 1]), context(0))
    assert torch.isfinite(terms.total)


def test_pcrlv2_cuts_its_local_crops_inside_the_union_of_the_global_ones() -> None:
    kind = method_class("pcrlv2")
    shown, local = kind.view_spec(kind.Config()).roles
    assert (local.overlaps, local.inside_union) == (shown.name, True)
    assert (shown.count, shown.keep_clean, local.count) == (2, True, 6)


def test_pcrlv2_restores_without_skips() -> None:
    method = tiny_method("pcrlv2")
    seen: list[bool] = []
    decode = method.backbone.decode
    method.backbone.decode = lambda maps, skips=True: seen.append(skips) or decode(maps, skips)
    method(batch_of(method, [0, 1]), context(0))
    assert seen == [False, False, False]


def test_pcrlv2_at_its_best_is_minus_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restored exactly and embeddings that are predicted exactly: 0 + 0 - 1 - 1."""
    method = tiny_method("pcrlv2", changed("pcrlv2", target="as_is")).double()
    batch = batch_of(method, [0, 1], torch.float64)
    first = batch.roles["global"][0]
    with torch.no_grad():
        restored = torch.sigmoid(method.restore(method._decode(first.image_BCDHW)[-1]))
    assert first.clean_BCDHW is not None
    first.clean_BCDHW.copy_(restored)
    for heads in method.heads:
        known = torch.randn(1, 8, dtype=torch.float64)
        monkeypatch.setattr(heads, "forward", lambda m, known=known: (known.expand(len(m), -1),) * 2)
    terms = method(batch, context(100)).terms  # of 100 steps: the weight of the coarse restoration has faded
    wanted = {"restoration": 0.0, "mid": 0.0, "siamese": -1.0, "local": -1.0}
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(wanted, abs=1e-12)


def test_mae_counts_hidden_voxels_only() -> None:
    method = tiny_method("mae")
    batch = batch_of(method, [0, 1])
    view = batch.roles["global"][0]
    method.restore.conv.weight.data.zero_()
    method.restore.conv.bias.data.zero_()
    mask = block_mask(7, batch.sample_B, (16, 16, 16), 4, 0.75, "mae")
    wanted = torch.stack([x[m].square().mean() for x, m in zip(view.image_BCDHW, mask, strict=True)]).mean()
    assert method(batch, context(0)).total.item() == pytest.approx(wanted.item(), rel=1e-5)


ABLATIONS = {
    "both": ({}, {"restoration", "consistency"}),
    "restoration only": ({"w_consistency": 0.0}, {"restoration"}),
    "consistency only": ({"w_restore": 0.0}, {"consistency"}),
    "consistency without masks": ({"w_restore": 0.0, "ratio": 0.0}, {"consistency"}),
    "consistency of masked views": ({"consistency_sees": "masked"}, {"restoration", "consistency"}),
    "masked consistency only": ({"w_restore": 0.0, "consistency_sees": "masked"}, {"consistency"}),
    "two levels": ({"feature_levels": (0, 2)}, {"restoration", "consistency"}),
}


@pytest.mark.parametrize("case", ABLATIONS)
def test_ablations_of_aligned_take_their_part_out_with_its_weights(case: str) -> None:
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
    for name in ("mae", "aligned"):
        changed(name, block=15)
        with pytest.raises(ConfigError, match="hidden whole"):
            changed(name, block=16)
    changed("aligned", block=16, w_restore=0.0)


@pytest.mark.parametrize("settings", [{"w_restore": 0.0, "w_consistency": 0.0}, {"ratio": 0.0}])
def test_aligned_refuses_settings_that_leave_nothing_to_learn(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        changed("aligned", **settings)


def test_a_composition_is_the_weighted_sum_of_its_parts() -> None:
    parts = [
        {"name": "simclr", "weight": 2.0, "settings": {"hidden": 16}},
        {"name": "byol", "settings": {"hidden": 16}},
    ]
    both = tiny_method("compose", changed("compose", parts=parts)).double()
    batch = batch_of(both, [0, 1], torch.float64)
    terms = both(batch, context(0)).terms
    for i, (name, weight) in enumerate((("simclr", 2.0), ("byol", 1.0))):
        alone = copy.deepcopy(both.parts[i])(batch, context(0)).terms
        for key, value in alone.items():
            assert terms[f"{name}/{key}"].item() == pytest.approx(weight * value.item(), abs=1e-10)


@pytest.mark.parametrize("views", [1, 3])
def test_a_part_of_a_composition_takes_as_many_of_the_shared_views_as_it_asked_for(views: int) -> None:
    labels = {"views": views, "values": [223, 322]}
    parts = [{"name": "supervised", "settings": labels}]
    parts += [{"name": name, "settings": {"hidden": 16}} for name in ("simclr", "mocov2", "byol", "pgl")]
    parts += [{"name": "aligned", "settings": {"hidden": 16, "block": 4}}, {"name": "mae", "settings": {"block": 4}}]
    parts += [{"name": "pcrlv2", "settings": {"local": {"size_DHW": (8, 8, 8)}, "locals": 2}}]
    method = tiny_method("compose", changed("compose", parts=parts)).double()
    batch = batch_of(method, [0, 1], torch.float64)
    terms = copy.deepcopy(method)(batch, context(0)).terms
    for named, part in zip(parts, method.parts, strict=True):
        said = sum(term.item() for key, term in terms.items() if key.startswith(f"{named['name']}/"))
        fewer = {role.name: batch.roles[role.name][: role.count] for role in type(part).view_spec(part.config).roles}
        alone = part(replace(batch, roles=fewer), context(0)).total.item()
        assert alone == pytest.approx(said, abs=1e-10), named["name"]


def test_a_composition_encodes_shared_views_once() -> None:
    parts = [{"name": "simclr", "settings": {"hidden": 16}}, {"name": "byol", "settings": {"hidden": 16}}]
    method = tiny_method("compose", changed("compose", parts=parts))
    passes: list[int] = []
    method.backbone.net.input_block.register_forward_hook(lambda *_: passes.append(1))
    method(batch_of(method, [0, 1]), context(0))
    assert len(passes) == 2


def test_a_composition_shows_what_its_most_demanding_part_asks_for() -> None:
    one, other = (
        ViewSpec((Crops().role("global", count, keep_clean=clean),)) for count, clean in ((3, True), (2, False))
    )
    for specs in ([one, other], [other, one]):
        (role,) = merge(specs).roles
        assert (role.count, role.keep_clean) == (3, True)


def test_a_composition_of_views_that_disagree_is_refused() -> None:
    specs = [ViewSpec((Crops(flip=(0.0, 0.0, p)).role("global", 2),)) for p in (0.0, 0.5)]
    with pytest.raises(ConfigError, match="global"):
        merge(specs)
