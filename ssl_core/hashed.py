"""Random numbers on the training device that are a function of (seed, sample, purpose), without waiting for the host.

An integer hash in place of a generator: a sample gets the same numbers in any batch, on any rank and any device.
"""

import hashlib

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def uniforms(seed: int, sample_B: Tensor, purpose: str, count: int) -> Tensor:
    """`count` numbers in the open interval (0, 1) for each sample, (B, count), float64, on the samples' device."""
    digest = hashlib.blake2b(repr((seed, purpose)).encode(), digest_size=4).digest()
    key = int.from_bytes(digest, "little")
    sample = sample_B.long()
    stream_B = _mix(_mix((sample & _MASK) ^ key) + (sample >> 32))
    index = torch.arange(count, device=sample.device)
    words = _mix(_mix(stream_B[:, None] ^ index * 0x9E3779B1 & _MASK) + stream_B[:, None])
    return (words.double() + 0.5) / 2.0**32


def of(values: Tensor, sample_B: Tensor, seed: int, purpose: str) -> Tensor:
    """One number in (0, 1) for each integer of `values` (B, ...), the same wherever the integer occurs in a sample."""
    digest = hashlib.blake2b(repr((seed, purpose)).encode(), digest_size=4).digest()
    stream_B = _mix(sample_B.long() & _MASK ^ int.from_bytes(digest, "little"))
    stream = stream_B.view(-1, *(1,) * (values.dim() - 1))
    return (_mix(_mix((values.long() & _MASK) ^ stream) + stream).double() + 0.5) / 2.0**32


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words in which every input bit flips every output bit about half of the time.

    The constants are of C. Wellons' search for multiply-xorshift hashes of low bias. Products wrap modulo 2^64, which
    leaves their low 32 bits right.
    """
    x = x & _MASK
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D & _MASK
    x = x ^ (x >> 15)
    x = x * 0x846CA68B & _MASK
    return x ^ (x >> 16)
