"""Slow float64 references, written from the equations with loops; nothing here is shared with the library."""

import math
from collections.abc import Sequence

import numpy as np

Matrix = np.ndarray


def unit(v: Matrix) -> Matrix:
    return v / math.sqrt(float((v * v).sum()))


def cosine(a: Matrix, b: Matrix) -> float:
    return float((unit(a) * unit(b)).sum())


def contrast(z: Matrix, positive: Sequence[Sequence[bool]], temperature: float, denominator: str = "all") -> float:
    """Mean over anchors i of -1/|P_i| sum over j in P_i of log(e^{s_ij/t} / D_ij)."""
    n, total, anchors = len(z), 0.0, 0
    for i in range(n):
        chosen = [j for j in range(n) if j != i and positive[i][j]]
        if not chosen:
            continue
        anchors += 1
        part = 0.0
        for j in chosen:
            below = [a for a in range(n) if a != i and (denominator == "all" or a == j or a not in chosen)]
            total_below = sum(math.exp(cosine(z[i], z[a]) / temperature) for a in below)
            part += math.log(math.exp(cosine(z[i], z[j]) / temperature) / total_below)
        total -= part / len(chosen)
    return total / max(anchors, 1)


def prototypes(v: Matrix, w: Matrix, temperature: float) -> float:
    total = 0.0
    for r in range(len(v)):
        total -= math.log(
            math.exp(cosine(v[r], w[r]) / temperature)
            / sum(math.exp(cosine(v[r], w[s]) / temperature) for s in range(len(w)))
        )
    return total / len(v)


def queue(q: Matrix, k: Matrix, negatives: Matrix, temperature: float) -> float:
    total = 0.0
    for i in range(len(q)):
        top = math.exp(cosine(q[i], k[i]) / temperature)
        total -= math.log(top / (top + sum(math.exp(cosine(q[i], n) / temperature) for n in negatives)))
    return total / len(q)


def local_alignment(a: Matrix, b: Matrix, window: int | None = None) -> float:
    """Maps (C, H, W) or (C, D, H, W); matches within the same window where there is one."""
    places = list(np.ndindex(*a.shape[1:]))
    total = 0.0
    for p in places:
        near = [
            q for q in places if window is None or all(x // window == y // window for x, y in zip(p, q, strict=True))
        ]
        total += abs(1 - max(cosine(a[(slice(None), *p)], b[(slice(None), *q)]) for q in near))
    return total / len(places)


def per_voxel_distance(a: Matrix, b: Matrix) -> float:
    """Mean over places of 2 - 2 cos of the channel vectors, maps (C, ...)."""
    places = list(np.ndindex(*a.shape[1:]))
    return sum(2 - 2 * cosine(a[(slice(None), *p)], b[(slice(None), *p)]) for p in places) / len(places)


def siamese(pre_a: Matrix, pro_a: Matrix, pre_b: Matrix, pro_b: Matrix) -> float:
    parts = [-(cosine(pre_a[i], pro_b[i]) + cosine(pre_b[i], pro_a[i])) / 2 for i in range(len(pre_a))]
    return sum(parts) / len(parts)


def masked_mse(output: Matrix, target: Matrix, mask: Matrix) -> float:
    """Mean over samples of the mean over masked voxels of the error averaged over channels; (B, C, ...)."""
    total = 0.0
    for o, t, m in zip(output, target, mask, strict=True):
        errors = [
            float(((o[(slice(None), *p)] - t[(slice(None), *p)]) ** 2).mean()) for p in np.ndindex(*m.shape) if m[p]
        ]
        total += sum(errors) / len(errors) if errors else 0.0
    return total / len(output)


def deep_supervision(logits: Sequence[Matrix], classes: Matrix) -> float:
    """Dice + cross entropy of outputs (B, K, D, H, W), finest first, weighted 1, 1/2, ...; classes (B, D, H, W)."""
    total, weight_sum = 0.0, 0.0
    for level, output in enumerate(logits):
        batch, count, *size = output.shape
        stride = [n // m for n, m in zip(classes.shape[1:], size, strict=True)]
        hit, predicted, actual, entropy = [0.0] * count, [0.0] * count, [0.0] * count, 0.0
        for b, *place in np.ndindex(batch, *size):
            # The voxel that holds the middle of the block.
            truth = int(classes[(b, *(math.floor((k + 0.5) * s) for k, s in zip(place, stride, strict=True)))])
            scores = [math.exp(float(output[(b, k, *place)])) for k in range(count)]
            shares = [score / sum(scores) for score in scores]
            entropy -= math.log(shares[truth])
            for k in range(count):
                hit[k] += shares[k] * (truth == k)
                predicted[k] += shares[k]
                actual[k] += truth == k
        dice = [(2 * hit[k] + 1e-5) / (predicted[k] + actual[k] + 1e-5) for k in range(1, count)]
        loss = 1 - sum(dice) / len(dice) + entropy / (batch * math.prod(size))
        total, weight_sum = total + loss / 2**level, weight_sum + 1 / 2**level
    return total / weight_sum


def softmax(logits: Matrix, temperature: float) -> Matrix:
    below = sum(math.exp(float(x) / temperature) for x in logits)
    return np.array([math.exp(float(x) / temperature) / below for x in logits])


def distillation(
    student: Matrix, teacher: Matrix, weights: Sequence[Matrix], centre: Matrix, student_t: float, teacher_t: float
) -> tuple[float, Matrix, Matrix]:
    """-sum over k of P_t log P_s of one embedding; with it the teacher's cosines and its distribution.

    Args:
        student: Embedding.
        teacher: Embedding.
        weights: Prototypes of the student and of the teacher.
        centre: Taken from the teacher's cosines.
        student_t: Temperature.
        teacher_t: Temperature.
    """
    said = np.array([cosine(student, w) for w in weights[0]])
    told = np.array([cosine(teacher, w) for w in weights[1]])
    p, q = softmax(told - centre, teacher_t), softmax(said, student_t)
    return -sum(float(p[k]) * math.log(float(q[k])) for k in range(len(p))), told, p
