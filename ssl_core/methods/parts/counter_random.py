"""Random numbers on the training device that are a function of (seed, sample, purpose), without waiting for the host.

An integer hash in place of a generator: a sample gets the same numbers in any batch, on any rank and any device.
"""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def uniforms(seed: int, sample_B: Tensor, purpose: str, count: int) -> Tensor:
    """`count` numbers in the open interval (0, 1) for each sample, (B, count), float64, on the samples' device."""
    stream_B = _stream(seed, sample_B, purpose)
    index = torch.arange(count, device=sample_B.device)
    words = _mix(_mix(stream_B[:, None] ^ (index * 0x9E3779B1 & _MASK)) + stream_B[:, None])
    return (words.double() + 0.5) / 2.0**32


def of(values: Tensor, sample_B: Tensor, seed: int, purpose: str) -> Tensor:
    """One number in (0, 1) for each integer of `values` (B, ...), the same wherever the integer occurs in a sample."""
    stream = _stream(seed, sample_B, purpose).view(-1, *(1,) * (values.dim() - 1))
    return (_mix(_mix((values.long() & _MASK) ^ stream) + stream).double() + 0.5) / 2.0**32


def _stream(seed: int, sample_B: Tensor, purpose: str) -> Tensor:
    """A 32-bit word for each sample."""
    sample = sample_B.long()
    word = _mix(_mix(sample) + (sample >> 32))
    # Two keys, so that one seed's sample meets another seed's sample in one of them at most.
    for start in (0x811C9DC5, 0x050C5D1F):
        word = _mix(word + _key(start, seed, purpose))
    return word


def _key(start: int, seed: int, purpose: str) -> int:
    """FNV-1a over the seed's bytes and the purpose; plain arithmetic, which `torch.compile` can follow."""
    key = start
    for byte in [(seed >> shift) & 0xFF for shift in range(0, 64, 8)] + [ord(letter) for letter in purpose]:
        key = ((key ^ byte) * 0x01000193) & _MASK
    return key


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
