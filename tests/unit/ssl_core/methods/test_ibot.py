"""iBOT beyond the contract: its loss worked out again in loops, its centres, its draw, and signs of collapse."""

import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from ssl_core.losses.distillation import cross_entropy, prototype_logits, teacher_distribution
from ssl_core.methods.base import StepContext
from ssl_core.methods.ibot import draw_hidden
from ssl_core.methods.parts.masking import block_mask
from ssl_core.networks.backbone import Level
from ssl_core.testing.method import context, tiny_method, trained
from ssl_core.views.types import View, ViewBatch
from storage.errors import ConfigError
from tests.kit.method_formulas import hang_over, outputs, pooled, restoration_error, values_of
from tests.kit.methods import (
    F64,
    QUARTER,
    assert_gradient_is_the_derivative,
    assert_padding_is_not_compared,
    assert_targets_follow_by_the_schedule,
    assert_trains_on_single_slices,
    assert_what_the_loss_depends_on_is_trained,
    batch_of,
    changed,
    on_slices,
    perturbed,
)
from tests.oracles import alignment
from tests.oracles import losses as slow

CROPS = {"size_DHW": (8, 8, 8), "min_overlap": 0.3, "flip": (0.0, 0.0, 0.5)}
EVERY: dict[str, Any] = {"norm": "none", "positions": 10_000, "crops": CROPS, "prototypes": 6}
"""Heads without norm, so that a row is compared by itself, and all hidden positions."""


def hidden_of(batch: ViewBatch, v: int, ratio: float = 0.5) -> torch.Tensor:
    size = batch.roles["global"][v].size_DHW
    return block_mask(7, batch.sample_B, size, 4, ratio, f"ibot {v}")


def maps_of(method: Any, image: torch.Tensor, *, target: bool) -> list[torch.Tensor]:
    """Encoder maps, and last the finest of the decoder."""
    backbone = method.target_backbone if target else method.backbone
    with torch.no_grad():
        maps = backbone.features(image)
        return [*maps, backbone.decode(maps)[-1]]


def physical(view: View, b: int, point: np.ndarray) -> np.ndarray:
    affine = view.to_volume_B34[b].numpy()
    return np.asarray(affine[:, :3] @ point + affine[:, 3])


def token_pairs(
    views: tuple[View, ...],
    maps: list[list[list[torch.Tensor]]],
    hidden: list[torch.Tensor],
    at: int,
    level: Level,
    **of: Any,
) -> list[list[list[tuple[np.ndarray, np.ndarray]]]]:
    """For each comparison and view, for each sample, the student's and the teacher's features that are compared."""
    sets = []
    for v, kind in itertools.product(range(2), of["kinds"]):
        per_sample: list[list[tuple[np.ndarray, np.ndarray]]] = []
        other = v if kind == "same" else 1 - v
        for b in range(len(hidden[v])):
            rows = []
            student, teacher = (maps[i][w][at][b].numpy() for i, w in ((0, v), (1, other)))
            for k in itertools.product(*map(range, student.shape[1:])):
                point = np.array(k) * level.stride_DHW + level.offset_DHW
                voxel = tuple(np.ceil(point - 1e-6).astype(int) - 1)
                place = physical(views[v], b, point)
                if not hidden[v][b, 0][voxel] or (place < 0).any() or (place > of["shape"]).any():
                    continue
                affine = views[other].to_volume_B34[b].numpy()
                there = np.linalg.solve(affine[:, :3], place - affine[:, 3])
                inside = ((there >= 0) & (there <= views[other].size_DHW)).all()
                value = alignment.trilinear(teacher, np.round((there - level.offset_DHW) / level.stride_DHW, 9))
                if inside and not np.isnan(value).any():
                    rows.append((student[:, k[0], k[1], k[2]], value))
            per_sample.append(rows)
        sets.append(per_sample)
    return sets


@pytest.mark.parametrize(("tokens", "sees"), [("encoder", "both"), ("decoder", "same"), ("decoder", "other")])
def test_the_loss_is_its_formula(tokens: str, sees: str) -> None:
    level: dict[str, Any] = {"feature_level": 1} if tokens == "encoder" else {}
    method, batch = perturbed("ibot", tokens=tokens, teacher_view=sees, w_restore=3.0, w_global=2.0, **level, **EVERY)
    hang_over(batch)
    views = batch.roles["global"]
    with torch.no_grad():
        method.centre_2K.copy_(0.3 * torch.randn(2, 6, generator=torch.Generator().manual_seed(5)))
    hidden = [hidden_of(batch, v) for v in range(2)]
    online = [maps_of(method, v.image_BCDHW * ~m, target=False) for v, m in zip(views, hidden, strict=True)]
    target = [maps_of(method, v.image_BCDHW, target=True) for v in views]
    centres = method.centre_2K.numpy()
    prototypes = [p.weight.detach().numpy() for p in (method.prototypes, method.target_prototypes)]
    kinds = {"both": ("same", "other")}.get(sees, (sees,))
    at, place = (1, method.backbone.levels[1]) if tokens == "encoder" else (3, method.backbone.decoder_levels[-1])
    heads, step, losses = (method.token_projector, method.target_token_projector), 15, []
    compared = token_pairs(views, [online, target], hidden, at, place, kinds=kinds, shape=batch.shape_B3[0].numpy())
    for per_sample in compared:
        for rows in per_sample:
            z = [outputs(h, torch.tensor(np.array(x))) for h, x in zip(heads, zip(*rows, strict=True), strict=True)]
            each = [slow.distillation(s, t, prototypes, centres[0], 0.1, 0.055)[0] for s, t in zip(*z, strict=True)]
            losses.append(float(np.mean(each)))
    assert min(len(rows) for per_sample in compared for rows in per_sample) > 0
    whole = []
    for v in range(2):
        z = [
            outputs(h, pooled(m[:3]))
            for h, m in (
                (method.global_projector, online[v]),
                (method.target_global_projector, target[1 - v]),
            )
        ]
        whole += [slow.distillation(s, t, prototypes, centres[1], 0.1, 0.04)[0] for s, t in zip(*z, strict=True)]
    errors = [restoration_error(method, view, hidden[v], view.clean_BCDHW) for v, view in enumerate(views)]
    wanted = {
        "tokens": float(np.mean(losses)),
        "global": 2.0 * float(np.mean(whole)),
        "restoration": 3.0 * float(np.mean(errors)),
    }
    # Half of the rise from 0.04 to 0.07 after 15 of the 30 steps that it takes.
    assert values_of(method, batch, step) == pytest.approx(wanted, abs=1e-9)


def test_the_losses_keep_their_digits_at_low_temperatures() -> None:
    logits = torch.tensor([[1.0, -1.0, 0.0]], dtype=F64)
    p = teacher_distribution(logits, torch.zeros(3), 1e-3)
    assert p.sum().item() == pytest.approx(1.0, abs=1e-12)
    assert cross_entropy(-logits, p, 1e-3).item() == pytest.approx(2000.0)
    z, w = torch.randn(4, 8).bfloat16(), torch.randn(5, 8).bfloat16()
    assert prototype_logits(z, w).dtype == torch.float32


def test_the_gradient_is_the_derivative_of_the_loss() -> None:
    assert_gradient_is_the_derivative("ibot", w_restore=1.0)


def test_targets_follow_by_the_schedule_that_the_page_says() -> None:
    assert_targets_follow_by_the_schedule("ibot", QUARTER)


def test_padding_is_not_compared() -> None:
    assert_padding_is_not_compared("ibot", "tokens")


def test_what_the_loss_depends_on_is_trained() -> None:
    assert_what_the_loss_depends_on_is_trained("ibot", tokens="encoder")


def test_it_trains_on_single_slices() -> None:
    assert_trains_on_single_slices(*on_slices("ibot", prototypes=16, w_restore=1.0))


def test_centres_follow_the_mean_logits_of_what_counted() -> None:
    method, batch = perturbed("ibot", teacher_view="same", **EVERY)
    views = batch.roles["global"]
    target = [maps_of(method, v.image_BCDHW, target=True) for v in views]
    weight = method.target_prototypes.weight.detach().numpy()

    def cosines(head: torch.nn.Module, rows: torch.Tensor) -> np.ndarray:
        return np.asarray(np.array([[slow.cosine(z, w) for w in weight] for z in outputs(head, rows)]).mean(0))

    means = np.zeros((2, 6))
    for v, b in itertools.product(range(2), range(2)):
        rows = target[v][3][b].flatten(1).t()[hidden_of(batch, v)[b].flatten()]
        means[0] += cosines(method.target_token_projector, rows) / 4
        means[1] += cosines(method.target_global_projector, pooled(target[v][:3])[b : b + 1]) / 4
    expected = np.zeros((2, 6))
    for step, momentum in ((0, 0.1), (1, 2 / 11), (500, 0.9)):
        frozen = (
            copy.deepcopy(method.target_backbone.state_dict()),
            copy.deepcopy(method.target_prototypes.state_dict()),
        )
        heads = copy.deepcopy((method.target_token_projector, method.target_global_projector))
        method(batch, context(step))
        method.after_step(context(step))
        expected = momentum * expected + (1 - momentum) * means
        assert method.centre_2K.numpy() == pytest.approx(expected, abs=1e-12)
        # The teacher as it was, so that the means stay the same.
        method.target_backbone.load_state_dict(frozen[0])
        method.target_prototypes.load_state_dict(frozen[1])
        method.target_token_projector, method.target_global_projector = heads


def test_centres_stay_where_nothing_counted_and_add_up_over_the_parts_of_a_batch() -> None:
    method, batch = perturbed("ibot", **EVERY)
    with torch.no_grad():
        method.centre_2K.fill_(0.25)
    batch.shape_B3.zero_()  # all is padding
    method(batch, context(0))
    method.after_step(context(0))
    assert torch.equal(method.centre_2K[0], torch.full((6,), 0.25, dtype=F64))
    assert not torch.equal(method.centre_2K[1], torch.full((6,), 0.25, dtype=F64))

    twice, whole = perturbed("ibot", samples=2, **EVERY)
    once = copy.deepcopy(twice)
    for sample in (0, 1):
        twice(batch_of(twice, [sample], F64), context(0))
    once(whole, context(0))
    for method in (once, twice):
        method.after_step(context(0))
    assert torch.allclose(once.centre_2K, twice.centre_2K, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 2])
def test_drawn_positions_are_hidden_ones_each_once_and_the_same_in_any_batch(stride: int) -> None:
    _, batch = perturbed("ibot", 3)
    view = batch.roles["global"][0]
    level = Level(4, (stride,) * 3, (0.5 if stride == 1 else 1.0,) * 3)
    side = 16 // stride
    mask = hidden_of(batch, 0)
    index, points, valid = draw_hidden(mask, view, level, (side,) * 3, batch, 300, seed=7, purpose="p")
    assert all(len(set(row)) == 300 for row in index.tolist())
    counts = (mask[:, 0, ::stride, ::stride, ::stride]).flatten(1).sum(1).clamp_max(300)  # blocks of 4 cover cells
    assert valid.sum(1).tolist() == counts.tolist()
    voxel = (points - 1e-6).floor().long()
    for b in range(3):
        where = tuple(voxel[b].t())
        assert torch.equal(mask[b, 0][where], valid[b])
    alone = perturbed("ibot", 3)[1]
    single = ViewBatch({}, alone.volume_B[1:2], alone.sample_B[1:2], alone.spacing_B3[1:2], alone.shape_B3[1:2])
    one = View(view.image_BCDHW[1:2], view.to_volume_B34[1:2], view.position_B3[1:2], view.valid_B1DHW[1:2])
    again, *_ = draw_hidden(mask[1:2], one, level, (side,) * 3, single, 300, seed=7, purpose="p")
    assert torch.equal(again[0], index[1])


def test_only_the_student_depends_on_what_is_hidden() -> None:
    method = tiny_method("ibot", changed("ibot", w_global=0.0)).double()
    batch = batch_of(method, [0, 1], F64)
    images: list[torch.Tensor] = []
    for backbone in (method.backbone, method.target_backbone):
        backbone.net.input_block.register_forward_pre_hook(lambda _, args: images.append(args[0]))
    method(batch, context(0))
    for v, view in enumerate(batch.roles["global"]):
        assert torch.equal(images[v], torch.where(hidden_of(batch, v), 0.0, view.image_BCDHW))
        assert torch.equal(images[2 + v], view.image_BCDHW)


ABLATIONS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "default": ({}, {"tokens", "global"}),
    "tokens only": ({"w_global": 0.0}, {"tokens"}),
    "encoder tokens only": ({"w_global": 0.0, "tokens": "encoder", "feature_level": 1}, {"tokens"}),
    "encoder tokens": ({"tokens": "encoder", "feature_level": 0}, {"tokens", "global"}),
    "encoder tokens and restoration": ({"tokens": "encoder", "w_restore": 1.0}, {"tokens", "global", "restoration"}),
    "as published": ({"teacher_view": "same", "norm": "none"}, {"tokens", "global"}),
    "the other view": ({"teacher_view": "other"}, {"tokens", "global"}),
}


@pytest.mark.parametrize("case", ABLATIONS)
def test_ablations_take_their_part_out_with_its_weights(case: str) -> None:
    settings, wanted = ABLATIONS[case]
    method = tiny_method("ibot", changed("ibot", **settings))
    terms = method(batch_of(method, [0, 1]), context(0))
    terms.total.backward()
    assert set(terms.terms) == wanted
    assert all(p.grad is not None for p in trained(method))
    assert any("global_projector" in n for n, _ in method.named_parameters()) == ("global" in wanted)
    method.after_step(context(0))


def test_monitors_show_both_kinds_of_collapse() -> None:
    method = tiny_method("ibot").double()
    batch = batch_of(method, [0, 1, 2], F64)
    healthy = method(batch, context(50)).monitors
    assert healthy["token_entropy"].item() < 0.9
    assert 1.5 < healthy["token_prototypes"].item() <= 16
    last = method.target_token_projector[-1]
    with torch.no_grad():
        last.weight.zero_()  # every token is the same
        one = method(batch, context(50)).monitors
        assert one["token_prototypes"].item() == pytest.approx(16 ** one["token_entropy"].item())
        logits = prototype_logits(last.bias[None], method.target_prototypes.weight)
        method.centre_2K[0] = logits[0]  # and centring takes all that is left
        flat = method(batch, context(50)).monitors
    assert flat["token_entropy"].item() == pytest.approx(1.0)
    assert flat["token_prototypes"].item() == pytest.approx(16.0)


def test_the_teachers_temperature_rises_over_the_share_of_the_run_that_is_set() -> None:
    method = tiny_method("ibot", changed("ibot", temperature_rise=0.5))
    steps = (0, 25, 50, 99)
    assert [method._token_temperature(context(s)) for s in steps] == pytest.approx([0.04, 0.055, 0.07, 0.07])
    at_once = tiny_method("ibot", changed("ibot", temperature_rise=0.0))
    assert at_once._token_temperature(StepContext(0, 100)) == 0.07


def test_in_a_composition_the_teacher_encodes_each_view_once_and_every_part_has_its_terms() -> None:
    parts = [
        {"name": "ibot", "settings": {"hidden": 16, "out": 8, "prototypes": 16, "positions": 64, "block": 4}},
        {"name": "mae", "settings": {"block": 4}},
        {"name": "models_genesis", "weight": 0.5},
    ]
    method = tiny_method("compose", changed("compose", parts=parts))
    passes: list[int] = []
    method.parts[0].target_backbone.net.input_block.register_forward_hook(lambda *_: passes.append(1))
    terms = method(batch_of(method, [0, 1]), context(0))
    assert len(passes) == 2
    assert {name.partition("/")[0] for name in terms.terms} == {"ibot", "mae", "models_genesis"}
    assert math.isfinite(terms.total.item())
    method.after_step(context(0))


@pytest.mark.parametrize(
    ("settings", "why"),
    [({"block": 16}, "hidden whole"), ({"feature_level": 1}, "tokens=encoder"), ({"w_tokens": 0.0}, "w_tokens")],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        changed("ibot", **settings)
