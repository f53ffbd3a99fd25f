"""`tomoscale bench predict`, small: a real prediction in a process of its own, and what is said of it."""

import json
import sys
from pathlib import Path

import pytest

from jobs.bench import prediction
from jobs.bench.__main__ import main
from jobs.bench.measure import peak_mib
from storage.errors import StackError


def test_a_prediction_is_measured_in_a_process_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "predict.json"
    assert main(["predict", "--quick", "--size", "24", "32", "40", "--classes", "3", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["size"]["shape_DHW"] == [24, 32, 40]
    assert result["cpu_seconds"] > 0.5
    assert 0.05 < result["peak_gib"] < prediction.LIMIT_GIB
    assert "fits in 8 GiB" in capsys.readouterr().out
    too_much = prediction.format_predict(result | {"peak_gib": 8.01})
    assert "8.01 GiB, does NOT fit in 8 GiB" in too_much


def test_a_prediction_that_fails_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(StackError, match="exit code 0"):
        prediction.bench_predict(prediction.QUICK, say=lambda _line: None)


def test_the_peak_of_a_process_is_what_it_once_had() -> None:
    before = peak_mib()
    block = bytearray(int(before + 64) << 20)
    block[:: 1 << 12] = b"x" * len(block[:: 1 << 12])
    del block
    assert peak_mib() > before + 60
