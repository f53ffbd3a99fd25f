"""Losses against slow references, closed forms and the numbers of the reference sheet."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ssl_core.losses.alignment import local_alignment, windowed_alignment
from ssl_core.losses.contrast import multi_positive_nce, near
from ssl_core.losses.cosine import distance, masked_mean, siamese, unit
from ssl_core.losses.info_nce import nt_xent, queue_nce
from ssl_core.losses.regions import pixel_contrast, prototype_contrast, region_means
from ssl_core.losses.restoration import restoration
from tests.kit.embeddings import B, V, not_itself, toy, toy_positive
from tests.oracles import losses as slow


@pytest.mark.parametrize(
    ("threshold", "every", "pos_neg"),
    [(0.01, 6.298748, 6.298748), (0.1, 9.706100, 9.705348), (0.45, 11.817889, 7.247576), (2.0, 11.015940, None)],
)
def test_positions_define_positives_as_in_the_reference_numbers(
    threshold: float, every: float, pos_neg: float | None
) -> None:
    z, positive, other = toy(), toy_positive(threshold), not_itself(V * B)
    assert float(multi_positive_nce(z, z, positive, other, 0.1)) == pytest.approx(every, abs=2e-6)
    found = float(multi_positive_nce(z, z, positive, other, 0.1, "pos_neg"))
    assert found == pytest.approx(0.0 if pos_neg is None else pos_neg, abs=2e-6)
    for denominator in ("all", "pos_neg"):
        wanted = slow.contrast(z.numpy(), positive.tolist(), 0.1, denominator)
        assert float(multi_positive_nce(z, z, positive, other, 0.1, denominator)) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(("temperature", "wanted"), [(0.1, 6.298748), (0.5, 1.849609)])
def test_nt_xent_is_the_contrast_with_one_positive(temperature: float, wanted: float) -> None:
    z, index = toy(), torch.arange(V * B)
    found = nt_xent(z, z, (index + B) % (V * B), index, temperature)
    assert float(found) == pytest.approx(wanted, abs=2e-6)


def test_contrast_closed_forms() -> None:
    two = torch.eye(2, dtype=torch.float64).repeat(2, 1)
    pairs, other = (torch.arange(4)[:, None] - torch.arange(4)) % 2 == 0, not_itself(4)
    assert float(multi_positive_nce(two, two, pairs, other, 0.1)) == pytest.approx(math.log(1 + 2 * math.exp(-10)))
    same = torch.ones(4, 3, dtype=torch.float64)
    assert float(multi_positive_nce(same, same, pairs, other, 0.1)) == pytest.approx(math.log(3))
    wanted = 20 / 3 + math.log(1 + 2 * math.exp(-10))
    assert float(multi_positive_nce(two, two, other, other, 0.1)) == pytest.approx(wanted)


def test_queue_contrast() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, n = (torch.randn(s, 5, generator=g, dtype=torch.float64) for s in (3, 3, 7))
    wanted = slow.queue(q.numpy(), k.numpy(), n.numpy(), 0.2)
    assert float(queue_nce(q, k, unit(n, 1), 0.2)) == pytest.approx(wanted, abs=1e-12)
    keep = torch.ones(3, 7, dtype=torch.bool)
    keep[:, 4:] = False
    wanted = slow.queue(q.numpy(), k.numpy(), n.numpy()[:4], 0.2)
    assert float(queue_nce(q, k, unit(n, 1), 0.2, keep)) == pytest.approx(wanted, abs=1e-12)
    q.requires_grad_()
    alone = queue_nce(q, k, unit(n, 1), 0.2, torch.zeros(3, 7, dtype=torch.bool))
    alone.backward()
    assert alone.item() == 0
    assert not q.grad.any(), "a queue without negatives has a gradient"


def test_anchors_without_a_positive_are_left_out_of_the_mean() -> None:
    z, positive = toy(), toy_positive(0.1)
    positive[2], positive[:, 2] = False, False
    wanted = slow.contrast(z.numpy(), positive.tolist(), 0.1)
    found = multi_positive_nce(z, z, positive, not_itself(V * B), 0.1)
    assert float(found) == pytest.approx(wanted, abs=1e-12)
    assert float(multi_positive_nce(z, z, toy_positive(0.1), not_itself(V * B), 0.1)) != pytest.approx(wanted, abs=1e-3)


def test_slices_exactly_a_threshold_apart_are_never_positives() -> None:
    # Twenty slices: position (i + 1)/20 against threshold 0.1 goes both ways in floating point.
    index = torch.arange(1, 21, dtype=torch.float64)
    close = near(index, torch.full((20,), 20.0), index, torch.full((20,), 20.0), 0.1)
    assert torch.equal(close, (index[:, None] - index[None]).abs() < 2)
    in_floats = ((index[:, None] / 20 - index[None] / 20).abs() < 0.1) & ((index[:, None] - index[None]).abs() == 2)
    assert in_floats.any()


def test_positions_of_volumes_of_different_length_compare_exactly() -> None:
    a, n = torch.tensor([10.5, 3.0]), torch.tensor([30.0, 10.0])
    b, m = torch.tensor([14.0, 14.5]), torch.tensor([40.0, 40.0])
    # 0.35 - 0.35 = 0 and 0.3 - 0.35 = -0.05 for the first key
    assert near(a, n, b, m, 0.05).tolist() == [[True, True], [False, False]]
    assert near(a, n, b, m, 0.0501).tolist() == [[True, True], [True, False]]


def test_a_threshold_of_many_digits_does_not_overflow() -> None:
    index, length = torch.arange(300, dtype=torch.float64) + 0.5, torch.full((300,), 300.0)
    apart = (index[:, None] - index[None]).abs()
    assert torch.equal(near(index, length, index, length, 1 / 3), apart < 100)
    assert torch.equal(near(index, length, index, length, 0.123456789), apart <= 37)


ONE_HOT = [
    (3, 4, 0.1, 1.0987333, 2.3978953, 9.0796e-5, 1.0986123),
    (3, 4, 0.5, 1.4067542, 2.3978953, 0.2395448, 1.0986123),
    (5, 8, 0.07, 1.9459130, 3.6635616, 2.4995e-6, 1.6094379),
]


@pytest.mark.parametrize(("r", "k", "t", "a_hot", "a_same", "b_hot", "b_same"), ONE_HOT)
def test_region_contrast_closed_forms(
    r: int, k: int, t: float, a_hot: float, a_same: float, b_hot: float, b_same: float
) -> None:
    hot = torch.eye(r, dtype=torch.float64)
    region = torch.arange(r).repeat_interleave(k)[None]
    valid = torch.ones_like(region, dtype=torch.bool)
    pixels = hot.repeat_interleave(k, 0)[None]
    assert float(pixel_contrast(pixels, region, valid, t)) == pytest.approx(a_hot, rel=1e-6)
    assert float(pixel_contrast(torch.ones_like(pixels), region, valid, t)) == pytest.approx(a_same, rel=1e-6)
    seen = torch.ones(1, r, dtype=torch.bool)
    assert float(prototype_contrast(hot[None], hot[None], seen, t)) == pytest.approx(b_hot, rel=1e-4)
    assert float(prototype_contrast(hot[None] * 0 + 1, hot[None] * 0 + 1, seen, t)) == pytest.approx(b_same, rel=1e-6)


@pytest.mark.parametrize(("t", "wanted"), [(0.1, 19.830141), (0.5, 4.537053)])
def test_pixel_contrast_of_six_pixels(t: float, wanted: float) -> None:
    n, c = torch.meshgrid(torch.arange(6.0), torch.arange(5.0), indexing="ij")
    z = torch.sin((1 + 3 * n + 7 * c).double())
    region = torch.tensor([[0, 0, 1, 1, 2, 2]])
    valid = torch.ones(1, 6, dtype=torch.bool)
    assert float(pixel_contrast(z[None], region, valid, t)) == pytest.approx(wanted, abs=2e-6)
    # Numbers of regions mean nothing, and another image's region of the same number is no positive.
    renamed = torch.tensor([[7, 7, 3, 3, 100, 100]])
    both = pixel_contrast(torch.stack([z, z.flip(0)]), torch.cat([renamed, renamed]), valid.repeat(2, 1), t)
    assert float(both) == pytest.approx(wanted, abs=2e-6)


def test_prototype_contrast_against_the_slow_reference() -> None:
    g = torch.Generator().manual_seed(1)
    v, w = (torch.randn(1, 4, 6, generator=g, dtype=torch.float64) for _ in range(2))
    valid = torch.tensor([[True, True, False, True]])
    kept = [0, 1, 3]
    a, b = v[0, kept].numpy(), w[0, kept].numpy()
    wanted = (slow.prototypes(a, b, 0.1) + slow.prototypes(b, a, 0.1)) / 2
    assert float(prototype_contrast(v, w, valid, 0.1)) == pytest.approx(wanted, abs=1e-12)


def test_region_means() -> None:
    z = torch.arange(8.0).view(1, 1, 8)
    ids = torch.tensor([[1, 1, 2, 2, 2, 3, 3, 3]])
    means, seen = region_means(z, ids, torch.tensor([[3, 1, 9]]))
    assert means[0, :, 0].tolist() == [6.0, 0.5, 0.0]
    assert seen.tolist() == [[True, True, False]]


def ssal_maps() -> tuple[Tensor, Tensor]:
    c, y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (6, 4, 4)), indexing="ij")
    return torch.sin(1.0 + 2 * c + 3 * y + 1.7 * x), torch.sin(1.3 + 2 * c + 3 * y + 1.7 * x)


def test_local_alignment_reference_numbers() -> None:
    a, b = ssal_maps()
    assert float(local_alignment(a.flatten(1)[None], b.flatten(1)[None])) == pytest.approx(0.01426158, abs=1e-8)
    assert float(local_alignment(b.flatten(1)[None], a.flatten(1)[None])) == pytest.approx(0.01411570, abs=1e-8)
    flat_a, flat_b = a[None, :, None], b[None, :, None]
    assert float(windowed_alignment(flat_a, flat_b, 2)) == pytest.approx(0.04551754, abs=1e-8)
    assert float(windowed_alignment(flat_a, flat_b, 4)) == pytest.approx(0.01426158, abs=1e-8)


@pytest.mark.parametrize("window", [1, 2, 3, 9])
def test_windowed_alignment_against_the_slow_reference(window: int) -> None:
    g = torch.Generator().manual_seed(2)
    a, b = (torch.randn(2, 4, 3, 5, 4, generator=g, dtype=torch.float64) for _ in range(2))
    found = windowed_alignment(a, b, window)
    for i in range(2):
        assert float(found[i]) == pytest.approx(slow.local_alignment(a[i].numpy(), b[i].numpy(), window), abs=1e-12)
    assert (found >= local_alignment(a.flatten(2), b.flatten(2)) - 1e-12).all()


def test_alignment_invariants() -> None:
    a, b = ssal_maps()
    flat_a, flat_b = a.flatten(1)[None], b.flatten(1)[None]
    assert float(local_alignment(flat_a, flat_a)) == pytest.approx(0.0, abs=1e-12)
    shuffled = flat_b[:, :, torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    assert float(local_alignment(flat_a, shuffled)) == pytest.approx(float(local_alignment(flat_a, flat_b)))
    hot = torch.zeros(1, 6, 16, dtype=torch.float64)
    hot[:, 0], other = 1.0, torch.zeros(1, 6, 16, dtype=torch.float64)
    other[:, 1] = 1.0
    assert float(local_alignment(hot, other)) == pytest.approx(1.0)


def test_padding_does_not_count_in_alignment() -> None:
    a, b = ssal_maps()
    seen = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    seen[..., :2, :2] = True
    found = windowed_alignment(a[None, :, None], b[None, :, None], 2, seen)
    wanted = slow.local_alignment(a[:, :2, :2].numpy(), b[:, :2, :2].numpy())
    assert float(found) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("window", [2, 3, 4])
def test_nothing_is_matched_to_padding(window: int) -> None:
    a, b = ssal_maps()
    seen_a, seen_b = torch.zeros(4, 4, dtype=torch.bool), torch.zeros(4, 4, dtype=torch.bool)
    seen_a[:3], seen_b[2:, :3] = True, True
    flat_a, flat_b = a[None, :, None], b[None, :, None]
    gaps = []
    for p in torch.nonzero(seen_a).tolist():
        places = torch.nonzero(seen_b).tolist()
        near = [q for q in places if all(i // window == j // window for i, j in zip(p, q, strict=True))]
        match = [slow.cosine(a[:, p[0], p[1]].numpy(), b[:, q[0], q[1]].numpy()) for q in near]
        gaps += [abs(1 - max(match))] if match else []
    found = windowed_alignment(flat_a, flat_b, window, seen_a[None, None], seen_b[None, None])
    assert float(found) == pytest.approx(sum(gaps) / len(gaps), abs=1e-12)
    assert len(gaps) == {2: 4, 3: 9, 4: 12}[window]  # positions without a match in their window do not count
    nowhere = torch.zeros_like(seen_b[None, None])
    assert float(windowed_alignment(flat_a, flat_b, window, None, nowhere)) == 0.0


def test_per_voxel_distance_is_not_the_flattened_one() -> None:
    a = torch.sin(torch.arange(1.0, 13, dtype=torch.float64)).view(1, 3, 4)
    b = torch.cos(torch.arange(1.0, 13, dtype=torch.float64)).view(1, 3, 4)
    found = distance(a, b, dim=1).mean()
    assert float(found) == pytest.approx(2.048101, abs=1e-6)
    assert float(found) == pytest.approx(slow.per_voxel_distance(a[0].numpy(), b[0].numpy()), abs=1e-12)
    assert float((unit(a, 1) - unit(b, 1)).square().mean()) == pytest.approx(0.682700, abs=1e-6)
    flattened = distance(a.flatten(1), b.flatten(1))
    assert float(flattened) == pytest.approx(2.044706, abs=1e-6)


def test_distance_of_equal_orthogonal_and_opposite_vectors() -> None:
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    assert [float(distance(a, x)) for x in (a, b, -a)] == [0.0, 2.0, 4.0]


def test_masked_mean_keeps_samples_without_positions_in_the_denominator() -> None:
    values = torch.tensor([[1.0, 3.0], [5.0, 7.0]], requires_grad=True)
    mask = torch.tensor([[True, True], [False, False]])
    loss = masked_mean(values, mask)
    loss.backward()
    assert float(loss.detach()) == 1.0
    assert values.grad is not None
    assert values.grad.tolist() == [[0.25, 0.25], [0.0, 0.0]]


def test_siamese_reference_number() -> None:
    n, c = torch.meshgrid(*(torch.arange(k, dtype=torch.float64) for k in (3, 4)), indexing="ij")
    g = [torch.sin(a + 2 * n + 5 * c) for a in (0.1, 0.2, 0.7, 1.1)]
    assert float(siamese(*g)) == pytest.approx(-0.7029690, abs=1e-7)
    assert float(siamese(*g)) == pytest.approx(slow.siamese(*(x.numpy() for x in g)), abs=1e-12)
    assert float(siamese(*g)) == float(siamese(g[2], g[3], g[0], g[1]))
    assert float(siamese(g[0], g[0], g[0], g[0])) == pytest.approx(-1.0)


def test_siamese_sends_no_gradient_to_the_compared_embedding() -> None:
    pre_a, pro_a, pre_b, pro_b = (torch.randn(3, 4, requires_grad=True) for _ in range(4))
    siamese(pre_a, pro_a, pre_b, pro_b).backward()
    assert pre_a.grad is not None
    assert pre_b.grad is not None
    assert pro_a.grad is None
    assert pro_b.grad is None


def test_restoration_counts_hidden_voxels_only() -> None:
    g = np.random.default_rng(0)
    output, target = g.standard_normal((2, 3, 2, 3, 4)), g.standard_normal((2, 3, 2, 3, 4))
    mask = g.random((2, 2, 3, 4)) < 0.5
    mask[1] = False
    found = restoration(*(torch.from_numpy(x) for x in (output, target)), torch.from_numpy(mask)[:, None])
    assert float(found) == pytest.approx(slow.masked_mse(output, target, mask), abs=1e-12)


def test_hubers_error_is_half_the_square_up_to_one_and_linear_beyond() -> None:
    target = torch.tensor([0.0, 0.5, 1.0, 3.0, -2.0]).view(1, 1, 1, 1, 5)
    found = restoration(torch.zeros_like(target), target, torch.ones_like(target), "huber")
    assert float(found) == pytest.approx((0.0 + 0.125 + 0.5 + 2.5 + 1.5) / 5)


EMPTY = {
    "no positives": lambda z: multi_positive_nce(z, z, torch.zeros(4, 4, dtype=torch.bool), not_itself(4), 0.1),
    "no negatives": lambda z: multi_positive_nce(z, z, not_itself(4), not_itself(4), 0.1, "pos_neg"),
    "one sample": lambda z: nt_xent(z[:1], z[:1].detach(), torch.tensor([0]), None, 0.5),
    "one region": lambda z: pixel_contrast(z[None], torch.ones(1, 4).long(), torch.ones(1, 4).bool(), 0.1),
    "no regions": lambda z: pixel_contrast(z[None], torch.ones(1, 4).long(), torch.zeros(1, 4).bool(), 0.1),
    "no prototypes": lambda z: prototype_contrast(z[None], z[None].detach(), torch.zeros(1, 4).bool(), 0.1),
    "no points": lambda z: masked_mean(distance(z, -z)[None], torch.zeros(1, 4).bool()),
    "no windows": lambda z: windowed_alignment(
        z.view(1, 3, 1, 2, 2), z.view(1, 3, 1, 2, 2).detach(), 2, torch.zeros(1, 1, 2, 2).bool()
    ).mean(),
    "nothing hidden": lambda z: restoration(z[None, None, None], z[None, None, None] + 1, torch.zeros(1, 1, 1, 4, 3)),
}


@pytest.mark.parametrize("case", EMPTY)
@pytest.mark.parametrize("value", ["random", "zero", "equal"])
def test_degenerate_input_gives_a_finite_loss_and_gradient(case: str, value: str) -> None:
    z = {"random": torch.randn(4, 3), "zero": torch.zeros(4, 3), "equal": torch.ones(4, 3)}[value].requires_grad_()
    loss = EMPTY[case](z)
    loss.backward()
    assert torch.isfinite(loss)
    assert z.grad is not None
    assert torch.isfinite(z.grad).all()


PAIRS, REGIONS = torch.arange(8) % 4, torch.arange(8)[None] // 4
EXACT = {
    "positives": lambda z: multi_positive_nce(z, z, PAIRS[:, None] == PAIRS, not_itself(8), 0.1),
    "nt_xent": lambda z: nt_xent(z, z, (torch.arange(8) + 4) % 8, torch.arange(8), 0.1),
    "queue": lambda z: queue_nce(z[:4], z[4:], unit(z.flip(1), 1), 0.1),
    "pixels": lambda z: pixel_contrast(z[None], REGIONS, torch.ones(1, 8).bool(), 0.1),
    "prototypes": lambda z: prototype_contrast(z[None], z[None].flip(2), torch.ones(1, 8).bool(), 0.1),
    "means": lambda z: region_means(z.t()[None], REGIONS, torch.tensor([[0, 1]]))[0].sum(),
    "alignment": lambda z: windowed_alignment(z.t().reshape(1, 16, 2, 2, 2), z.reshape(1, 16, 2, 2, 2), 2).mean(),
}


@pytest.mark.parametrize("case", EXACT)
def test_losses_keep_their_digits_under_autocast(case: str) -> None:
    z = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        found = EXACT[case](z)
    assert torch.equal(found, EXACT[case](z))


def test_low_precision_embeddings_are_compared_in_float32() -> None:
    z = torch.randn(8, 16).bfloat16()
    index = torch.arange(8)
    assert nt_xent(z, z, (index + 4) % 8, index, 0.1).dtype == torch.float32
    assert distance(z, z).dtype == torch.float32
