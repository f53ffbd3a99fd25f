"""Probes against closed forms, and the warning where features collapse."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssl_core.methods.base import LossTerms, MethodConfig, train_only
from ssl_core.monitor.collapse import (
    CollapseWarning,
    alignment,
    deepest_trained,
    effective_rank,
    feature_std,
    probe,
    thin,
    uniformity,
    unmatched_cosine,
    vectors,
)
from ssl_core.networks import build
from ssl_core.train.engine import Engine, EngineConfig
from ssl_core.views.types import RoleSpec, View, ViewBatch, ViewSpec


def sphere(n: int, c: int, seed: int = 0) -> Tensor:
    return torch.randn(n, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_feature_std_of_an_even_sphere_is_one_whatever_the_width() -> None:
    for c in (4, 64):
        assert float(feature_std(sphere(20000, c))) == pytest.approx(1.0, abs=0.01)


def test_feature_std_of_two_opposite_directions() -> None:
    x = torch.tensor([[3.0, 0.0], [-5.0, 0.0]])
    assert float(feature_std(x)) == pytest.approx(math.sqrt(2) / 2)


def test_feature_std_of_constant_features_is_zero_and_length_does_not_count() -> None:
    x = torch.ones(10, 8) * torch.arange(1, 11)[:, None]
    assert float(feature_std(x)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_effective_rank_counts_equal_directions(rank: int) -> None:
    q = torch.linalg.qr(sphere(16, 16)).Q[:, :rank]
    x = torch.cat([q.T, -q.T]) + 7.0  # the mean does not count
    assert float(effective_rank(x)) == pytest.approx(rank, abs=1e-5)
    assert float(effective_rank(x.T.contiguous().T)) == pytest.approx(rank, abs=1e-5)


def test_effective_rank_of_known_singular_values() -> None:
    x = torch.zeros(4, 3, dtype=torch.float64)
    x[0, 0], x[1, 0], x[2, 1], x[3, 1] = 3.0, -3.0, 1.0, -1.0
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert float(effective_rank(x)) == pytest.approx(expected)
    wide = torch.cat([x, torch.zeros(4, 9, dtype=torch.float64)], dim=1)
    assert float(effective_rank(wide)) == pytest.approx(expected)


def test_effective_rank_of_constant_features_is_one() -> None:
    assert float(effective_rank(torch.ones(6, 4))) == pytest.approx(1.0)


def test_alignment_closed_form() -> None:
    a = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    b = torch.tensor([[0.0, 5.0], [0.0, 1.0]])
    assert float(alignment(a, b)) == pytest.approx(1.0)  # squared distances 2 and 0


def test_unmatched_cosine_against_a_loop() -> None:
    a, b = sphere(7, 5), sphere(7, 5, seed=1)
    cosines = [float(nn.functional.cosine_similarity(a[i], b[j], dim=0)) for i in range(7) for j in range(7) if i != j]
    assert float(unmatched_cosine(a, b)) == pytest.approx(sum(cosines) / len(cosines), abs=1e-12)
    assert [float(unmatched_cosine(a[:n], b[:n])) for n in (0, 1)] == [0.0, 0.0]


def test_uniformity_against_a_loop() -> None:
    x = sphere(12, 5)
    unit = x / x.norm(dim=1, keepdim=True)
    terms = [math.exp(-2 * float((unit[i] - unit[j]).square().sum())) for i in range(12) for j in range(12) if i != j]
    assert float(uniformity(x)) == pytest.approx(math.log(sum(terms) / len(terms)))
    assert float(uniformity(torch.ones(5, 3))) == pytest.approx(0.0, abs=1e-6)


def test_vectors_and_thinning_keep_places_apart() -> None:
    x = torch.arange(2 * 3 * 2 * 2 * 2.0).reshape(2, 3, 2, 2, 2)
    flat = vectors(x)
    assert flat.shape == (16, 3)
    assert torch.equal(flat[9], x[1, :, 0, 0, 1])
    assert torch.equal(thin(flat, 4), flat[[0, 4, 8, 12]])


class Net(nn.Module):
    """A method around a real backbone."""

    Config = MethodConfig

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = build("basic_unet", spatial_dims=3, in_channels=1, out_channels=2, features=(4, 4, 8, 8, 16, 4))

    @classmethod
    def view_spec(cls, config: Any) -> ViewSpec:
        return ViewSpec((RoleSpec("v", 2, (32, 32, 32)),))

    def forward(self, views: ViewBatch, ctx: Any) -> LossTerms:
        return LossTerms({"x": self.backbone.logits(views.roles["v"][0].image_BCDHW).square().mean()})

    def after_step(self, ctx: Any) -> None:
        pass

    def encoder(self) -> Any:
        return self.backbone


def two_views(shift: float) -> ViewBatch:
    image = torch.randn(3, 1, 32, 32, 32, generator=torch.Generator().manual_seed(3))
    base = torch.eye(3, 4, dtype=torch.float64).repeat(3, 1, 1)
    moved = base.clone()
    moved[:, :, 3] = shift
    middle, valid = torch.full((3, 3), 0.5, dtype=torch.float64), torch.ones_like(image)
    a, b = View(image, base, middle, valid), View(image, moved, middle, valid)
    ones = torch.ones(3, 3, dtype=torch.float64)
    return ViewBatch({"v": (a, b)}, torch.arange(3), torch.arange(3), ones, 64 * ones)


def test_probe_is_quiet_on_a_fresh_network_and_changes_nothing() -> None:
    engine = Engine(Net(), EngineConfig(steps=5, warmup_steps=0))
    engine.method.backbone.eval()
    before = {k: v.clone() for k, v in engine.method.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", CollapseWarning)
        found = probe(engine, two_views(0.0))
    assert found["probe/collapsed"] == 0
    assert found["probe/feature_std"] > 0.5
    assert found["probe/alignment"] == pytest.approx(0.0, abs=1e-6)  # the same pixels at the same place
    assert found["probe/positive_similarity"] == pytest.approx(1.0, abs=1e-6)
    assert -1 <= found["probe/negative_similarity"] < 0.9
    assert all(torch.equal(v, before[k]) for k, v in engine.method.state_dict().items())
    assert engine.method.training
    assert not engine.method.backbone.training


def test_alignment_of_the_same_pixels_at_other_places_is_poor() -> None:
    engine = Engine(Net(), EngineConfig(steps=5, warmup_steps=0))
    found = probe(engine, two_views(9.0))
    assert found["probe/alignment"] > 0.05
    assert found["probe/positive_similarity"] == pytest.approx(1 - found["probe/alignment"] / 2)


def test_views_that_share_nothing_have_no_alignment() -> None:
    engine = Engine(Net(), EngineConfig(steps=5, warmup_steps=0))
    found = probe(engine, two_views(100.0))
    assert not {"probe/alignment", "probe/positive_similarity", "probe/negative_similarity"} & set(found)


def test_constant_features_raise_the_alarm() -> None:
    method = Net()
    with torch.no_grad():
        for p in method.backbone.net.down_4.parameters():
            p.zero_()
        list(method.backbone.net.down_4.parameters())[-1].fill_(1.0)
    engine = Engine(method, EngineConfig(steps=5, warmup_steps=0))
    with pytest.warns(CollapseWarning, match=r"step 0: features have collapsed.*std is 0\.000"):
        found = probe(engine, two_views(0.0))
    assert found["probe/collapsed"] == 1


def test_one_direction_raises_the_alarm() -> None:
    class Line:
        levels = ()
        net = nn.Identity()

        def features(self, x: Tensor, upto: int) -> list[Tensor]:
            return [x[:, :, ::8, ::8, ::8] * torch.tensor([1.0, -2.0, 0.5]).view(1, 3, 1, 1, 1)]

    method = Net()
    method.encoder = Line  # type: ignore[method-assign]
    engine = Engine(method, EngineConfig(steps=5, warmup_steps=0))
    views = two_views(0.0)
    only = ViewBatch({"v": views.roles["v"][:1]}, views.volume_B, views.sample_B, views.spacing_B3, views.shape_B3)
    with pytest.warns(CollapseWarning, match=r"effective rank 1\.00"):
        assert probe(engine, only)["probe/collapsed"] == 1


def test_probes_watch_the_levels_that_are_trained() -> None:
    method = Net()
    assert deepest_trained(method.backbone) == 4
    train_only(method.backbone, method.backbone.level_keys(2))
    assert deepest_trained(method.backbone) == 2
    with torch.no_grad():
        next(iter(method.backbone.net.down_4.parameters())).fill_(math.nan)
    engine = Engine(method, EngineConfig(steps=5, warmup_steps=0))
    assert math.isfinite(probe(engine, two_views(0.0))["probe/feature_std"])
    method.backbone.requires_grad_(False)
    assert deepest_trained(method.backbone) == 4
