"""PCRLv2 beyond the contract: its loss worked out again, its crops, levels and schedule."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ssl_core.methods.base import method_class
from ssl_core.methods.pcrlv2 import mid_weight
from ssl_core.testing.method import context, tiny_method
from tests.kit.method_formulas import values_of
from tests.kit.methods import assert_gradient_is_the_derivative, batch_of, changed, perturbed
from tests.oracles import losses as slow


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
def test_the_loss_is_its_formula(levels: str) -> None:
    method, batch = perturbed("pcrlv2", 3, levels=levels)
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
    found = values_of(method, batch, step=25)
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


def test_the_gradient_is_the_derivative_of_the_loss() -> None:
    """Of the restorations: the embeddings that are compared are detached."""
    assert_gradient_is_the_derivative("pcrlv2", only=("restoration", "mid"))


def test_the_coarse_restoration_fades_on_a_cosine() -> None:
    assert [mid_weight(e / 240) for e in (0, 60, 120, 180, 240)] == pytest.approx([1, 0.8535534, 0.5, 0.1464466, 0])


def test_one_level_is_drawn_for_each_comparison() -> None:
    method = tiny_method("pcrlv2", changed("pcrlv2", levels="draw"))
    weights = [method._weights(context(step), draw) for step in range(20) for draw in range(4)]
    assert all(sorted(w) == [0.0, 1.0] for w in weights)
    assert {tuple(w) for w in weights} == {(0.0, 1.0), (1.0, 0.0)}
    terms = method(batch_of(method, [0, 1]), context(0))
    assert torch.isfinite(terms.total)


def test_local_crops_are_cut_inside_the_union_of_the_global_ones() -> None:
    kind = method_class("pcrlv2")
    shown, local = kind.view_spec(kind.Config()).roles
    assert (local.overlaps, local.inside_union) == (shown.name, True)
    assert (shown.count, shown.keep_clean, local.count) == (2, True, 6)


def test_it_restores_without_skips() -> None:
    method = tiny_method("pcrlv2")
    seen: list[bool] = []
    decode = method.backbone.decode
    method.backbone.decode = lambda maps, skips=True: seen.append(skips) or decode(maps, skips)
    method(batch_of(method, [0, 1]), context(0))
    assert seen == [False, False, False]


def test_at_its_best_it_is_minus_two(monkeypatch: pytest.MonkeyPatch) -> None:
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
