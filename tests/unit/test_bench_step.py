"""The benchmark measures what it says."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from ssl_core.bench.step import PARTS, crops, main, measure

SMALL = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "features": (4, 4, 8, 8, 8, 4)}


def test_a_row_adds_up() -> None:
    row = measure("simclr", "basic_unet", size_DHW=(32, 32, 32), batch=2, steps=2, warmup=1, arguments=SMALL)
    assert set(row.shares) == set(PARTS)
    assert sum(row.shares.values()) == pytest.approx(1.0)
    assert min(row.shares.values()) >= 0
    assert row.shares["network"] > 0.05
    assert row.shares["backward"] > 0.05
    assert row.samples_per_s == pytest.approx(2 / row.step_s[0])
    assert row.peak_mib > 50


def test_a_slow_source_shows_as_wait() -> None:
    def slow(spec: Any) -> Any:
        for host in crops(spec, 2):
            time.sleep(1.0)
            yield host

    row = measure(
        "simclr", "basic_unet", size_DHW=(32, 32, 32), batch=2, steps=1, warmup=1, arguments=SMALL, source=slow
    )
    assert row.shares["wait"] > 0.1  # without it, 0.001
    assert row.step_s[0] > 1.0


def test_the_command_writes_figures_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "step.json"
    command = ["--methods", "simclr", "--size", "32", "32", "32", "--batch", "2", "--steps", "1", "--devices", "cpu"]
    assert main([*command, "--json", str(file), "precision=fp32"]) == 0
    found = json.loads(file.read_text())
    assert found["rows"][0]["method"] == "simclr"
    assert "samples/s" in capsys.readouterr().out
    assert main([*command, "precison=fp32"]) == 2
    assert "did you mean 'precision'" in capsys.readouterr().err
