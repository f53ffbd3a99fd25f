"""k-NN label transfer: what it finds, what it does not, and that it neither draws nor changes anything."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssl_core.monitor.label_transfer import Labelled, grid, knn_dice, nearest_labels
from ssl_core.networks import build
from ssl_core.train.engine import Engine, EngineConfig


class Net(nn.Module):
    """As much of a method as the probe needs."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone

    def encoder(self) -> Any:
        return self.backbone


def engine(**settings: Any) -> Engine:
    torch.manual_seed(0)
    small = build("basic_unet", spatial_dims=3, in_channels=1, out_channels=2, features=(4, 4, 8, 8, 16, 4))
    return Engine(Net(small), EngineConfig(steps=5, warmup_steps=0, **settings))


def blocks(count: int) -> tuple[Tensor, Tensor]:
    """Labels in blocks of 16 voxels, and noise."""
    g = torch.Generator().manual_seed(1)
    label = (torch.rand(count, 2, 2, 2, generator=g) > 0.5).long()
    label = label.repeat_interleave(16, 1).repeat_interleave(16, 2).repeat_interleave(16, 3)
    return label, torch.randn(count, 1, 32, 32, 32, generator=g)


def test_nearest_labels_weighs_likeness() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8]])
    query = torch.tensor([[1.0, 0.01], [0.5, 0.9]])
    assert nearest_labels(bank, torch.tensor([1, 0, 0]), query, classes=2, k=3).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("size", "most"), [((32, 32, 32), 1024), ((1, 64, 48), 200), ((5, 90, 7), 10**6), ((3, 3, 3), 1)]
)
def test_the_grid_is_even_and_bounded(size: tuple[int, int, int], most: int) -> None:
    places = grid(size, most)
    assert 1 <= len(places) <= most
    assert len(places.unique(dim=0)) == len(places)
    assert len(places) >= min(most, math.prod(size)) // 4
    for axis, n in enumerate(size):
        along = places[:, axis].unique()
        assert int(along.min()) >= 0
        assert int(along.max()) < n
        assert len(along) < 2 or int(along.diff().max() - along.diff().min()) <= 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_labels_transfer_where_features_tell_them_and_not_by_chance(precision: str) -> None:
    label, noise = blocks(4)
    told = knn_dice(engine(precision=precision), Labelled(3.0 * label[:, None] + 0.1 * noise, label, 2))
    blind = knn_dice(engine(precision=precision), Labelled(noise, label, 2))
    assert told > 0.85
    assert 0.3 < blind < 0.7


def test_the_same_crop_is_known_exactly_and_values_of_labels_mean_nothing() -> None:
    label, noise = blocks(1)
    twice = torch.cat([noise, noise]), torch.cat([label, label])
    assert knn_dice(engine(), Labelled(*twice, 1), k=1) == 1.0
    assert knn_dice(engine(), Labelled(twice[0], 900 * twice[1], 1), k=1) == 1.0


def test_dice_counts_structures_and_not_the_background() -> None:
    label, noise = blocks(2)
    label[1] = 0
    assert math.isnan(knn_dice(engine(), Labelled(noise, label, 1)))
    label[1] = 2  # a structure that no known crop has
    assert knn_dice(engine(), Labelled(noise, label, 1)) == 0.0


def test_it_changes_nothing_and_draws_nothing() -> None:
    watched = engine()
    watched.method.backbone.eval()
    before = {k: v.clone() for k, v in watched.method.state_dict().items()}
    random = torch.get_rng_state()
    label, noise = blocks(2)
    first = knn_dice(watched, Labelled(noise, label, 1))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, before[k]) for k, v in watched.method.state_dict().items())
    assert watched.method.training
    assert not watched.method.backbone.training
    assert knn_dice(watched, Labelled(noise, label, 1)) == first
