"""A digest chain over a run: what it is, how it was run, what every step read, and what came of it.

```
h_0 = SHA256("tomoscale-chain-1" || JSON of what the run is)
h   = SHA256(h || "start" || steps done || JSON of how it goes on)         where that is another than before
h_k = SHA256(h || "step"  || k || samples || loss || norm || weights)      for k = 1, 2, ...
```

`samples` is the running digest of all samples up to step k (32 bytes), `loss` that of rank 0's part of the batch and
`norm` the gradient's over all ranks (bits of float64), `weights` the digest of all tensors of the method after the
step: 32 bytes at every `every`-th step and at the last, nothing elsewhere. A gradient's norm is a function of the
weights before it, so that weights that changed in between show one step later.

The links are a function of the run and not of where it was interrupted: a run that goes on from a checkpoint has the
head of the undisturbed one. Numbers are big-endian, JSON has sorted keys and no spaces.
"""

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

EVERY = 100
"""Steps between digests of the weights: those of 12 MB take about 10 ms, which is not to count beside 100 steps."""
ROW = 48
"""Bytes of a step: samples (32), loss and gradient norm (8 each)."""
_PARTS = (("samples", 0, 32), ("loss", 32, 40), ("gradient norm", 40, 48))


@dataclass(frozen=True)
class Start:
    """How a run goes on after `step` steps: world size, threads, device, versions, digest of the code."""

    step: int
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Difference:
    """The first link that differs between two chains.

    Attributes:
        step: Of the link; 0 is what the run is.
        part: `samples`, `loss`, `gradient norm`, `weights`, or a key of what the run is.
        expected: In the first chain.
        actual: In the second.
    """

    step: int
    part: str
    expected: str
    actual: str


@dataclass
class Chain:
    """The links of one run so far.

    Attributes:
        what: What the run is: digests of its configuration and its manifest.
        every: Steps between digests of the weights.
        starts: How it was run, ascending by step.
        rows: `ROW` bytes a step.
        weights: Digests of the weights by step.
    """

    what: Mapping[str, str]
    every: int = EVERY
    starts: list[Start] = field(default_factory=list)
    rows: bytearray = field(default_factory=bytearray)
    weights: dict[int, str] = field(default_factory=dict)
    _samples: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._begun = self._linked = 0
        self._head = hashlib.sha256(b"tomoscale-chain-1" + canonical(self.what)).digest()

    @property
    def steps(self) -> int:
        """Steps whose links are complete."""
        return len(self.rows) // ROW

    def start(self, facts: Mapping[str, Any]) -> None:
        """Note how the run goes on, where that is not how it went before."""
        if not self.starts or dict(self.starts[-1].facts) != dict(facts):
            self._link()
            self.starts.append(Start(self.steps, dict(facts)))

    def sampled(self, step: int, samples: str) -> None:
        """The running digest of samples, hexadecimal, with those of a step."""
        self._samples[step] = samples

    def stepped(self, step: int, loss: float, norm: float) -> None:
        """What came of a step; steps ascend by one.

        Raises:
            ValueError: a step was left out, came twice, or its samples were never told.
        """
        if step != self.steps + 1:
            raise ValueError(f"step {step} after step {self.steps} of the chain")
        if step not in self._samples:
            raise ValueError(f"no samples of step {step}")
        self.rows += bytes.fromhex(self._samples.pop(step)) + struct.pack(">dd", loss, norm)

    def is_due(self, step: int, steps: int) -> bool:
        """Whether the weights after a step of `steps` have a digest in the chain, which is not there yet."""
        return step > 0 and step not in self.weights and (step % self.every == 0 or step == steps)

    def head(self) -> str:
        """The chain's head after the last complete step, hexadecimal."""
        self._link()
        return self._head.hex()

    def state(self) -> dict[str, Any]:
        """For `ssl_core.train.checkpoint.save`: 48 bytes a step and little else."""
        rows = torch.frombuffer(bytearray(self.rows), dtype=torch.uint8) if self.rows else torch.empty(0).byte()
        return {"rows": rows.view(-1, ROW), **self.facts()}

    def facts(self) -> dict[str, Any]:
        """All but the rows, as JSON."""
        return {
            "what": dict(self.what),
            "every": self.every,
            "starts": [[item.step, dict(item.facts)] for item in self.starts],
            "weights": [[step, digest] for step, digest in sorted(self.weights.items())],
            "head": self.head(),
        }

    @classmethod
    def of(cls, facts: Mapping[str, Any], rows: bytes) -> Self:
        """The chain of `facts` and rows. That its head is the one of `facts` is for the caller to see."""
        return cls(
            what=dict(facts["what"]),
            every=int(facts["every"]),
            starts=[Start(int(step), dict(how)) for step, how in facts["starts"]],
            rows=bytearray(rows),
            weights={int(step): str(digest) for step, digest in facts["weights"]},
        )

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Inverse of `state`."""
        return cls.of(state, state["rows"].contiguous().numpy().tobytes())

    def _link(self) -> None:
        while self._linked < self.steps:
            self._link_starts()
            row = self.rows[self._linked * ROW : (self._linked + 1) * ROW]
            self._linked += 1
            weights = bytes.fromhex(self.weights.get(self._linked, ""))
            self._head = hashlib.sha256(self._head + b"step" + _number(self._linked) + row + weights).digest()

    def _link_starts(self) -> None:
        while self._begun < len(self.starts) and self.starts[self._begun].step <= self._linked:
            item = self.starts[self._begun]
            self._begun += 1
            self._head = hashlib.sha256(self._head + b"start" + _number(item.step) + canonical(item.facts)).digest()


def first_difference(expected: Chain, actual: Chain, until: int) -> Difference | None:
    """The first link up to step `until` in which two chains differ; how they were run is not compared.

    Digests of weights are compared where both have one.
    """
    for key in sorted(expected.what.keys() | actual.what.keys()):
        if expected.what.get(key) != actual.what.get(key):
            return Difference(0, key, str(expected.what.get(key)), str(actual.what.get(key)))
    for step in range(1, until + 1):
        rows = [bytes(chain.rows[(step - 1) * ROW : step * ROW]) for chain in (expected, actual)]
        for part, start, stop in _PARTS:
            one, two = (row[start:stop] for row in rows)
            if one != two:
                return Difference(step, part, _spelled(one), _spelled(two))
        digests = expected.weights.get(step), actual.weights.get(step)
        if None not in digests and digests[0] != digests[1]:
            return Difference(step, "weights", str(digests[0]), str(digests[1]))
    return None


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, hexadecimal, of names, types, shapes and bytes of tensors, by name."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def canonical(data: Mapping[str, Any] | Sequence[Any]) -> bytes:
    """JSON with sorted keys and no spaces: one text for one content."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def canonical_digest(data: Mapping[str, Any] | Sequence[Any]) -> str:
    """SHA-256, hexadecimal, of `canonical`."""
    return hashlib.sha256(canonical(data)).hexdigest()


def _number(value: int) -> bytes:
    return struct.pack(">Q", value)


def _spelled(part: bytes) -> str:
    if not part:
        return "no such step"
    return repr(struct.unpack(">d", part)[0]) if len(part) == 8 else part.hex()
