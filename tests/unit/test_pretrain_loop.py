"""The loop of one rank: a resumed run is the undisturbed run; another configuration or other data is refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.configs import PretrainConfig
from jobs.pretrain_loop import Hooks, identity, open_manifest, run
from jobs.tracking import Point
from ssl_core import checkpoint
from ssl_core.config import parse
from storage.errors import ConfigError
from tests.phantoms import write_phantoms

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


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = f"file://{tmp_path_factory.mktemp('store')}"
    write_phantoms(url, 8)
    return url


def train(job: PretrainConfig, folder: Path, restore: Path | None = None) -> tuple[dict[str, Any], list[Point]]:
    points: list[Point] = []

    def keep(step: int, directory: Path | None, _metrics: dict[str, float]) -> None:
        assert directory is not None
        shutil.copytree(directory, folder / f"step-{step}", dirs_exist_ok=True)

    result = run(job, Hooks(publish=keep, on_point=points.append), restore=restore, device=CPU)
    return result, points


@pytest.mark.parametrize("method", ["pgl", "simclr"])
def test_a_resumed_run_is_bitwise_the_undisturbed_run(data: str, method: str, tmp_path: Path) -> None:
    job = config(data, method)
    whole, points = train(job, tmp_path / "whole")
    resumed, later = train(job, tmp_path / "resumed", tmp_path / "whole" / "step-4")
    assert resumed["samples"] == whole["samples"]
    state, meta = checkpoint.load(tmp_path / "whole" / "step-9")
    again, meta_again = checkpoint.load(tmp_path / "resumed" / "step-9")
    for name, tensor in state["method"].items():
        assert torch.equal(tensor, again["method"][name]), name
    for name, entry in state["optimizer"].items():
        for key, value in entry.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(again["optimizer"][name][key])), (name, key)
    losses = {p.step: p.metrics["loss"] for p in points}
    assert [p.step for p in points] == [1, 2, 4, 6, 8, 9]
    assert {p.step: p.metrics["loss"] for p in later} == {s: v for s, v in losses.items() if s > 4}
    journal = [(p[0], p[2]["loss"]) for p in meta_again["journal"]]
    assert journal == [(p[0], p[2]["loss"]) for p in meta["journal"]] == sorted(losses.items())


def test_a_resume_with_other_settings_or_other_data_is_refused(data: str, tmp_path: Path) -> None:
    job = config(data, "simclr")
    train(job, tmp_path / "a")
    kept = tmp_path / "a" / "step-4"
    with pytest.raises(ConfigError, match="config_digest"):
        train(config(data, "simclr", lr=3e-4), tmp_path / "b", kept)
    other = f"file://{tmp_path / 'other'}"
    write_phantoms(other, 8, seed=1)
    with pytest.raises(ConfigError, match="fingerprint|config_digest"):
        train(config(other, "simclr"), tmp_path / "b", kept)


def test_where_and_how_often_are_not_part_of_the_identity(data: str) -> None:
    job = config(data, "simclr")
    manifest = open_manifest(job)
    moved = job.model_copy(
        update={"name": "x", "runs": "s3://elsewhere", "engine": job.engine.model_copy(update={"log_every": 7})}
    )
    assert identity(moved, manifest) == identity(job, manifest)
    reseeded = job.model_copy(update={"engine": job.engine.model_copy(update={"seed": 5})})
    assert identity(reseeded, manifest) != identity(job, manifest)


def test_an_empty_split_is_named(data: str) -> None:
    job = config(data, "simclr")
    wrong = job.model_copy(update={"stream": job.stream.model_copy(update={"split": "nope"})})
    with pytest.raises(ConfigError, match="nope"):
        open_manifest(wrong)
