"""`bench checkpoint` trains beside real uploads of real checkpoints, here into a folder."""

import json
from pathlib import Path

import pytest

from jobs.bench import __main__ as bench


def test_steps_with_and_without_a_checkpoint_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    out = tmp_path / "checkpoint.json"
    assert bench.main(["checkpoint", "--quick", "--mb", "2", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    counts = {row["step"]: row["count"] for row in result["rows"]}
    assert counts["without"] == 2 * 3
    assert counts["with the copy"] == counts["the copy alone"] == 2
    assert 2e6 < result["uploads"]["bytes"] < 2.1e6
    assert "send to a folder" in capsys.readouterr().out
