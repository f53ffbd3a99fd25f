"""The style of the pages' charts."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = ("#2f6f9f", "#c2703d", "#5b8c5a", "#8a5a9e")
INK = "#3b4350"


def chart(drawing: Any, axes: Sequence[Any], grid: str = "y", top: float = 1.0) -> bytes:
    """PNG of a matplotlib figure in the pages' style, which is closed; its axes end at `top` of the height."""
    for axis in axes:
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        axis.grid(axis=grid, color="#e6e9ed", lw=0.8)
        axis.set_axisbelow(True)
    drawing.tight_layout(rect=(0, 0, 1, top))
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", dpi=160)
    plt.close(drawing)
    return buffer.getvalue()
