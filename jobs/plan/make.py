"""A plan: each number of workers measured, from the smallest batch of a worker to the largest."""

from collections.abc import Callable, Sequence

import torch

from jobs.configs import PretrainConfig
from jobs.plan.estimate import Links, Prices, estimate
from jobs.plan.measure import measure
from jobs.plan.one_rank import with_workers
from jobs.plan.page import Column
from storage.errors import ConfigError

WORKERS = (1, 4, 16, 64)


def make(
    config: PretrainConfig,
    workers: Sequence[int],
    *,
    steps: int,
    links: Links,
    prices: Prices,
    say: Callable[[str], None] = lambda _line: None,
) -> list[Column]:
    """A column for each number of workers and for the job's own, ascending.

    The memory of a process is that of its largest batch so far, so small batches come first.

    Args:
        config: The job.
        workers: Numbers of them.
        steps: To time for each.
        links: Bandwidths.
        prices: What costs what.
        say: Hears what is measured next.
    """
    counts = sorted({config.cluster.workers, *workers})
    columns = [_column(config, count, steps, links, prices, say) for count in reversed(counts)]
    return columns[::-1]


def _column(
    config: PretrainConfig, count: int, steps: int, links: Links, prices: Prices, say: Callable[[str], None]
) -> Column:
    try:
        job = with_workers(config, count)
    except ConfigError as error:
        return Column(count, reason=f"not possible: expected {error.expected}")
    say(f"measuring {steps} steps as one worker of {count} ...")
    try:
        measured = measure(job, steps=steps)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return Column(count, reason="its batch does not fit into this GPU's memory")
    return Column(count, measured, estimate(job, measured, links, prices))
