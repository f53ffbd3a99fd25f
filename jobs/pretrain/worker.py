"""What each Ray Train worker runs: the loop, with Ray Train's checkpoints and MLflow's points."""

import os
import tempfile
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch

from jobs import lease
from jobs.certificate.captures import Captures
from jobs.configs import PretrainConfig
from jobs.configs.groups import CheckpointConfig
from jobs.driver import quiet
from jobs.on_ray import preemption
from jobs.on_ray.metrics import WorkerMetrics, keep_showing
from jobs.on_ray.uploads import Uploads
from jobs.pretrain.loop import KIND, Hooks, Take, run
from jobs.tracking.runs import Sender
from jobs.tracking.system import NodeMetrics
from ssl_core.config import parse
from ssl_core.distributed import current
from storage.objects import join

UNMEASURED = 1e308
"""Stands for a metric that a checkpoint has not; a number, since Ray keeps no other in its record of checkpoints."""


def unmeasured(retention: CheckpointConfig) -> dict[str, float]:
    """The value of `best_by` before it is measured: the worst one, as Ray takes none for the best of `min`."""
    worst = UNMEASURED if retention.best_is == "min" else -UNMEASURED
    return {} if retention.best_by is None else {retention.best_by: worst}


def train_loop(payload: dict[str, Any]) -> None:
    """Train one rank, from the run's last checkpoint when there is one, to the last step or a notice of preemption.

    Args:
        payload: `config`, the resolved configuration, `run_id`, the MLflow run, and `lease`, the job's token.
    """
    quiet()
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    config = parse(PretrainConfig, payload["config"])
    context = ray.train.get_context()
    sender = Sender(payload["run_id"]) if context.get_world_rank() == 0 else None

    metrics = WorkerMetrics(config.name, context.get_world_rank(), context.get_world_size(), config.engine.steps)
    keep_showing()
    uploads = Uploads(lambda: lease.require(config.runs, config.name, KIND, payload["lease"]), metrics.saved)

    def publish(step: int, take: Take | None, last: dict[str, float]) -> None:
        uploads.report(f"step-{step:08d}", {"step": step, **unmeasured(config.checkpoints), **last}, take)

    hooks = Hooks(
        publish=publish,
        on_point=sender.put if sender else lambda _point: None,
        is_recorded=sender.is_recorded if sender else lambda _step: False,
        say=lambda line: print(line, flush=True),
        stop=preemption.is_announced,
        on_report=metrics.report,
        captures=Captures(join(config.runs, config.name), lambda line: print(line, flush=True)),
    )
    device = ray.train.torch.get_device()
    cache_dir = Path(tempfile.gettempdir()) / f"tomoscale-cache-{os.getuid()}"
    # Fewer on a node than in all is so on every rank or on none.
    collectives = current(overlap=context.get_local_world_size() < context.get_world_size())
    train = partial(run, config, hooks, device=device, cache_dir=cache_dir, collectives=collectives)
    last = ray.train.get_checkpoint()
    with _node_metrics(context, payload["run_id"]):
        if last is None:
            train(restore=None)
        else:
            with last.as_directory() as folder:
                train(restore=Path(folder))
    if sender is not None:
        sender.close()


def _node_metrics(context: Any, run_id: str) -> AbstractContextManager[Any]:
    """What the node does meanwhile, of one of its ranks."""
    if context.get_local_rank():
        return nullcontext()
    is_alone = context.get_local_world_size() == context.get_world_size()
    return NodeMetrics(run_id, "" if is_alone else f"node-{context.get_node_rank()}")
