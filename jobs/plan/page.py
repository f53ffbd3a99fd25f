"""A plan as JSON, and as a table with one column for each number of workers; both say what was measured."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jobs.configs import PretrainConfig
from jobs.output import table
from jobs.plan.estimate import Estimated, Links, Prices
from jobs.plan.measure import WARM_UP, Measured
from ssl_core.config import digest

MEASURED, ESTIMATED = "measured", "estimated"


@dataclass(frozen=True)
class Column:
    """One number of workers: what was measured and what follows, or why it cannot be."""

    workers: int
    measured: Measured | None = None
    estimated: Estimated | None = None
    reason: str = ""


def to_json(config: PretrainConfig, columns: Sequence[Column], links: Links, prices: Prices) -> dict[str, Any]:
    """Plain values; every number lies under `measured` or `estimated`, or was given."""
    return {
        "name": config.name,
        "digest": digest(config),
        "steps": config.engine.steps,
        "warm_up_steps": WARM_UP,
        "given": {"links": asdict(links), "prices": asdict(prices)},
        "workers": [
            {
                "workers": column.workers,
                MEASURED: None if column.measured is None else asdict(column.measured),
                ESTIMATED: None if column.estimated is None else asdict(column.estimated),
                "reason": column.reason,
            }
            for column in columns
        ],
    }


def text(config: PretrainConfig, columns: Sequence[Column], links: Links, prices: Prices) -> str:
    """The table and what it rests on."""
    done = [(c.measured, c.estimated) for c in columns if c.measured is not None and c.estimated is not None]
    lines = [f"{config.name}: {config.method_name}, {config.engine.steps} steps of {config.stream.global_batch} crops"]
    if done:
        first = done[0][0]
        lines.append(
            f"{MEASURED}: {first.steps} steps after {WARM_UP} others, as one worker, on this machine ({first.device});"
            f" {first.parameters:,} trainable parameters"
        )
        lines.append(
            f"{ESTIMATED}: every worker has a share like this machine's; gradients averaged at"
            f" {links.gradients_gbit:g} Gbit/s, not overlapped with the backward pass; {_store(links)}"
        )
        header = ("", "", *(f"{m.workers} worker{'s' * (m.workers > 1)}" for m, _ in done))
        lines += [
            "",
            table(header, [(name, how, *(cell(*pair) for pair in done)) for name, how, cell in _rows(prices)]),
        ]
    lines += [f"{c.workers} workers: {c.reason}" for c in columns if c.reason]
    if done and config.stream.cache_gib:
        lines.append("the node's cache was left out: with it, later epochs read less")
    if done and not prices.any:
        lines.append("for money: --node-hour, --gigabyte, --thousand-requests")
    return "\n".join(lines)


def _store(links: Links) -> str:
    if links.store_gbit is None:
        return "the store gives each as much as it gave to one"
    return f"the store gives all together {links.store_gbit:g} Gbit/s"


Cell = Callable[[Measured, Estimated], str]


def _rows(prices: Prices) -> list[tuple[str, str, Cell]]:
    rows: list[tuple[str, str, Cell]] = [
        ("samples of a worker", "", lambda m, _: str(m.samples)),
        ("compute, s a step", MEASURED, lambda m, _: f"{m.compute_s:.3g}"),
        ("wait for data, s a step", MEASURED, lambda m, _: f"{m.wait_s:.3g}"),
        ("averaging gradients, s a step", ESTIMATED, lambda _, e: f"{e.reduce_s:.3g}"),
        ("step, s", ESTIMATED, lambda _, e: f"{e.step_s:.3g}"),
        ("hours", ESTIMATED, lambda _, e: f"{e.hours:.3g}"),
        ("read by a worker, MB a step", MEASURED, lambda m, _: f"{m.read_bytes / 1e6:.3g}"),
        ("requests of a worker, a step", MEASURED, lambda m, _: f"{m.requests:.3g}"),
        ("read in all, GB", ESTIMATED, lambda _, e: f"{e.read_bytes / 1e9:.3g}"),
        ("requests in all", ESTIMATED, lambda _, e: f"{e.requests:,.0f}"),
        ("read together, Gbit/s", ESTIMATED, lambda m, e: f"{m.workers * m.read_bytes * 8e-9 / e.step_s:.3g}"),
        ("a checkpoint, MB", MEASURED, lambda m, _: f"{m.checkpoint_bytes / 1e6:.3g}"),
        ("memory of a worker, GB", MEASURED, lambda m, _: f"{m.resident_bytes / 1e9:.3g}"),
        (
            "GPU memory of a worker, GB",
            MEASURED,
            lambda m, _: "-" if m.gpu_bytes is None else f"{m.gpu_bytes / 1e9:.3g}",
        ),
        ("bound by", ESTIMATED, lambda _, e: e.bound),
    ]
    if prices.any:
        rows.append((f"money, {prices.workers_per_node} worker(s) a node", ESTIMATED, lambda _, e: f"{e.money:,.2f}"))
    return rows
