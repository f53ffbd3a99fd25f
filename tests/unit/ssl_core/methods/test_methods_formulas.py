"""Each method's loss on views, worked out again in loops from its paper's equation and its own heads' outputs.

The contract cannot know whether views, networks and terms meet as they should: a prediction that is compared with its
own view's target, or a key that the online network made, would pass it.
"""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ssl_core.config import parse
from ssl_core.methods.base import StepContext
from ssl_core.methods.parts.masking import block_mask
from ssl_core.methods.pcrlv2 import mid_weight
from ssl_core.networks.backbone import Level
from ssl_core.testing.method import context, tiny_config, tiny_method, trained
from ssl_core.testing.views import synthetic_views
from ssl_core.views.types import View, ViewBatch
from tests.oracles import alignment
from tests.oracles import losses as slow

F64 = torch.float64


def made(name: str, samples: int = 2, dims: int = 3, **settings: Any) -> tuple[Any, ViewBatch]:
    """A method in float64 whose online weights differ from its targets', and views."""
    tiny = tiny_config(name)
    method = tiny_method(name, parse(type(tiny), tiny.model_dump() | settings), spatial_dims=dims).double()
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained(method):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=random, dtype=F64))
    return method, synthetic_views(type(method).view_spec(method.config), list(range(samples)), F64)


def maps(backbone: Any, view: View) -> list[Tensor]:
    with torch.no_grad():
        found: list[Tensor] = backbone.features(view.image_BCDHW)
    return found


def pooled(found: list[Tensor]) -> Tensor:
    return found[-1].flatten(2).mean(2)


def rows(head: nn.Module, x: Tensor) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(head(x).numpy())


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over rows of 2 - 2 cos."""
    return float(np.mean([2 - 2 * slow.cosine(x, y) for x, y in zip(a, b, strict=True)]))


def total(method: Any, batch: ViewBatch, step: int = 0) -> dict[str, float]:
    return {k: v.item() for k, v in method(batch, context(step)).terms.items()}


def centres(batch: ViewBatch, role: str) -> list[Fraction]:
    """Of each view along D, as an exact fraction of its volume, views in order and samples within them."""
    found = []
    for view in batch.roles[role]:
        for affine, side in zip(view.to_volume_B34, batch.shape_B3[:, 0], strict=True):
            middle = affine[0, :3] @ torch.tensor(view.size_DHW, dtype=F64) / 2 + affine[0, 3]
            found.append(Fraction(float(middle)) / Fraction(float(side)))
    return found


def near(place: list[Fraction], samples: int, threshold: str) -> list[list[bool]]:
    t = Fraction(threshold)
    return [[abs(p - q) < t or i % samples == j % samples for j, q in enumerate(place)] for i, p in enumerate(place)]


def test_simclr() -> None:
    method, batch = made("simclr", 3)
    z = []
    for view in batch.roles["global"]:
        every = torch.cat([m.flatten(2).mean(2) for m in maps(method.backbone, view)], 1)
        z.append(rows(method.projector, every))
    same = [[i % 3 == j % 3 for j in range(6)] for i in range(6)]
    wanted = slow.contrast(np.concatenate(z), same, method.config.temperature)
    assert total(method, batch) == pytest.approx({"contrast": wanted}, abs=1e-10)


def test_byol() -> None:
    method, batch = made("byol")
    views = batch.roles["global"]
    said = [rows(nn.Sequential(method.projector, method.predictor), pooled(maps(method.backbone, v))) for v in views]
    told = [rows(method.target_projector, pooled(maps(method.target_backbone, v))) for v in views]
    wanted = apart(said[0], told[1]) + apart(said[1], told[0])
    assert total(method, batch) == pytest.approx({"prediction": wanted}, abs=1e-10)


@pytest.mark.parametrize("own", [False, True])
def test_mocov2(own: bool) -> None:
    method, batch = made("mocov2", 3, pool="last", same_volume_negatives=own)
    method.queue_volume_K.copy_(torch.arange(8) % 4)
    method.queue_KE.copy_(nn.functional.normalize(method.queue_KE, dim=1))
    first, second = batch.roles["global"]
    q = rows(method.projector, pooled(maps(method.backbone, first)))
    k = rows(method.target_projector, pooled(maps(method.target_backbone, second)))
    queue = method.queue_KE.numpy().copy()
    each = []
    for i in range(3):
        kept = [n for n in range(8) if own or n % 4 != i]
        each.append(slow.queue(q[i : i + 1], k[i : i + 1], queue[kept], method.config.temperature))
    assert total(method, batch) == pytest.approx({"contrast": float(np.mean(each))}, abs=1e-10)
    # Only then do the keys enter the queue, as unit vectors.
    assert np.array_equal(method.queue_KE.numpy(), queue)
    method.after_step(context(0))
    assert np.allclose(method.queue_KE[:3].numpy(), [slow.unit(row) for row in k], atol=1e-12)
    assert np.array_equal(method.queue_KE[3:].numpy(), queue[3:])


def aligned_distance(said: list[np.ndarray], told: list[np.ndarray], batch: ViewBatch, level: Level) -> list[float]:
    """Both directions: mean over samples of the mean over shared points of 2 - 2 cos, maps (B, C, d, h, w)."""
    pair = batch.roles["global"]
    sums: list[list[float]] = [[], []]
    for b in range(len(said[0])):
        boxes, flips = [], []
        for view in pair:
            affine, size = view.to_volume_B34[b].numpy(), np.array(view.size_DHW)
            ends = affine[:, 3], affine[:, :3] @ size + affine[:, 3]
            boxes.append((np.minimum(*ends), np.maximum(*ends)))
            flips.append([bool(affine[i, i] < 0) for i in range(3)])
        sizes, shape = [v.size_DHW for v in pair], batch.shape_B3[b].tolist()
        points = alignment.shared_points(boxes, flips, sizes, said[0].shape[2:], shape)
        assert points is not None
        found: list[list[float]] = [[], []]
        for one, two in zip(*points, strict=True):
            k = [(p - np.array(level.offset_DHW)) / np.array(level.stride_DHW) for p in (one, two)]
            seen = [[alignment.trilinear(m[v][b], k[v]) for v in range(2)] for m in (said, told)]
            if np.isnan(seen).any():
                continue
            for v in range(2):
                found[v].append(2 - 2 * slow.cosine(seen[0][v], seen[1][1 - v]))
        for v in range(2):
            sums[v].append(float(np.mean(found[v])))
    return [float(np.mean(s)) for s in sums]


def hang_over(batch: ViewBatch) -> None:
    """Let views reach beyond both ends of the volume: what they show there is padding."""
    for view in batch.roles["global"]:
        view.to_volume_B34[:, :, 3] -= 4
    batch.shape_B3.fill_(14)


def test_pgl() -> None:
    method, batch = made("pgl", w_global=0.5)
    views = batch.roles["global"]
    hang_over(batch)
    online, target = ([maps(net, v) for v in views] for net in (method.backbone, method.target_backbone))
    both = nn.Sequential(method.projector, method.predictor)
    said = [rows(both, m[method.level]) for m in online]
    told = [rows(method.target_projector, m[method.level]) for m in target]
    local = sum(aligned_distance(said, told, batch, method.backbone.levels[method.level]))
    both = nn.Sequential(method.global_projector, method.global_predictor)
    said = [rows(both, pooled(m)) for m in online]
    told = [rows(method.target_global_projector, pooled(m)) for m in target]
    wanted = {"local": local, "global": 0.5 * (apart(said[0], told[1]) + apart(said[1], told[0]))}
    assert total(method, batch) == pytest.approx(wanted, abs=1e-10)


def test_aligned() -> None:
    method, batch = made("aligned", w_restore=3.0, feature_levels=(1, 2))
    views = batch.roles["global"]
    hang_over(batch)
    views[1].valid_B1DHW[0, :, :5] = 0
    each, errors = [], []
    for slot, i in enumerate(method.compared):
        online, target = ([maps(net, v)[i] for v in views] for net in (method.backbone, method.target_backbone))
        both = nn.Sequential(method.projectors[slot], method.predictors[slot])
        said, told = [rows(both, m) for m in online], [rows(method.target_projectors[slot], m) for m in target]
        each += aligned_distance(said, told, batch, method.backbone.levels[i])
    for v, view in enumerate(views):
        hidden = block_mask(7, batch.sample_B, view.size_DHW, 4, 0.75, f"aligned {v}")
        errors.append(restoration_error(method, view, hidden, view.clean_BCDHW))
    wanted = {"restoration": 3.0 * float(np.mean(errors)), "consistency": 2.0 * float(np.mean(each))}
    assert total(method, batch) == pytest.approx(wanted, abs=1e-10)


def restoration_error(method: Any, view: View, hidden: Tensor, target: Tensor | None) -> float:
    with torch.no_grad():
        found = method.backbone.features(view.image_BCDHW * (~hidden).double())
        output = method.restore(method.backbone.decode(found)[-1])
    assert target is not None
    counted = (hidden & (view.valid_B1DHW > 0))[:, 0]
    return slow.masked_mse(output.numpy(), target.numpy(), counted.numpy())


def test_mae() -> None:
    method, batch = made("mae")
    view = batch.roles["global"][0]
    view.valid_B1DHW[1, :, :, 9:] = 0
    hidden = block_mask(7, batch.sample_B, view.size_DHW, 4, 0.75, "mae")
    wanted = restoration_error(method, view, hidden, view.image_BCDHW)
    assert total(method, batch) == pytest.approx({"restoration": wanted}, abs=1e-10)


def test_models_genesis() -> None:
    method, batch = made("models_genesis")
    view = batch.roles["global"][0]
    view.valid_B1DHW[1, :, :, 9:] = 0
    with torch.no_grad():
        output = method.restore(method.backbone.decode(maps(method.backbone, view))[-1])
    assert view.clean_BCDHW is not None
    wanted = slow.masked_mse(output.numpy(), view.clean_BCDHW.numpy(), view.valid_B1DHW[:, 0].numpy() > 0)
    assert total(method, batch) == pytest.approx({"restoration": wanted}, abs=1e-10)


@pytest.mark.parametrize("denominator", ["all", "pos_neg"])
@pytest.mark.parametrize("depth", [1, 16])
def test_pcl_on_slices_and_sub_volumes(depth: int, denominator: str) -> None:
    crops = tiny_config("pcl").crops.model_dump() | {"size_DHW": (depth, 16, 16)}
    settings = {"crops": crops, "threshold": 0.1, "denominator": denominator}
    method, batch = made("pcl", 5, dims=2 if depth == 1 else 3, **settings)
    views = batch.roles["slice"]
    # At 0.1, 0.2 (exactly a threshold on), 0.833, 0.167 and 0.508 of volumes of several lengths.
    batch.shape_B3[:, 0] = torch.tensor([20, 30, 24, 24, 60])
    middle = torch.tensor([2.0, 6.0, 20.0, 4.0, 30.5], dtype=F64)
    for view in views:
        view.to_volume_B34[:, 0, 3] = middle - depth / 2
        view.position_B3[:, 0] = middle / batch.shape_B3[:, 0]
    z = np.concatenate([rows(method.projector, pooled(maps(method.backbone, v))) for v in views])
    positive = near(centres(batch, "slice"), 5, "0.1")
    count = [sum(row) for row in positive]
    assert count == 2 * [4, 4, 2, 6, 2]
    terms = method(batch, context(0))
    assert terms.total.item() == pytest.approx(slow.contrast(z, positive, 0.1, denominator), abs=1e-10)
    assert terms.monitors["positives"].item() == pytest.approx(np.mean(count) - 1)


@pytest.mark.parametrize(("window", "threshold"), [(0, "0.2"), (2, "0.02")])
def test_ssal(window: int, threshold: str) -> None:
    """With the smaller threshold only the two views of a sample, a voxel or more apart, attract."""
    limit = float(threshold)
    method, batch = made("ssal", 3, window=window, feature_level=2, w_position=0.25, threshold=limit)
    views = batch.roles["slice"]
    found = [maps(method.backbone, v) for v in views]
    a, b = (rows(method.embed, m[2]) for m in found)
    if not window:  # the lower half of one view is padding, the upper half of the other
        views[0].valid_B1DHW[:, :, :8], views[1].valid_B1DHW[:, :, 8:] = 0, 0
        a, b = a[:, :, 2:], b[:, :, :2]
    each = [slow.local_alignment(x[i], y[i], window or None) for x, y in ((a, b), (b, a)) for i in range(3)]
    z = np.concatenate([rows(method.projector, pooled(m)) for m in found])
    place = centres(batch, "slice")
    assert all((abs(place[i] - place[i + 3]) < Fraction(threshold)) == (window == 0) for i in range(3))
    position = slow.contrast(z, near(place, 3, threshold), 0.1)
    wanted = {"align": float(np.mean(each)), "position": 0.25 * position}
    assert total(method, batch) == pytest.approx(wanted, abs=1e-10)


def regions_of_four(batch: ViewBatch, name: str, missing: int = 0) -> None:
    """Three regions of four voxels each in every view, numbered alike, elsewhere none: the draw takes all of them."""
    random = torch.Generator().manual_seed(1)
    for v, view in enumerate(batch.roles["global"]):
        for ids in view.maps[name]:
            ids.zero_()
            chosen = torch.randperm(ids.numel(), generator=random)[:16]
            last = 4 if v and missing else missing  # one region is in the first view alone
            numbers = [5, 900, 31] + ([last] if missing else [])
            ids.view(-1)[chosen[: 4 * len(numbers)]] = torch.tensor(numbers).repeat_interleave(4)


@pytest.mark.parametrize("base", ["byol", "simclr"])
def test_lrc_of_pixels(base: str) -> None:
    method, batch = made("lrc", base=base, base_settings={"hidden": 16, "out": 8}, w_local=0.5, temperature=0.3)
    name = method.config.superpixels.name
    regions_of_four(batch, name)
    each = []
    for view in batch.roles["global"]:
        with torch.no_grad():
            dense = method.dense(method.backbone.decode(maps(method.backbone, view))[-1])
        for z, ids in zip(dense, view.maps[name], strict=True):
            kept = torch.nonzero(ids.flatten())[:, 0]
            pixels, number = z.flatten(1)[:, kept].t().numpy(), ids.flatten()[kept].tolist()
            same = [[m == n for n in number] for m in number]
            each.append(slow.contrast(pixels, same, 0.3))
    terms = method(batch, context(0))
    assert terms.terms["region"].item() == pytest.approx(0.5 * float(np.mean(each)), abs=1e-10)
    assert terms.monitors["regions"].item() == 3


def test_lrc_of_means() -> None:
    method, batch = made("lrc", form="B", base="simclr", base_settings={"hidden": 16, "out": 8}, temperature=0.3)
    name = method.config.superpixels.name
    regions_of_four(batch, name, missing=77)
    means: list[list[np.ndarray]] = []
    for view in batch.roles["global"]:
        with torch.no_grad():
            dense = method.dense(method.backbone.decode(maps(method.backbone, view))[-1]).numpy()
        means.append([])
        for z, ids in zip(dense, view.maps[name].numpy(), strict=True):
            rows_ = [[slow.unit(x) for x in z[:, ids == n].T] for n in (5, 31, 900)]
            means[-1].append(np.array([np.mean(r, axis=0) for r in rows_]))
    each = [slow.prototypes(means[i][b], means[1 - i][b], 0.3) for i in range(2) for b in range(2)]
    terms = method(batch, context(0))
    assert terms.terms["region"].item() == pytest.approx(float(np.mean(each)), abs=1e-10)
    assert terms.monitors["regions"].item() == 3


class Compared:
    """One decoder level of PCRLv2 on all its crops."""

    def __init__(self, heads: Any, map_: Tensor) -> None:
        with torch.no_grad():
            pro = heads.embed(map_.flatten(2).mean(2))
            self.pro, self.pre = pro.numpy(), heads.predict(pro).numpy()
            image = torch.sigmoid(heads.norm(heads.conv(map_)))
            self.image = nn.functional.interpolate(
                image, size=[n * s for n, s in zip(map_.shape[2:], heads.stride, strict=True)], mode="trilinear"
            ).numpy()


def compare(a: Any, b: Any, chosen: slice = slice(None)) -> float:
    return slow.siamese(a.pre, a.pro, b.pre[chosen], b.pro[chosen])


@pytest.mark.parametrize("levels", ["all", "draw"])
def test_pcrlv2(levels: str) -> None:
    method, batch = made("pcrlv2", 3, levels=levels)
    first, second = batch.roles["global"]
    first.valid_B1DHW[0, :, :4] = 0
    crops = batch.roles["local"]
    count = len(method.heads)

    def decoded(image: Tensor) -> list[Tensor]:
        with torch.no_grad():
            found: list[Tensor] = method.backbone.decode(method.backbone.features(image), skips=False)
        return found[-count:]

    big = [decoded(v.image_BCDHW) for v in (first, second)]
    small = decoded(torch.cat([v.image_BCDHW for v in crops]))
    a, b, v = ([Compared(h, m) for h, m in zip(method.heads, found, strict=True)] for found in (*big, small))
    assert first.clean_BCDHW is not None
    clean = first.clean_BCDHW.numpy()
    low, high = (f(clean, axis=(1, 2, 3, 4), keepdims=True) for f in (np.min, np.max))
    target, shown = (clean - low) / (high - low), first.valid_B1DHW[:, 0].numpy() > 0
    with torch.no_grad():
        output = torch.sigmoid(method.restore(big[0][-1])).numpy()
    # What each level would give; then the mean of them, or the one that was drawn for the comparison.
    mid = [slow.masked_mse(x.image, target, shown) for x in a]
    pair = [compare(x, y) for x, y in zip(a, b, strict=True)]
    local = [
        [[compare(x[i], v[i], slice(3 * k, 3 * k + 3)) for i in range(count)] for x in (a, b)]
        for k in range(len(crops))
    ]
    found = total(method, batch, step=25)
    fade = (1 + np.cos(np.pi * 25 / 100)) / 2
    assert mid_weight(0.25) == pytest.approx(fade)
    assert found["restoration"] == pytest.approx(slow.masked_mse(output, target, shown), abs=1e-10)
    if levels == "all":
        assert found["mid"] == pytest.approx(fade * np.mean(mid), abs=1e-10)
        assert found["siamese"] == pytest.approx(np.mean(pair), abs=1e-10)
        assert found["local"] == pytest.approx(np.mean(local), abs=1e-10)
        return
    drawn = [method._weights(context(25), i).index(1.0) for i in range(1 + 2 * len(crops))]
    assert found["mid"] == pytest.approx(fade * mid[drawn[0]], abs=1e-10)
    assert found["siamese"] == pytest.approx(pair[drawn[0]], abs=1e-10)
    one = [local[k][x][drawn[1 + 2 * k + x]] for k in range(len(crops)) for x in range(2)]
    assert found["local"] == pytest.approx(np.mean(one), abs=1e-10)


QUARTER = 0.99 + 0.01 * (1 - np.cos(np.pi / 4)) / 2  # of the way on a cosine from 0.99 to 1


@pytest.mark.parametrize(
    ("name", "late"), [("byol", QUARTER), ("pgl", QUARTER), ("aligned", QUARTER), ("mocov2", 0.99)]
)
def test_targets_follow_by_the_schedule_that_the_page_says(name: str, late: float) -> None:
    """(1 + k) / (10 + k) at first, then the cosine; MoCo's momentum stays 0.99."""
    method, batch = made(name)
    for step, wanted in ((0, 1 / 10), (50, 51 / 60), (5_000, late)):
        ctx = StepContext(step, 20_000, 7)
        before = [p.clone() for p in method.target_backbone.parameters()]
        method(batch, ctx)
        method.after_step(ctx)
        pairs = zip(method.target_backbone.parameters(), before, method.backbone.parameters(), strict=True)
        assert all(torch.allclose(t, wanted * old + (1 - wanted) * new, atol=1e-12) for t, old, new in pairs)


PLAIN = ("aligned", "byol", "lrc", "mae", "mocov2", "models_genesis", "pcrlv2", "pgl", "simclr", "supervised")
CASES: dict[str, dict[str, Any]] = {name: {} for name in PLAIN} | {
    "pcl": {"threshold": 0.02},
    "ssal": {"threshold": 0.02},
    "lrc of means": {"form": "B", "base": "simclr", "base_settings": {"hidden": 16, "out": 8}},
}


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_the_derivative_of_the_loss(case: str) -> None:
    """Keys are gathered with gradient, and nothing is detached but targets; in PCRLv2 the compared embeddings are."""
    name = case.split()[0]
    method, batch = made(name, 3, **CASES[case])
    random = torch.Generator().manual_seed(0)
    weights = trained(method)
    step = [1e-7 * torch.randn(p.shape, generator=random, dtype=F64) for p in weights]

    def loss() -> Tensor:
        terms = method(batch, context(0)).terms
        kept: list[Tensor] = [term for key, term in terms.items() if name != "pcrlv2" or key in ("restoration", "mid")]
        return torch.stack(kept).sum()

    loss().backward()
    slope = sum(float((p.grad * s).sum()) for p, s in zip(weights, step, strict=True) if p.grad is not None)
    found = []
    with torch.no_grad():
        for shift in (1, -2):
            for p, s in zip(weights, step, strict=True):
                p += shift * s
            found.append(loss().item())
    # What rounds, and what has a kink between the two.
    assert (found[0] - found[1]) / 2 == pytest.approx(slope, rel=1e-2, abs=1e-14)
