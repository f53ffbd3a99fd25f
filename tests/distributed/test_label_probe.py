"""Label transfer is one number on any number of ranks, and one rank's trouble silences all of them together."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from jobs.configs import PretrainConfig
from jobs.pretrain.loop import Hooks, run
from jobs.tracking.runs import Point
from ssl_core.config import parse
from tests.kit.phantoms import write_phantoms
from tests.kit.processes import spawn


def job(url: str, world: int) -> PretrainConfig:
    crops = {"size_DHW": [16, 32, 16], "min_overlap": 0.3}
    plan: dict[str, Any] = {
        "name": "t",
        "data": url,
        "method": {"name": "simclr", "crops": crops, "hidden": 16, "out": 8},
        "backbone": {"arguments": {"features": [4, 4, 8, 8, 16, 4]}},
        "stream": {"global_batch": 4, "lanes": 8},
        "engine": {"steps": 2, "warmup_steps": 0, "precision": "fp64", "probe_every": 2},
        "cluster": {"workers": world},
    }
    return parse(PretrainConfig, plan)


def transfer(config: PretrainConfig) -> tuple[list[float], list[str]]:
    points: list[Point] = []
    said: list[str] = []
    hooks = Hooks(publish=lambda *_: None, on_point=points.append, say=said.append)
    run(config, hooks, restore=None, device=torch.device("cpu"))
    return [p.metrics["probe/knn_dice"] for p in points if "probe/knn_dice" in p.metrics], said


def on_ranks(folder: Path) -> None:
    found, _ = transfer(job(f"file://{folder}/store", dist.get_world_size()))
    if dist.get_rank() == 0:
        torch.save(torch.tensor(found, dtype=torch.float64), folder / "found.pt")


def with_a_rank_that_cannot_read(folder: Path) -> None:
    if dist.get_rank() == 1:
        import jobs.pretrain.label_probe as module
        from storage.errors import StoreError

        def away(*_: Any) -> None:
            raise StoreError("crops", expected="an answer", found="none")

        module.read_labelled = away  # type: ignore[assignment]
    found, said = transfer(job(f"file://{folder}/store", dist.get_world_size()))
    assert not found
    if dist.get_rank() == 0:
        assert any("another rank could not read them" in line for line in said)


@pytest.mark.parametrize("world", [2])
def test_ranks_agree_with_one_process_and_are_silent_together(world: int, tmp_path: Path) -> None:
    write_phantoms(f"file://{tmp_path}/store", 8)
    (alone,), _ = transfer(job(f"file://{tmp_path}/store", 1))
    spawn(world, tmp_path, [on_ranks, with_a_rank_that_cannot_read])
    (shared,) = torch.load(tmp_path / "found.pt", weights_only=True).tolist()
    assert shared == pytest.approx(alone, abs=1e-12)
