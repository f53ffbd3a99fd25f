"""Norm, moving average, heads, masks and draws that the methods are made of."""

import copy
import math
from itertools import combinations

import pytest
import torch
from torch import nn

from ssl_core.methods.parts import counter_random
from ssl_core.methods.parts.masking import block_mask
from ssl_core.methods.parts.region_pixels import map_at, region_pixels
from ssl_core.networks.backbone import Level
from ssl_core.networks.batch_norm import GlobalBatchNorm, globalise
from ssl_core.networks.ema import follow, momentum_at, short_run_momentum, target_of
from ssl_core.networks.heads import Norm, PixelHead, head, head_at


@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5), (2, 3, 4, 5, 6)])
@pytest.mark.parametrize("affine", [True, False])
def test_on_one_rank_the_norm_equals_torch(shape: tuple[int, ...], affine: bool) -> None:
    torch.manual_seed(0)
    kind = nn.BatchNorm3d if len(shape) == 5 else nn.BatchNorm1d
    theirs = kind(3, affine=affine).double()
    ours = GlobalBatchNorm(3, affine=affine).double()
    ours.load_state_dict(theirs.state_dict())
    for _ in range(3):
        x = (5 + 3 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
        y = x.detach().clone().requires_grad_()
        a, b = ours(x), theirs(y)
        weight = torch.randn_like(a)
        (a * weight).sum().backward()
        (b * weight).sum().backward()
        assert torch.allclose(a, b, atol=1e-12)
        assert x.grad is not None
        assert y.grad is not None
        assert torch.allclose(x.grad, y.grad, atol=1e-12)
    for key, value in theirs.state_dict().items():
        assert torch.allclose(ours.state_dict()[key].double(), value.double(), atol=1e-12), key
    assert torch.allclose(ours.eval()(x), theirs.eval()(x), atol=1e-12)


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("training", [True, False])
def test_a_head_at_a_few_positions_says_what_the_whole_head_says_there(norm: Norm, training: bool) -> None:
    torch.manual_seed(0)
    whole = head([3, 16, 4], dense=True, norm=norm).double()
    for parameter in whole.parameters():
        nn.init.normal_(parameter)
    part = copy.deepcopy(whole)
    index = torch.randint(60, (2, 7))
    weight = torch.randn(2, 7, 4, dtype=torch.float64)
    for _ in range(2):
        x = (5 + torch.randn(2, 3, 3, 4, 5, dtype=torch.float64)).requires_grad_()
        y = x.detach().clone().requires_grad_()
        every = whole.train(training)(x).flatten(2).transpose(1, 2)
        wanted = torch.stack([every[b, index[b]] for b in range(2)])
        found = head_at(part.train(training), y, index)
        assert torch.allclose(found, wanted, atol=1e-12)
        (wanted * weight).sum().backward()
        (found * weight).sum().backward()
        assert x.grad is not None
        assert y.grad is not None
        assert torch.allclose(x.grad, y.grad, atol=1e-12)
    for a, b in zip(whole.parameters(), part.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.allclose(a.grad, b.grad, atol=1e-10)
    for key, value in whole.state_dict().items():
        assert torch.allclose(part.state_dict()[key].double(), value.double(), atol=1e-12), key


def test_the_statistics_of_a_linear_output_keep_their_digits() -> None:
    """In float32, with inputs far from 0."""
    torch.manual_seed(0)
    x = 1e3 + torch.randn(2, 8, 4, 4, 4)
    layers = head([8, 16, 4], dense=True)
    index = torch.arange(10).expand(2, -1)
    wanted = copy.deepcopy(layers).double()(x.double()).flatten(2)[:, :, :10].transpose(1, 2)
    assert torch.allclose(head_at(layers, x, index).double(), wanted, atol=5e-3)


def test_large_means_do_not_cost_digits() -> None:
    x = 1e4 + torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    wanted = nn.BatchNorm1d(2).double()(x.double())
    assert torch.allclose(GlobalBatchNorm(2)(x).double(), wanted, atol=2e-3)


def test_a_single_value_gives_zero_and_not_nan() -> None:
    x = torch.ones(1, 4, requires_grad=True)
    out = GlobalBatchNorm(4)(x)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(1, 4))
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_batch_norms_inside_a_network_are_replaced_under_their_names() -> None:
    net = nn.Sequential(nn.Conv3d(1, 2, 1), nn.Sequential(nn.BatchNorm3d(2), nn.ReLU()))
    names = list(net.state_dict())
    assert list(globalise(net).state_dict()) == names
    assert isinstance(net[1][0], GlobalBatchNorm)


def test_momentum_follows_a_cosine_to_one() -> None:
    found = [momentum_at(k, 400, 0.996) for k in (0, 100, 200, 300, 400, 500)]
    assert found == pytest.approx([0.996, 0.9965858, 0.998, 0.9994142, 1.0, 1.0], abs=1e-7)


def test_a_young_target_follows_faster_and_an_old_one_by_the_cosine() -> None:
    assert [short_run_momentum(k, 10**6, 0.99) for k in (0, 8, 90)] == pytest.approx([0.1, 0.5, 0.91])
    assert short_run_momentum(5000, 10**4, 0.99) == momentum_at(5000, 10**4, 0.99)


def test_the_target_follows_exactly_and_takes_no_gradient() -> None:
    online = nn.Linear(3, 2).double()
    target = target_of(online)
    old = [p.detach().clone() for p in target.parameters()]
    with torch.no_grad():
        for p in online.parameters():
            p.add_(1.0)
    follow(target, online, 0.9)
    for p, before, new in zip(target.parameters(), old, online.parameters(), strict=True):
        assert not p.requires_grad
        assert torch.allclose(p, 0.9 * before + 0.1 * new, rtol=0, atol=1e-15)


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_a_dense_head_is_the_same_head_at_every_position(norm: str) -> None:
    dense = head([6, 16, 4], dense=True, norm=norm)  # type: ignore[arg-type]
    flat = head([6, 16, 4], norm=norm)  # type: ignore[arg-type]
    flat.load_state_dict({k: v.flatten(1) if v.dim() == 5 else v for k, v in dense.state_dict().items()})
    x = torch.randn(2, 6, 1, 1, 3) if norm != "group" else torch.randn(6, 6, 1, 1, 1)
    rows = x.permute(0, 2, 3, 4, 1).reshape(-1, 6)
    wanted = flat(rows).view(*x.shape[:1], *x.shape[2:], 4).permute(0, 4, 1, 2, 3)
    assert torch.allclose(dense(x), wanted, atol=1e-5)


def test_a_pixel_head_reaches_the_input_resolution() -> None:
    level = Level(4, (2, 4, 4), (0.5, 0.5, 0.5))
    assert PixelHead(level, 1)(torch.randn(2, 4, 3, 3, 3)).shape == (2, 1, 6, 12, 12)


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.75, 1.0])
def test_masks_hide_whole_blocks_in_the_wanted_share(ratio: float) -> None:
    mask = block_mask(3, torch.arange(5), (8, 8, 10), 4, ratio, "x")
    assert mask.shape == (5, 1, 8, 8, 10)
    blocks = mask[:, 0, ::4, ::4, ::4].flatten(1)
    assert blocks.sum(1).tolist() == [min(max(round(ratio * 12), 1), 11)] * 5
    rebuilt = mask[:, :, ::4, ::4, ::4].repeat_interleave(4, 2).repeat_interleave(4, 3).repeat_interleave(4, 4)
    assert torch.equal(mask, rebuilt[..., :10])


def test_each_seed_sample_and_purpose_has_a_mask_of_its_own_in_any_batch() -> None:
    masks = [
        block_mask(seed, torch.arange(5), (8, 8, 10), 4, 0.5, purpose)
        for seed, purpose in ((3, "x"), (4, "x"), (3, "y"))
    ]
    assert all((a != b).flatten(1).any(1).sum() >= 4 for a, b in combinations(masks, 2))
    assert (masks[0][1:] != masks[0][:-1]).flatten(1).any(1).sum() >= 3
    assert torch.equal(block_mask(3, torch.tensor([4, 1]), (8, 8, 10), 4, 0.5, "x"), masks[0][[4, 1]])


def test_draws_depend_on_seed_sample_and_purpose_and_not_on_the_batch() -> None:
    every = counter_random.uniforms(1, torch.arange(6), "a", 5)
    assert torch.equal(every[3:5], counter_random.uniforms(1, torch.tensor([3, 4]), "a", 5))
    assert not torch.equal(every, counter_random.uniforms(2, torch.arange(6), "a", 5))
    assert not torch.equal(every, counter_random.uniforms(1, torch.arange(6), "b", 5))
    far = counter_random.uniforms(1, torch.tensor([7 + (1 << 40)]), "a", 5)
    assert not torch.equal(far, counter_random.uniforms(1, torch.tensor([7]), "a", 5))


def test_draws_are_uniform_and_uncorrelated() -> None:
    u = counter_random.uniforms(0, torch.arange(400), "a", 250)
    assert float(u.mean()) == pytest.approx(0.5, abs=3 * math.sqrt(1 / 12 / u.numel()))
    counts = torch.histc(u, 20, 0, 1)
    expected = u.numel() / 20
    assert float(((counts - expected) ** 2 / expected).sum()) < 43.8  # 0.1 % tail of chi-square with 19 degrees
    for a, b in ((u[:, :-1], u[:, 1:]), (u[:-1], u[1:])):
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(float(correlation)) < 4 / math.sqrt(a.numel())


def test_region_pixels_are_distinct_and_of_their_region() -> None:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 9, (3, 200), generator=g)
    usable = ids > 0
    index, region, valid = region_pixels(ids, usable, 6, 8, seed=1, sample_B=torch.arange(3))
    assert index.shape == (3, 6, 8)
    assert valid.all()
    for b in range(3):
        assert len(set(region[b].tolist())) == 6
        assert 0 not in region[b]
        for r in range(6):
            assert len(set(index[b, r].tolist())) == 8
            assert (ids[b, index[b, r]] == region[b, r]).all()


def test_regions_too_small_or_too_few_are_marked() -> None:
    ids = torch.tensor([[1] * 10 + [2] * 3 + [0] * 7, [0] * 20])
    _, region, valid = region_pixels(ids, ids > 0, 4, 4, seed=0, sample_B=torch.arange(2))
    assert valid.sum(1).tolist() == [1, 0]
    assert region[0][valid[0]].tolist() == [1]


def test_every_region_is_as_likely_however_large() -> None:
    ids = torch.tensor([[1] * 180 + [2] * 10 + [3] * 10]).repeat(600, 1)
    _, region, valid = region_pixels(ids, ids > 0, 1, 5, seed=0, sample_B=torch.arange(600))
    assert valid.all()
    share = torch.bincount(region[:, 0], minlength=4)[1:] / 600
    assert torch.allclose(share, torch.full((3,), 1 / 3), atol=0.08)


def test_a_map_is_read_at_the_centres_of_features() -> None:
    ids = torch.arange(8).view(1, 1, 1, 8)
    conv, pool = Level(1, (1, 1, 2), (0.5, 0.5, 0.5)), Level(1, (1, 1, 4), (0.5, 0.5, 2.0))
    assert map_at(conv, ids, (1, 1, 4))[0, 0, 0].tolist() == [0, 2, 4, 6]
    assert map_at(pool, ids, (1, 1, 2))[0, 0, 0].tolist() == [1, 5]
    twice = Level(1, (1, 1, 4), (0.5, 0.5, 0.5))  # two strided convolutions, whose cells have their middle elsewhere
    assert map_at(twice, ids, (1, 1, 2))[0, 0, 0].tolist() == [0, 4]
