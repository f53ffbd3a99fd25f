"""Random numbers that are a function of (seed, sample, purpose) and of nothing else.

Philox-4x32-10 (Salmon et al., SC 2011), vectorised over samples: constructing a generator object for each sample, view
and operation costs more than the draws. The key is a hash of the seed and the purpose, the counter is the sample, so a
sample gets the same numbers in any batch, on any rank, and a new purpose disturbs no other.
"""

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray

_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MULTIPLY = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))


def philox(counter_N4: NDArray[np.uint64], key_N2: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Ten rounds of Philox-4x32 on counters of four 32-bit words each; returns four 32-bit words each, (N, 4).

    Keys are two 32-bit words for each counter, or (1, 2) for all.
    """
    a, b, c, d = (counter_N4[:, i].astype(np.uint64) for i in range(4))
    k0, k1 = key_N2[:, 0], key_N2[:, 1]
    for _ in range(10):
        left, right = a * _MULTIPLY[0], c * _MULTIPLY[1]
        a = (right >> _SHIFT) ^ b ^ k0
        c = (left >> _SHIFT) ^ d ^ k1
        b, d = right & _LOW, left & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return np.stack([a, b, c, d], axis=1)


def words(
    seed: int,
    sample_B: NDArray[np.int64],
    purpose: tuple[str | int, ...],
    count: int,
    turn_B: NDArray[np.int64] | None = None,
) -> NDArray[np.uint64]:
    """`count` 32-bit words for each sample, (B, count); with `turn_B` each sample's own turn ends the purpose."""
    blocks = -(-count // 4)
    if turn_B is None:
        key = _key(seed, purpose)[None]
    else:
        turns, place_B = np.unique(turn_B, return_inverse=True)
        key = np.stack([_key(seed, (*purpose, int(turn))) for turn in turns])[place_B].repeat(blocks, axis=0)
    sample = np.repeat(np.asarray(sample_B, np.int64).astype(np.uint64), blocks)
    counter = np.zeros((len(sample), 4), np.uint64)
    counter[:, 0], counter[:, 1] = sample & _LOW, sample >> _SHIFT
    counter[:, 2] = np.tile(np.arange(blocks, dtype=np.uint64), len(sample_B))
    return philox(counter, key).reshape(len(sample_B), blocks * 4)[:, :count]


def _key(seed: int, purpose: tuple[str | int, ...]) -> NDArray[np.uint64]:
    digest = hashlib.blake2b(repr((seed, *purpose)).encode(), digest_size=8).digest()
    return np.frombuffer(digest, "<u4").astype(np.uint64)


def uniforms(
    seed: int,
    sample_B: NDArray[np.int64],
    purpose: tuple[str | int, ...],
    count: int,
    turn_B: NDArray[np.int64] | None = None,
) -> NDArray[np.float64]:
    """`count` numbers in the open interval (0, 1) for each sample, (B, count), with 32 bits of resolution.

    With `turn_B` each sample's own turn ends the purpose: several turns of many samples are one call.
    """
    return (words(seed, sample_B, purpose, count, turn_B).astype(np.float64) + 0.5) / 2.0**32


def generators(
    seed: int, sample_B: NDArray[np.int64], purpose: tuple[str | int, ...], device: torch.device
) -> list[torch.Generator]:
    """One generator on `device` for each sample, for noise with one number a voxel."""
    drawn = words(seed, sample_B, purpose, 2)
    return [
        torch.Generator(device=device).manual_seed(int(low) | (int(high) & 0x7FFFFFFF) << 32) for low, high in drawn
    ]
