"""Cheap signs of what a representation is worth while it is learned, and of its collapse.

A loss can fall to its least while features turn constant (no repulsion), fill one direction (dimensional collapse), or
stop telling places apart. Features are vectors of an encoder map, one a location. N vectors, C channels.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssl_core.methods.parts.points import sample_features, shared_points
from ssl_core.networks.backbone import Backbone
from ssl_core.train.engine import Engine
from ssl_core.views.types import View, ViewBatch

LEAST_STD = 0.05
"""Least healthy `feature_std`, as a share of 1/sqrt(C). A fresh BasicUNet has 0.7 to 0.9."""

LEAST_RANK = 1.5
"""Least healthy effective rank: below, one direction carries nearly everything."""

_MOST_VECTORS = 2048
_LEAST_SIDE = 4  # features along each axis that the map for alignment should have, for points to lie between them


class CollapseWarning(UserWarning):
    """Features have become (nearly) constant, or vary along one direction only."""


def probe(engine: Engine, views: ViewBatch) -> dict[str, float]:
    """Probe the encoder on a batch; a hook for `ssl_core.train.loop.fit`.

    Spread is measured at the deepest level that the method trains, alignment at the deepest of these that has four
    features along each axis.

    Args:
        engine: Its method is put into evaluation mode for the probe and back; nothing of its state changes.
        views: The step's views.

    Returns:
        Means over ranks: `probe/feature_std` (share of 1/sqrt(C)), `probe/effective_rank`, `probe/uniformity` and
        `probe/collapsed` (0 or 1). Where samples have two views that overlap, also `probe/alignment`, and the mean
        cosine of features of one place in both views, `probe/positive_similarity`, beside that of features of
        different places or samples, `probe/negative_similarity`.

    Warns:
        CollapseWarning: on rank 0, when `feature_std` is below `LEAST_STD` or the rank below `LEAST_RANK`.
    """
    method: nn.Module = engine.method
    encoder: Backbone = method.encoder()  # type: ignore[operator]
    all_views = [view for role in views.roles.values() for view in role]
    with evaluation(method), torch.autocast(engine.device.type, torch.bfloat16, enabled=engine.precision == "bf16"):
        upto = deepest_trained(encoder)
        maps = [encoder.features(view.image_BCDHW, upto) for view in all_views[:2]]
    vectors_NC = thin(vectors(maps[0][-1]))
    figures = {
        "probe/feature_std": feature_std(vectors_NC),
        "probe/effective_rank": effective_rank(vectors_NC),
        "probe/uniformity": uniformity(vectors_NC),
    }
    local = torch.stack([value.double() for value in figures.values()])
    means = dict(zip(figures, engine.collectives.mean(local).tolist(), strict=True))
    if len(maps) == 2:
        matched = _matched(encoder, maps[0], maps[1], all_views, views.shape_B3)
        distance, points, cosine, pairs = engine.collectives.sum(matched).tolist()
        if points:
            means["probe/alignment"] = distance / points
            means["probe/positive_similarity"] = 1 - means["probe/alignment"] / 2  # |a - b|^2 = 2 - 2 cos
        if pairs:
            means["probe/negative_similarity"] = cosine / pairs
    collapsed = means["probe/feature_std"] < LEAST_STD or means["probe/effective_rank"] < LEAST_RANK
    if collapsed and engine.collectives.rank == 0:
        warnings.warn(
            f"step {engine.step_done}: features have collapsed: their std is {means['probe/feature_std']:.3f} of "
            f"1/sqrt(C) (healthy above {LEAST_STD}), their effective rank {means['probe/effective_rank']:.2f} "
            f"(healthy above {LEAST_RANK}); lower the learning rate, or add negatives or more decorrelation",
            CollapseWarning,
            stacklevel=2,
        )
    return means | {"probe/collapsed": float(collapsed)}


def deepest_trained(encoder: Backbone) -> int:
    """The deepest level of which all weights are trained; the last where none is. Local methods stop before the end."""
    trained = {name for name, parameter in encoder.net.named_parameters() if parameter.requires_grad}
    every = {name for name, _ in encoder.net.named_parameters()}
    whole = [i for i in range(len(encoder.levels)) if every.intersection(encoder.level_keys(i)) <= trained]
    return max(whole, default=len(encoder.levels) - 1)


def vectors(map_BCdhw: Tensor) -> Tensor:
    """One vector for each location, (N, C), at least float32."""
    flat_NC = map_BCdhw.detach().movedim(1, -1).flatten(0, -2)
    return flat_NC if flat_NC.dtype == torch.float64 else flat_NC.float()


def thin(vectors_NC: Tensor, most: int = _MOST_VECTORS) -> Tensor:
    """At most `most` vectors, evenly spread over the batch."""
    count = len(vectors_NC)
    if count <= most:
        return vectors_NC
    return vectors_NC[torch.arange(most, device=vectors_NC.device) * count // most]


def feature_std(vectors_NC: Tensor) -> Tensor:
    """Mean over channels of the standard deviation of L2-normalised features, as a share of 1/sqrt(C).

    1 for directions spread evenly over the sphere, 0 for constant features (Chen and He 2021, SimSiam, section 4.1).
    """
    unit_NC = functional.normalize(vectors_NC, dim=1)
    return unit_NC.std(dim=0, correction=0).mean() * math.sqrt(unit_NC.shape[1])


def effective_rank(vectors_NC: Tensor) -> Tensor:
    """exp of the entropy of the centred features' singular values over their sum (Roy and Vetterli 2007).

    Between 1 (one direction; also for constant features) and min(N - 1, C).
    """
    centred_NC = vectors_NC.double() - vectors_NC.double().mean(dim=0)
    n, c = centred_NC.shape
    gram = centred_NC.T @ centred_NC if c <= n else centred_NC @ centred_NC.T
    squares = torch.linalg.eigvalsh(gram).clamp_min(0)
    # Rounding leaves squares near 1e-16 of the largest, whose roots would count.
    singular = torch.where(squares > 1e-13 * squares.max(), squares, 0).sqrt()
    share = singular / singular.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return torch.special.entr(share).sum().exp()


def alignment(a_NC: Tensor, b_NC: Tensor) -> Tensor:
    """Mean squared distance of matched unit vectors, 0 to 4 (Wang and Isola 2020, alpha = 2)."""
    return (functional.normalize(a_NC, dim=1) - functional.normalize(b_NC, dim=1)).square().sum(dim=1).mean()


def unmatched_cosine(a_NC: Tensor, b_NC: Tensor) -> Tensor:
    """Mean cosine of row i of `a` with row j of `b` over all i other than j; 0 for fewer than two rows."""
    a, b = functional.normalize(a_NC, dim=1).double(), functional.normalize(b_NC, dim=1).double()
    # All pairs at once are the product of the sums.
    return ((a.sum(0) * b.sum(0)).sum() - (a * b).sum()) / max(len(a) * (len(a) - 1), 1)


def uniformity(vectors_NC: Tensor) -> Tensor:
    """log of the mean over pairs of exp(-2 squared distance) of unit vectors (Wang and Isola 2020, t = 2).

    0 for constant features, down to -4 for a sphere of many dimensions filled evenly.
    """
    unit_NC = functional.normalize(vectors_NC, dim=1).double()
    n = len(unit_NC)
    if n < 2:
        return unit_NC.new_zeros(())
    squares_NN = (2 - 2 * unit_NC @ unit_NC.T).clamp_min(0)
    logs_NN = (-2 * squares_NN).masked_fill(torch.eye(n, dtype=torch.bool, device=unit_NC.device), -math.inf)
    return torch.logsumexp(logs_NN.flatten(), dim=0) - math.log(n * (n - 1))


@contextmanager
def evaluation(method: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and back to every module's own mode."""
    modes = [(module, module.training) for module in method.modules()]
    method.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _matched(
    encoder: Backbone, maps_a: list[Tensor], maps_b: list[Tensor], all_views: list[View], shape_B3: Tensor
) -> Tensor:
    """(4,): sum of squared distances over matched points of two views and their number, of cosines over the other
    pairs and theirs.
    """
    sides = [min(*a.shape[2:], *b.shape[2:]) for a, b in zip(maps_a, maps_b, strict=True)]
    index = max((i for i, side in enumerate(sides) if side >= _LEAST_SIDE), default=0)
    depth, height, width = maps_a[index].shape[2:]
    a_BM3, b_BM3, valid_BM = shared_points(all_views[0], all_views[1], (depth, height, width), shape_B3)
    a_BMC, inside_a = sample_features(maps_a[index], encoder.levels[index], a_BM3)
    b_BMC, inside_b = sample_features(maps_b[index], encoder.levels[index], b_BM3)
    keep_BM = valid_BM & inside_a & inside_b
    a_NC, b_NC = a_BMC[keep_BM], b_BMC[keep_BM]
    count = keep_BM.sum().double()
    pairs = count * (count - 1).clamp_min(0)
    mean = alignment(a_NC, b_NC).double() if len(a_NC) else count
    return torch.stack([mean * count, count, unmatched_cosine(a_NC, b_NC) * pairs, pairs])
