"""How well labels follow from features while they are learned: k-NN from a few labelled crops to those of others.

Nothing is trained and nothing drawn, so that watching a run cannot change it.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ssl_core.methods.parts.points import sample_features
from ssl_core.monitor.collapse import deepest_trained, evaluation
from ssl_core.networks.backbone import Backbone
from ssl_core.train.engine import Engine

_TEMPERATURE = 0.07  # of a vote, Wu et al. 2018


@dataclass(frozen=True)
class Labelled:
    """Labelled crops, each of another subject.

    Attributes:
        image_BCDHW: Normalised intensities, on the engine's device, in its dtype.
        label_BDHW: Integer classes; 0 is background.
        bank_crops: The first so many crops lend their labels; the others are the queries.
    """

    image_BCDHW: Tensor
    label_BDHW: Tensor
    bank_crops: int


def knn_dice(engine: Engine, labelled: Labelled, *, k: int = 5, voxels: int = 1024) -> float:
    """Dice of the query crops' labels as the k nearest features of the bank crops say them; a collective call.

    Each crop is looked at on an even grid of at most `voxels` places. A place's feature is the concatenation of the
    encoder levels that are trained, each of unit length. Query crops are shared out over the ranks.

    Returns:
        Mean over the foreground classes in the query crops of 2 |A and B| / (|A| + |B|), places of all crops together;
        the same on all ranks. Not a number where the query crops have no foreground.
    """
    rank, world = engine.collectives.rank, engine.collectives.world
    values, label_BDHW = labelled.label_BDHW.unique(return_inverse=True)
    if int(values[0]) != 0:  # the background keeps number 0, whether it is seen or not
        label_BDHW = label_BDHW + 1
    classes = int(label_BDHW.max()) + 1
    counts_3K = torch.zeros(3, classes, dtype=torch.float64, device=label_BDHW.device)
    with evaluation(engine.method):
        encoder: Backbone = engine.method.encoder()  # type: ignore[operator]
        upto = deepest_trained(encoder)

        def look(index: int) -> tuple[Tensor, Tensor]:
            with torch.autocast(engine.device.type, torch.bfloat16, enabled=engine.precision == "bf16"):
                maps = encoder.features(labelled.image_BCDHW[index : index + 1], upto)
            return _places(encoder, maps, label_BDHW[index], voxels)

        bank = [look(index) for index in range(labelled.bank_crops)]
        bank_NC, bank_N = torch.cat([f for f, _ in bank]), torch.cat([labels for _, labels in bank])
        for index in range(labelled.bank_crops + rank, len(label_BDHW), world):
            query_MC, truth_M = look(index)
            guess_M = nearest_labels(bank_NC, bank_N, query_MC, classes, k)
            for row, labels_M in enumerate((truth_M[truth_M == guess_M], truth_M, guess_M)):
                counts_3K[row] += torch.bincount(labels_M, minlength=classes)
    both_K, truth_K, guess_K = engine.collectives.sum(counts_3K)[:, 1:].cpu()
    present_K = truth_K > 0
    if not bool(present_K.any()):
        return math.nan
    return float((2 * both_K / (truth_K + guess_K).clamp_min(1))[present_K].mean())


def nearest_labels(bank_NC: Tensor, bank_N: Tensor, query_MC: Tensor, classes: int, k: int = 5) -> Tensor:
    """Labels (M,) that most of the k most similar bank vectors have, similar ones counting more.

    Cosine similarity; a vote has the weight exp(similarity / 0.07) (Wu et al. 2018, non-parametric classifier).
    """
    similar_MN = functional.normalize(query_MC, dim=1) @ functional.normalize(bank_NC, dim=1).T
    top_Mk, where_Mk = similar_MN.topk(min(k, len(bank_NC)), dim=1)
    weight_Mk = ((top_Mk - top_Mk[:, :1]) / _TEMPERATURE).exp()
    # A sum and no scatter, which has no deterministic kernel on every device.
    return (functional.one_hot(bank_N[where_Mk], classes) * weight_Mk[..., None]).sum(1).argmax(dim=1)


def grid(size_DHW: tuple[int, int, int], most: int) -> Tensor:
    """Voxel indices (M, 3) of an even grid of at most `most` voxels, as many along each axis as its length asks."""
    step = 1.0
    while math.prod(max(1, int(n / step)) for n in size_DHW) > most:
        step *= 1.01
    axes = []
    for n in size_DHW:
        count = max(1, int(n / step))
        axes.append(((torch.arange(count, dtype=torch.float64) + 0.5) * n / count).long())
    return torch.cartesian_prod(*axes).reshape(-1, 3)


def _places(encoder: Backbone, maps: list[Tensor], label_DHW: Tensor, voxels: int) -> tuple[Tensor, Tensor]:
    """Features (M, C), at least float32, and labels (M,) of a crop's places."""
    d, h, w = label_DHW.shape
    places_M3 = grid((d, h, w), voxels).to(label_DHW.device)
    centres_1M3 = (places_M3.double() + 0.5)[None]
    sampled = [
        sample_features(m, level, centres_1M3)[0][0] for m, level in zip(maps, encoder.levels[: len(maps)], strict=True)
    ]
    features_MC = torch.cat([functional.normalize(s, dim=1) for s in sampled], dim=1)
    return features_MC, label_DHW[places_M3.unbind(1)].long()
