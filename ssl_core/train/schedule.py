"""Schedules as pure functions of the optimizer step, so that a resumed run needs no scheduler state."""

import math


def cosine(step: int, *, steps: int, start: float, end: float) -> float:
    """Half a cosine from `start` at step 0 to `end` at step `steps - 1`, constant outside.

    Args:
        step: Optimizer step, counted from 0.
        steps: Steps of the whole curve; the last one has exactly `end`. One step has `start`.
        start: First value.
        end: Last value.
    """
    done = min(max(step, 0) / (steps - 1), 1.0) if steps > 1 else 0.0
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * done))


def warmup_cosine(step: int, *, steps: int, warmup: int, peak: float, final: float) -> float:
    """Linear warm-up to `peak`, then half a cosine to `final` (SGDR without restarts, Loshchilov and Hutter 2017).

    Step s of the warm-up has `peak * (s + 1) / warmup`, so that no step is wasted on a rate of zero.

    Args:
        step: Optimizer step, counted from 0.
        steps: Steps of the whole run.
        warmup: Steps of the linear part, may be 0.
        peak: Rate at the end of the warm-up.
        final: Rate of the last step.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return cosine(step - warmup, steps=steps - warmup, start=peak, end=final)
