"""A pre-training job of seconds, run in this process."""

from pathlib import Path
from typing import Any

import torch

from jobs.configs import PretrainConfig
from jobs.pretrain.loop import Hooks, Take, run
from jobs.tracking.runs import Point
from ssl_core.config import parse

CPU = torch.device("cpu")


def config(data: str, method: str, **engine: Any) -> PretrainConfig:
    crops = {"size_DHW": [16, 32, 16], "min_overlap": 0.3}
    return parse(
        PretrainConfig,
        {
            "name": "t",
            "data": data,
            "method": {"name": method, "crops": crops, "hidden": 16, "out": 8},
            "backbone": {"name": "basic_unet", "arguments": {"features": [4, 4, 8, 8, 16, 4]}},
            "stream": {"global_batch": 4, "lanes": 8},
            "engine": {"steps": 9, "warmup_steps": 2, "log_every": 2, "checkpoint_every": 4, "probe_every": 0} | engine,
        },
    )


def train(job: PretrainConfig, folder: Path, restore: Path | None = None) -> tuple[dict[str, Any], list[Point]]:
    points: list[Point] = []

    def keep(step: int, take: Take | None, _metrics: dict[str, float]) -> None:
        assert take is not None
        take().save(folder / f"step-{step}")

    result = run(job, Hooks(publish=keep, on_point=points.append), restore=restore, device=CPU)
    return result, points
