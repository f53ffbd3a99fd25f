"""LRC beyond the contract: both forms of its loss worked out again, and its bases."""

import copy
from typing import Any

import numpy as np
import pytest
import torch

from ssl_core.testing.method import (
    context,
    tiny_method,
    train,
    trained,
)
from ssl_core.views.types import ViewBatch
from storage.errors import ConfigError
from tests.kit.method_formulas import (
    encoder_maps,
)
from tests.kit.methods import (
    assert_gradient_is_the_derivative,
    assert_trains_on_single_slices,
    batch_of,
    changed,
    on_slices,
    perturbed,
)
from tests.oracles import losses as slow

BASE = {"hidden": 16, "out": 8}


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
def test_form_a_is_its_formula(base: str) -> None:
    method, batch = perturbed("lrc", base=base, base_settings={"hidden": 16, "out": 8}, w_local=0.5, temperature=0.3)
    name = method.config.superpixels.name
    regions_of_four(batch, name)
    each = []
    for view in batch.roles["global"]:
        with torch.no_grad():
            dense = method.dense(method.backbone.decode(encoder_maps(method.backbone, view))[-1])
        for z, ids in zip(dense, view.maps[name], strict=True):
            kept = torch.nonzero(ids.flatten())[:, 0]
            pixels, number = z.flatten(1)[:, kept].t().numpy(), ids.flatten()[kept].tolist()
            same = [[m == n for n in number] for m in number]
            each.append(slow.contrast(pixels, same, 0.3))
    terms = method(batch, context(0))
    assert terms.terms["region"].item() == pytest.approx(0.5 * float(np.mean(each)), abs=1e-10)
    assert terms.monitors["regions"].item() == 3


def test_form_b_is_its_formula() -> None:
    method, batch = perturbed("lrc", form="B", base="simclr", base_settings={"hidden": 16, "out": 8}, temperature=0.3)
    name = method.config.superpixels.name
    regions_of_four(batch, name, missing=77)
    means: list[list[np.ndarray]] = []
    for view in batch.roles["global"]:
        with torch.no_grad():
            dense = method.dense(method.backbone.decode(encoder_maps(method.backbone, view))[-1]).numpy()
        means.append([])
        for z, ids in zip(dense, view.maps[name].numpy(), strict=True):
            rows_ = [[slow.unit(x) for x in z[:, ids == n].T] for n in (5, 31, 900)]
            means[-1].append(np.array([np.mean(r, axis=0) for r in rows_]))
    each = [slow.prototypes(means[i][b], means[1 - i][b], 0.3) for i in range(2) for b in range(2)]
    terms = method(batch, context(0))
    assert terms.terms["region"].item() == pytest.approx(float(np.mean(each)), abs=1e-10)
    assert terms.monitors["regions"].item() == 3


@pytest.mark.parametrize(
    "settings", [{}, {"form": "B", "base": "simclr", "base_settings": BASE}], ids=["form A", "form B"]
)
def test_the_gradient_is_the_derivative_of_the_loss(settings: dict[str, Any]) -> None:
    assert_gradient_is_the_derivative("lrc", **settings)


@pytest.mark.parametrize("base", ["mocov2", "byol", "simclr", "supervised"])
def test_it_adds_to_its_base_without_changing_it(base: str) -> None:
    settings = {"views": 2, "values": [223, 322]} if base == "supervised" else {"hidden": 16, "out": 8}
    lrc = tiny_method("lrc", changed("lrc", base=base, base_settings=settings)).double()
    batch = batch_of(lrc, [0, 1], torch.float64)
    terms = lrc(batch, context(0)).terms
    alone = copy.deepcopy(lrc.base)(batch, context(0)).terms
    assert set(terms) == {*alone, "region"}
    assert all(terms[k].item() == pytest.approx(alone[k].item(), abs=1e-12) for k in alone)


@pytest.mark.parametrize("form", ["A", "B"])
def test_on_a_single_region_it_adds_nothing(form: str) -> None:
    lrc = tiny_method("lrc", changed("lrc", form=form))
    batch = batch_of(lrc, [0, 1])
    for view in batch.roles["global"]:
        view.maps[lrc.config.superpixels.name].fill_(1)
    terms = lrc(batch, context(0))
    terms.total.backward()
    assert terms.terms["region"].item() == 0.0
    assert all(torch.isfinite(p.grad).all() for p in trained(lrc))


def test_form_b_learns() -> None:
    lrc = tiny_method("lrc", changed("lrc", form="B", base="simclr", base_settings={"hidden": 16, "out": 8}))
    batch = batch_of(lrc, [0, 1])
    first = lrc(batch, context(0)).terms["region"].item()
    train(lrc, batch, range(15), torch.optim.AdamW(trained(lrc), lr=1e-2))
    assert lrc(batch, context(15)).terms["region"].item() < first


def test_form_b_wants_two_views_of_a_sample() -> None:
    with pytest.raises(ConfigError, match="two views"):
        changed("lrc", form="B", base="supervised", base_settings={})
    lrc = tiny_method("lrc", changed("lrc", form="B", base="supervised", base_settings={"views": 2}))
    assert lrc(batch_of(lrc, [0, 1]), context(0)).terms["region"] > 0


def test_it_shares_the_pass_with_a_base_that_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    lrc = tiny_method("lrc", changed("lrc", base="supervised", base_settings={"views": 2}))
    passes: list[int] = []
    decode = lrc.backbone.decode
    monkeypatch.setattr(lrc.backbone, "decode", lambda features: passes.append(1) or decode(features))
    lrc(batch_of(lrc, [0, 1]), context(0))
    assert len(passes) == 2  # one a view


def test_settings_of_the_base_are_checked_at_once() -> None:
    with pytest.raises(ConfigError, match="temprature"):
        changed("lrc", base_settings={"temprature": 0.1})


def test_crops_that_the_base_would_not_get_are_refused() -> None:
    with pytest.raises(ConfigError, match="crops"):
        changed("lrc", base_settings={"crops": {"size_DHW": (16, 16, 16)}})


def test_it_trains_on_single_slices() -> None:
    settings = {"base": "simclr", "hidden": 8, "regions": 4, "pixels": 4, "superpixels": {"mode": "slices"}}
    assert_trains_on_single_slices(*on_slices("lrc", **settings))
