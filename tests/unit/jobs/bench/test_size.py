"""`bench size`: its quick form runs, and its page shows the committed run."""

import json
from pathlib import Path

import pytest

from jobs.bench import __main__ as bench
from jobs.bench.size import page, process, simulate
from jobs.bench.storage.page import fill

ROOT = Path(__file__).parents[4]


def test_many_ranks_read_what_one_would_and_start_by_the_footer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(simulate, "_apart", process.main)  # processes of their own cost a start each
    out = tmp_path / "size.json"
    assert bench.main(["size", "--quick", "--nodes", "8,1", "--volumes", "300", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert "| nodes" in capsys.readouterr().out
    assert result["same"] == {"nodes": 8, "volumes": 270, "crops": 2 * 4 * 8, "equal": True}
    assert [row["nodes"] for row in result["steps"]] == [1, 8]
    (volumes,) = result["volumes"]
    assert volumes["open_requests"] == 2  # the pointer and the manifest
    assert result["checkpoints"][0]["size_mib"] > 48 * 1000 / 2**20


def test_a_number_of_nodes_is_a_whole_number(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["size", "--nodes", "1,none"])
    assert "'none' is not a whole number" in capsys.readouterr().err


def test_the_page_shows_the_committed_run() -> None:
    text = (ROOT / "docs/benchmarks-size.md").read_text(encoding="utf-8")
    assert fill(text, ROOT / "docs/benchmarks", page.TABLES) == text
    assert text.count("<!-- table ") == text.count("<!-- end -->") == len(page.TABLES)
