"""The loop under `torchrun`: asked to stop, it saves; started again, it ends as if it had never stopped."""

import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster import ports
from jobs import torchrun
from jobs.certificate import document
from jobs.configs import PretrainConfig
from jobs.lease import Lease
from ssl_core.config import dump_yaml, parse
from ssl_core.train import checkpoint
from storage.errors import StackError
from storage.objects import open_store
from tests.kit.networks import SMALL
from tests.kit.phantoms import write_phantoms

STEPS = 60


def start(out: Path, config: Path, tmp: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "jobs.torchrun", str(config), *overrides, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp)}  # torchrun leaves a folder there
    return subprocess.Popen(
        command,
        cwd=Path(__file__).parents[2],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def result(out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    return checkpoint.load(out / "run" / f"step-{STEPS:08d}")


def test_a_second_run_of_the_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (port,) = ports.find_free(1)
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(torchrun, "Lease", partial(Lease, grace_s=0.1))
    write_phantoms(f"file://{tmp_path}/store", 8)
    config = written(tmp_path)
    out = tmp_path / "out"
    with Lease(out.as_uri(), "run", "pretrain"), pytest.raises(StackError, match="no job of this name is at work"):
        torchrun.main([str(config), "--out", str(out)])
    assert not list(out.glob("run/step-*"))


def written(folder: Path) -> Path:
    """The configuration, as a file."""
    crops = {"size_DHW": [16, 16, 16], "scale": [1.0, 1.2], "min_overlap": 0.3}
    job = {
        "name": "run",
        "data": f"file://{folder}/store",
        "runs": f"file://{folder}/runs",
        "method": {"name": "pgl", "crops": crops, "hidden": 32, "out": 16},
        "backbone": {"name": "resenc", "arguments": SMALL["resenc"]},  # starts without MONAI, seconds sooner
        "stream": {"global_batch": 4, "lanes": 8},
        "engine": {"steps": STEPS, "warmup_steps": 4, "log_every": 1, "checkpoint_every": 1000, "probe_every": 0},
    }
    config = folder / "config.yaml"
    config.write_text(dump_yaml(parse(PretrainConfig, job)))
    return config


def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path) -> None:
    write_phantoms(f"file://{tmp_path}/store", 8)
    config = written(tmp_path)

    whole = start(tmp_path / "whole", config, tmp_path)
    said, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, said

    halted = start(tmp_path / "halted", config, tmp_path)
    assert halted.stdout is not None
    for line in halted.stdout:
        if line.startswith("step 5/"):
            os.killpg(halted.pid, signal.SIGTERM)
            break
    said, _ = halted.communicate(timeout=300)
    assert halted.returncode != 0
    assert "stopped after step" in said, said
    (left,) = (tmp_path / "halted" / "run").glob("step-*")
    assert 5 <= int(left.name[5:]) < STEPS

    again = start(tmp_path / "halted", config, tmp_path)
    said, _ = again.communicate(timeout=300)
    assert again.returncode == 0, said
    assert f"resumed at step {int(left.name[5:])}" in said, said
    (state, meta), (other, facts) = result(tmp_path / "whole"), result(tmp_path / "halted")
    assert facts["samples"] == meta["samples"]
    assert all(torch.equal(tensor, other["method"][name]) for name, tensor in state["method"].items())

    one, two = (document.read(open_store((tmp_path / name / "run").as_uri())) for name in ("whole", "halted"))
    assert one["chain"] == two["chain"]


def test_a_run_in_shards_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    write_phantoms(f"file://{tmp_path}/store", 8)
    config, ends = written(tmp_path), []
    for _ in range(2):
        settings = ["engine.sharding=full", "engine.steps=8", "engine.checkpoint_every=4"]
        run = start(tmp_path / "out", config, tmp_path, *settings)
        said, _ = run.communicate(timeout=300)
        assert run.returncode == 0, said
        last = tmp_path / "out" / "run" / "step-00000008"
        ends.append((checkpoint.load(last), document.read(open_store((tmp_path / "out" / "run").as_uri()))))
        shutil.rmtree(last)
    assert "resumed at step 4" in said
    ((state, facts), one), ((other, others), two) = ends
    assert facts["samples"] == others["samples"]
    assert all(torch.equal(tensor, other["method"][name]) for name, tensor in state["method"].items())
    assert one["chain"] == two["chain"]
