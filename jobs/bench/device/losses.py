"""Our losses beside lightly's and MONAI's: time, memory, and error against a float64 reference, in one run.

Every implementation of a case gets the same numbers and is timed forward and backward, in turns, so that a machine
whose speed drifts slows all of them. The reference is written from the equation in float64, on the values as they are
after rounding to the inputs' type, so that the error is the implementation's own.
"""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from jobs.bench.device.facts import machine
from jobs.bench.device.loss_cases import OURS, Case, Loss, cases
from jobs.bench.device.rate import seconds
from jobs.bench.measure import spread
from jobs.bench.measure import table as markdown
from ssl_core.testing.memory import peak_of

COLUMNS = {
    "case": "loss",
    "inputs": "inputs",
    "peer": "whose",
    "ms": "ms, forward and backward",
    "times_ours": "time / ours",
    "peak_mib": "peak MiB",
    "value_error": "error of the value",
    "gradient_error": "error of the gradient",
    "note": "note",
}


def bench_losses(
    quick: bool = False, *, device: str = "cpu", rounds: int | None = None, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Every case; see `cases`.

    Returns:
        JSON-able: `machine` and `rows`: milliseconds as median, least and greatest, `times_ours` as the ratio of
        medians, peak MiB that the call allocates, relative error of the value, and the largest error of the gradient
        over its largest entry.
    """
    where = torch.device(device)
    repeats = rounds or (5 if quick else 15)
    rows = []
    for case in cases(quick):
        measured = _rows(case, where, repeats)
        rows += measured
        timed = ", ".join(f"{r['peer']} {r['ms']['median']:.3g} ms" for r in measured if r["ms"] is not None)
        say(f"{case.name}, {case.inputs}: {timed}")
    return {"machine": machine([where]), "rounds": repeats, "rows": rows}


def format_losses(result: dict[str, Any]) -> str:
    """The rows as a table."""
    rows = [row | {k: None if row[k] is None else f"{row[k]:.0e}" for k in _ERRORS} for row in result["rows"]]
    return markdown(rows, COLUMNS)


_ERRORS = ("value_error", "gradient_error")


def _rows(case: Case, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    inputs = [x.to(case.dtype) for x in case.make(torch.Generator().manual_seed(0))]
    expected, expected_grads = _run(case.reference, [x.double() for x in inputs])
    placed = [x.to(device) for x in inputs]
    everyone: dict[str, Loss | None] = {OURS: case.loss, **case.peers}
    runners = {name: loss for name, loss in everyone.items() if loss is not None}
    times: dict[str, list[float]] = {name: [] for name in runners}
    figures: dict[str, dict[str, Any]] = {}
    for name, loss in runners.items():
        value, grads = _run(loss, placed)
        peak = peak_of(partial(_run, loss, placed), device)
        figures[name] = {
            "peak_mib": peak / 2**20,
            "value_error": abs(value - expected) / max(abs(expected), 1e-300),
            "gradient_error": max(
                float((a.cpu().double() - b).abs().max() / b.abs().max())
                for a, b in zip(grads, expected_grads, strict=True)
            ),
        }
    for _ in range(repeats):
        for name, loss in runners.items():
            times[name].append(1e3 * seconds(partial(_run, loss, placed), device))
    baseline = statistics.median(times[OURS])
    rows = []
    for name in everyone:
        measured = name in times
        rows.append(
            {"case": case.name, "inputs": case.inputs, "peer": name}
            | {
                "ms": spread(times[name]) if measured else None,
                "times_ours": statistics.median(times[name]) / baseline if measured else None,
                "note": case.notes.get(name, ""),
            }
            | figures.get(name, {"peak_mib": None, "value_error": None, "gradient_error": None})
        )
    return rows


def _run(loss: Loss, inputs: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
    """The value and the gradients of the inputs that have one."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = loss(*leaves)
    grads = torch.autograd.grad(value, leaves, allow_unused=True)
    return float(value.detach()), [g for g in grads if g is not None]
