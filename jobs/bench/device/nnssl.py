"""SimCLR with the network and crops of nnssl's published figures, and those figures, their hardware named."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jobs.bench.device.step import Row, bench_step, table


@dataclass(frozen=True)
class Published:
    """One published figure.

    Attributes:
        samples: Images of a step.
        crops: Crops of an image, each in two views.
        batches_per_s: As published.
        gb: Memory as published, where it is.
    """

    samples: int
    crops: int
    batches_per_s: float
    gb: float | None = None

    @property
    def views_per_s(self) -> float:
        """Views through the network a second."""
        return 2 * self.samples * self.crops * self.batches_per_s


SIZE = (64, 64, 64)
HARDWARE = "RTX 4090"
SOURCE = "docstring of nnssl's SimCLR trainer (ResEnc-L, 64x64x64 crops); views counted as two a crop"
PUBLISHED = (
    Published(4, 3, 5.3, 9.6),
    Published(8, 3, 2.9),
    Published(16, 3, 1.08),
    Published(32, 1, 2.2),
)
"""SimCLR as nnssl's docstring gives it."""


def bench_nnssl(**settings: Any) -> dict[str, Any]:
    """SimCLR on ResEnc-L with crops of 64 voxels, as nnssl publishes it, and its figures beside ours.

    A sample here is one crop in two views: nnssl's step of 4 images with 3 crops each is a batch of 12.

    Args:
        settings: Of `jobs.bench.device.step.bench_step`.
    """
    result = bench_step(["simclr"], ["resenc_l"], size_DHW=SIZE, **settings)
    published = [dataclasses.asdict(p) | {"views_per_s": p.views_per_s} for p in PUBLISHED]
    note = f"theirs was measured on other hardware, an {HARDWARE}: {SOURCE}"
    return result | {"nnssl": {"published": published, "hardware": HARDWARE, "note": note}}


def nnssl_table(result: Mapping[str, Any]) -> str:
    """Ours and theirs as plain text."""
    rows = [Row(**row) for row in result["rows"]]
    lines = [
        f"ours, {r.device}, {r.variant}: {r.batch} crops in 2 views, {2 * r.samples_per_s:.2f} views/s" for r in rows
    ]
    for p in result["nnssl"]["published"]:
        memory = f", {p['gb']} GB" if p["gb"] else ""
        shape = f"{p['samples']} images x {p['crops']} crops"
        lines.append(
            f"nnssl, {result['nnssl']['hardware']}: {shape} in 2 views, {p['views_per_s']:.0f} views/s{memory}"
        )
    return "\n".join([table(rows), "", *lines, result["nnssl"]["note"] + "."])
