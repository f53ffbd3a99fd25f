"""Batched 3-D views beside MONAI's per-sample transforms and kornia's 3-D ones, operation by operation, in one run.

Each operation gets the same crops and, where it can be told them, the same parameters, different for each sample;
results are then compared. Where parameters are drawn inside, only the time is. Implementations take turns. MONAI runs
without its metadata tracking, which is its fastest mode.
"""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from monai.data.meta_obj import get_track_meta, set_track_meta
from torch import Tensor

from jobs.bench.device.facts import machine
from jobs.bench.device.rate import seconds
from jobs.bench.device.view_cases import OURS, Case, Operation, cases
from jobs.bench.measure import spread
from jobs.bench.measure import table as markdown

ENOUGH_S = 10.0  # no further round after so much time
COLUMNS = {
    "case": "operation",
    "whose": "whose",
    "crops_per_s": "crops/s",
    "of_ours": "speed / ours",
    "difference": "largest difference",
    "note": "note",
}


def bench_views(
    quick: bool = False, *, device: str = "cpu", rounds: int | None = None, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Every operation; see `cases`.

    Returns:
        JSON-able: `machine`, `batch`, `size_DHW` and `rows`: crops a second as median, least and greatest, `of_ours` as
        the ratio of medians, and the largest difference from ours over the range of values.
    """
    where, batch, side = torch.device(device), 2 if quick else 8, 32 if quick else 64
    repeats = rounds or (3 if quick else 9)
    rows: list[dict[str, Any]] = []
    with _without_metadata():
        for case in cases(batch, side, where):
            measured = _rows(case, batch, _crops(batch, side + side // 2, where), where, repeats)
            rows += measured
            speeds = (f"{r['whose']} {r['crops_per_s']['median']:.3g}/s" for r in measured if r["crops_per_s"])
            say(f"{case.name}: {', '.join(speeds)}")
    return {"machine": machine([where]), "batch": batch, "size_DHW": [side] * 3, "rounds": repeats, "rows": rows}


def format_views(result: dict[str, Any]) -> str:
    """The rows as a table, and what is used for each operation."""
    differences = [None if r["difference"] is None else f"{r['difference']:.0e}" for r in result["rows"]]
    rows = [row | {"difference": d} for row, d in zip(result["rows"], differences, strict=True)]
    choices = {row["case"]: row["choice"] for row in result["rows"]}
    return "\n".join([markdown(rows, COLUMNS), "", *(f"- {name}: {why}" for name, why in choices.items())])


def _rows(case: Case, batch: int, x: Tensor, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    everyone: dict[str, Operation | None] = {OURS: case.operation, **case.peers}
    ready = {name: run for name, run in everyone.items() if run is not None}
    results = {name: run(x) for name, run in ready.items()}  # also warms up
    times: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(repeats):
        for name, run in ready.items():
            if sum(times[name]) < ENOUGH_S:
                times[name].append(seconds(lambda run=run: run(x), device))  # type: ignore[misc]
    baseline = statistics.median(times[OURS])
    rows = []
    for name in everyone:
        row: dict[str, Any] = {"case": case.name, "whose": name, "crops_per_s": None, "of_ours": None}
        row |= {"difference": None, "note": case.notes.get(name, ""), "choice": case.choice}
        if name in times:
            row["crops_per_s"] = spread([batch / t for t in times[name]])
            row["of_ours"] = baseline / statistics.median(times[name])
            if case.same and name != OURS:
                row["difference"] = _difference(results[OURS], results[name], case.border)
        rows.append(row)
    return rows


def _difference(a: Tensor, b: Tensor, border: int) -> float:
    d, h, w = (slice(border, n - border) for n in a.shape[-3:])
    gap = (a - b.to(a.device))[..., d, h, w].abs().max()
    return float(gap / (a.max() - a.min()))


def _crops(batch: int, side: int, device: torch.device) -> Tensor:
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(batch, 1, *(side // 8 + 2,) * 3, generator=g)
    smooth = torch.nn.functional.interpolate(coarse, size=(side,) * 3, mode="trilinear", align_corners=False)
    return (smooth + 0.05 * torch.randn(smooth.shape, generator=g)).to(device)


@contextmanager
def _without_metadata() -> Iterator[None]:
    before = get_track_meta()
    set_track_meta(False)
    try:
        yield
    finally:
        set_track_meta(before)
