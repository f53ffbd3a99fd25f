"""What each Ray Train worker runs: the loop, with Ray Train's checkpoints and MLflow's points."""

import os
import tempfile
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch

from jobs import lease
from jobs.configs import PretrainConfig
from jobs.driver import quiet
from jobs.pretrain.loop import Hooks, run
from jobs.tracking.runs import Sender
from ssl_core.config import parse

KIND = "pretrain"
"""Of the job, in MLflow and in the name of its lease."""


def train_loop(payload: dict[str, Any]) -> None:
    """Train one rank, from the run's last checkpoint when there is one.

    Args:
        payload: `config`, the resolved configuration, `run_id`, the MLflow run, and `lease`, the job's token.
    """
    quiet()
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    config = parse(PretrainConfig, payload["config"])
    context = ray.train.get_context()
    sender = Sender(payload["run_id"]) if context.get_world_rank() == 0 else None

    def publish(step: int, directory: Path | None, metrics: dict[str, float]) -> None:
        if directory is not None:
            lease.require(config.runs, config.name, KIND, payload["lease"])
        checkpoint = None if directory is None else ray.train.Checkpoint.from_directory(str(directory))
        ray.train.report({"step": step, **metrics}, checkpoint=checkpoint, checkpoint_dir_name=f"step-{step:08d}")

    hooks = Hooks(
        publish=publish,
        on_point=sender.put if sender else lambda _point: None,
        say=lambda line: print(line, flush=True),
    )
    device = ray.train.torch.get_device()
    cache_dir = Path(tempfile.gettempdir()) / f"tomoscale-cache-{os.getuid()}"
    last = ray.train.get_checkpoint()
    if last is None:
        run(config, hooks, restore=None, device=device, cache_dir=cache_dir)
    else:
        with last.as_directory() as folder:
            run(config, hooks, restore=Path(folder), device=device, cache_dir=cache_dir)
    if sender is not None:
        sender.close()
