"""Volumes of different subjects that look like one scan saved twice: pointed out, never moved or refused.

Signatures of all pairs are compared in blocks, which costs about `4 n^2 m` operations for n volumes and m coefficients:
some 10 seconds of one core for 10,000 volumes, and a quarter of an hour for 100,000.
"""

from collections.abc import Sequence

import numpy as np

from storage.format.records import VolumeRecord
from storage.ingest.publishing.claims import image_digest
from storage.ingest.signature import ORDERS, noted_signature

ALIKE = 0.975
"""Cosine of two signatures from which on a pair is pointed out; the docs say what it catches."""
_BLOCK = 2048
_MOST = 1000
"""Pairs of which the names are remembered; others are counted."""
_EXAMPLES = 5
_TURNS = tuple(
    np.where((ORDERS[:, 2] * w + ORDERS[:, 1] * h) % 2, -1, 1).astype(np.float32) for w in (0, 1) for h in (0, 1)
)
"""Signs of a copy turned round along W, along H, or along both: axes that headers lose."""
Pair = tuple[VolumeRecord, VolumeRecord, float]


def near_copies(records: Sequence[VolumeRecord]) -> tuple[list[Pair], int]:
    """Pairs of volumes of different subjects that look alike, the most alike first, and how many there are.

    Volumes with equal voxels or of equal files are no such pairs: they count as one subject already.
    """
    signed = [(record, own) for record in records if (own := noted_signature(record.notes)) is not None and own.any()]
    if len(signed) < 2:
        return [], 0
    rows = np.stack([own for _, own in signed]).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    subjects = np.unique([record.subject for record, _ in signed], return_inverse=True)[1]
    pairs: list[Pair] = []
    count = 0
    for a in range(0, len(rows), _BLOCK):
        for b in range(a, len(rows), _BLOCK):
            alike = np.max([(rows[a : a + _BLOCK] * turn) @ rows[b : b + _BLOCK].T for turn in _TURNS], axis=0)
            alike[subjects[a : a + _BLOCK, None] == subjects[None, b : b + _BLOCK]] = 0
            for i, j in np.argwhere(alike >= ALIKE).tolist():
                first, second = signed[a + i][0], signed[b + j][0]
                if a + i >= b + j or _equal(first, second):
                    continue
                count += 1
                if len(pairs) < _MOST or first.split != second.split:
                    pairs.append((first, second, float(alike[i, j])))
    return sorted(pairs, key=lambda pair: (pair[0].split == pair[1].split, -pair[2], pair[0].volume_id)), count


def near_copies_note(records: Sequence[VolumeRecord]) -> str:
    """What a reader should know about such pairs, with names; empty where there are none."""
    pairs, count = near_copies(records)
    if not pairs:
        return ""
    apart = sum(first.split != second.split for first, second, _ in pairs)
    names = "; ".join(
        f"{first.volume_id} ({first.split}) and {second.volume_id} ({second.split}), {alike:.3f}"
        for first, second, alike in pairs[:_EXAMPLES]
    )
    more = f" and {count - _EXAMPLES} more" if count > _EXAMPLES else ""
    return (
        f"{count} pairs of volumes of different subjects look like one scan saved twice, {apart} of them in different "
        f"splits: {names}{more}; if they are of one person, say so in a subject_table"
    )


def _equal(first: VolumeRecord, second: VolumeRecord) -> bool:
    same_file = bool(first.source_sha256) and first.source_sha256 == second.source_sha256
    return same_file or image_digest(first) == image_digest(second)
