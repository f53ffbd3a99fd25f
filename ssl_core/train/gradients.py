"""The gradients of a step: one buffer for all of them, and the verdict on whether they are sound."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssl_core.distributed import Collectives
from ssl_core.train.buckets import Buckets


class FlatGradients:
    """Every parameter's `.grad` is a view of one buffer: zeroing, averaging, norm and clipping are one call each.

    A parameter that gets no gradient in a step counts as one with zeros, whatever the number of ranks. Two more
    elements carry the ranks' votes, so that these need no message of their own.

    Args:
        parameters: Trainable parameters of one dtype on one device by name, in the same order on all ranks.
        collectives: The ranks.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], collectives: Collectives) -> None:
        total, first = sum(p.numel() for p in parameters.values()), next(iter(parameters.values()))
        self._buffer = torch.zeros(total + 2, dtype=first.dtype, device=first.device)
        self._flat, self._votes = self._buffer[:total], self._buffer[total:]
        offset = 0
        for p in parameters.values():
            # Same strides as the parameter, or fused optimizers fall back to slower code.
            p.grad = self._flat.as_strided(p.shape, p.stride(), offset)
            offset += p.numel()
        self._buckets = Buckets(self._flat, parameters, collectives) if collectives.world > 1 else None

    def zero(self) -> None:
        """Forget the last step."""
        self._buffer.zero_()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of a part's loss; after the `last` part of a step, gradients may be on their way already."""
        if self._buckets is not None and last:
            self._buckets.backward(loss)
        else:
            loss.backward()

    def average(self, *, stop: bool, bad: Tensor) -> None:
        """Average over ranks, and count the votes: `stop` to end the run, `bad` for a loss that is not finite."""
        self._votes[0].fill_(float(stop))  # an assignment of a number would be a copy that the host waits for
        self._votes[1].copy_(bad)
        if self._buckets is not None:
            self._buckets.average(self._votes)

    def norm(self) -> Tensor:
        """Euclidean norm over all parameters."""
        return torch.linalg.vector_norm(self._flat)

    def clip(self, norm: Tensor, largest: float) -> None:
        """Scale by min(1, largest / norm), without waiting for the device."""
        self._flat.mul_(torch.clamp(largest / (norm + 1e-6), max=1.0))

    def summary(self, norm: Tensor, loss: Tensor) -> Tensor:
        """(4,) float64: norm, votes to stop, votes that a loss was not finite, this rank's loss; copies."""
        return torch.cat([norm[None], self._votes, loss[None]]).double()


class Outcome(NamedTuple):
    """What came of a step, on the host.

    Attributes:
        step: The optimizer step, counted from 1.
        loss: Of this rank's part of the batch.
        norm: Of the gradient over all ranks, before clipping.
        stop: Whether any rank wants to stop.
        bad: Whether any rank's loss or gradient was not finite.
    """

    step: int
    loss: float
    norm: float
    stop: bool
    bad: bool

    @property
    def is_sound(self) -> bool:
        """Whether the step may change the weights."""
        return not self.bad and math.isfinite(self.norm)


class Verdict:
    """Whether a step was sound and whether a rank wants to stop, on its way from the device to the host.

    Args:
        step: The optimizer step.
        samples: Sample indices of each part of this rank's batch.
        finite_P: For each part, whether its loss and the gradients up to it were finite on this rank.
        summary: From `FlatGradients.summary`; the same on all ranks.
    """

    def __init__(self, step: int, samples: list[Tensor], finite_P: Tensor, summary: Tensor) -> None:
        self.step, self.samples, self.finite_P = step, samples, finite_P
        self._event: torch.cuda.Event | None = None
        self._host = summary
        if summary.device.type == "cuda":
            self._host = torch.empty(summary.shape, dtype=summary.dtype, pin_memory=True)
            self._host.copy_(summary, non_blocking=True)
            # Of the summary's device: the current one is another where a rank's device was not made current.
            self._event = torch.cuda.current_stream(summary.device).record_event()

    def read(self) -> Outcome:
        """What came of the step; waits."""
        if self._event is not None:
            self._event.synchronize()
        norm, stop, bad, loss = self._host.tolist()
        return Outcome(self.step + 1, loss, norm, stop > 0, bad != 0)

    def is_own(self) -> bool:
        """Whether infinity or not-a-number came up in this rank's part of the batch; waits."""
        return not bool(self.finite_P.all())

    def bad_samples(self, collectives: Collectives) -> tuple[list[int], list[int]]:
        """Over all ranks: samples of the parts where infinity or not-a-number first appeared, and all samples.

        A collective call.
        """
        finite = self.finite_P.tolist()
        first = finite.index(False) if False in finite else -1
        marks_B = torch.cat([torch.full_like(s, int(i == first)) for i, s in enumerate(self.samples)])
        device = self.finite_P.device
        samples = collectives.gather(torch.cat(self.samples).to(device)).tolist()
        marks = collectives.gather(marks_B.to(device)).tolist()
        return [i for i, mark in zip(samples, marks, strict=True) if mark], samples
