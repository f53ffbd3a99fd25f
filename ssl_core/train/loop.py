"""The loop over batches: when to log, probe, save and stop. It knows neither Ray nor MLflow: it is given callables."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ssl_core.train.engine import Engine
from ssl_core.views.types import ViewBatch
from storage.errors import TomoscaleError

Batch = ViewBatch | tuple[ViewBatch, float]


def fit(
    engine: Engine,
    batches: Iterable[Batch],
    *,
    report: Callable[[int, dict[str, float]], None],
    save: Callable[[int, dict[str, Any]], None],
    stop: Callable[[], bool] | None = None,
    probe: Callable[[Engine, ViewBatch], dict[str, float]] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """Train from `engine.step_done` to `engine.config.steps`.

    Args:
        engine: Fresh or with a loaded state.
        batches: This rank's views, on the engine's device, from the sample at which the engine stands: sample number
            `engine.step_done * global_batch`. With each the seconds spent waiting for data, where the source knows
            them; otherwise the whole time to get the next item counts as waiting.
        report: Called on every rank with the number of steps done and metrics: those of `Engine.step`, the probe's,
            `time/step_s`, `time/wait_share` (0 to 1, mean over ranks) and `time/samples_per_s` (all ranks together)
            since the last report.
        save: Called on every rank with the number of steps done and `Engine.state_dict()`, every
            `checkpoint_every` steps, at the end and before an early end. The state is live: write it before returning.
        stop: Asked before each step; when it answers True on any rank, all ranks end after the same step.
        probe: Called every `probe_every` steps and, where that is not 0, after the last step; returns metrics.
        clock: Seconds from a fixed point.

    Returns:
        Steps done: `engine.config.steps`, or fewer when stopped.

    Raises:
        NonFiniteError: see `Engine.step`.
        TomoscaleError: `batches` ended early.
    """
    config = engine.config
    engine.stopping = False
    source = iter(batches)
    began, waited, samples, steps = clock(), 0.0, 0, 0
    while engine.step_done < config.steps and not engine.stopping:
        request_time = clock()
        item = next(source, None)
        if item is None:
            raise TomoscaleError(
                "batches", expected=f"{config.steps} steps of them", found=f"the end after step {engine.step_done}"
            )
        views, wait = item if isinstance(item, tuple) else (item, clock() - request_time)
        metrics = engine.step(views, stop=stop is not None and stop())
        done = engine.step_done
        waited, samples, steps = waited + wait, samples + len(views), steps + 1
        last = done == config.steps  # so that short runs are probed too
        if probe is not None and config.probe_every and (last or done % config.probe_every == 0):
            metrics = metrics | probe(engine, views)
        if engine.log_due():
            now = clock()
            spent = max(now - began, 1e-9)
            share = torch.tensor(waited / spent, dtype=torch.float64, device=engine.device)
            metrics["time/wait_share"] = float(engine.collectives.mean(share))
            metrics["time/step_s"] = spent / steps
            metrics["time/samples_per_s"] = samples * engine.collectives.world / spent
            began, waited, samples, steps = now, 0.0, 0, 0
        if metrics:
            report(done, metrics)
        if done % config.checkpoint_every == 0 or last or engine.stopping:
            save(done, engine.state_dict())
    return engine.step_done
