"""`bench loader` and `bench step` from the command line: what is asked for is measured, printed and written."""

import json
from pathlib import Path

import pytest

from jobs.bench.device import rate, step
from jobs.bench.storage import loader
from jobs.cli import main as cli


@pytest.fixture(autouse=True)
def _no_stack(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TOMOSCALE_STATE", str(tmp_path / "none"))
    monkeypatch.setattr(rate, "SHAPES", ((8, 16),))  # the machine's own rate takes many seconds
    small = ("basic_unet", {"features": (4, 4, 8, 8, 8, 4)})  # bf16 is slow on most CPUs
    for name in step.BACKBONES:
        monkeypatch.setitem(step.BACKBONES, name, small)
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)


def test_bench_step_measures_what_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["bench", "step", "--methods", "mae", "--devices", "cpu", "--size", "32", "32", "32", "--batch", "1"]
    out = tmp_path / "step.json"
    assert cli.main([*asked, "--steps", "1", "--out", str(out), "--json", "precision=bf16"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text())
    (row,) = printed["rows"]
    assert (row["method"], row["batch"], row["size_DHW"], row["precision"]) == ("mae", 1, [32, 32, 32], "bf16")
    assert row["samples_per_s"] > 0


def test_bench_step_refuses_unknown_names_and_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "step", "--methods", "none_such"]) == 2
    assert "none_such" in capsys.readouterr().err
    assert cli.main(["bench", "step", "--methods", "mae", "stps=3"]) == 2
    assert "did you mean 'steps'" in capsys.readouterr().err


def test_bench_loader_without_a_stack_measures_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loader, "QUICK", loader.Size(1, (100, 100, 100), 2, 2, 16, (), (100,), batch=8, step_s=0.01))
    out = tmp_path / "loader.json"
    assert cli.main(["bench", "loader", "--quick", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert {row["where"] for row in result["rows"]} == {"local"}
    printed = capsys.readouterr()
    assert "data wait %" in printed.out
    assert "make volumes" in printed.err
