"""Which loss is so far above the last ones that its batch is worth a look."""

from collections import deque
from statistics import median

WINDOW = 100
"""Losses that a new one is judged by; before there are as many, none is a spike."""
DEVIATIONS = 20.0
"""Of the median absolute deviation. Our choice: for a normal law about 13 standard deviations, which noise does not
reach, and a batch that is unlike all others does."""
_LEAST = 1e-3  # of the median: losses that hardly vary make no spike of a rounding


class Spikes:
    """The last losses of one rank, and the threshold that they set: median + 20 median absolute deviations."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def threshold(self) -> float | None:
        """Above this a loss is a spike; None until there are `WINDOW` losses."""
        if len(self._losses) < WINDOW:
            return None
        middle = median(self._losses)
        deviation = median(abs(loss - middle) for loss in self._losses)
        return middle + DEVIATIONS * max(deviation, _LEAST * abs(middle), 1e-12)

    def is_spike(self, loss: float) -> bool:
        """Judge a loss by those before it, and remember it."""
        threshold = self.threshold()
        self._losses.append(loss)
        return threshold is not None and loss > threshold
