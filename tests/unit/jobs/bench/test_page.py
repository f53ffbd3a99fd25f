"""The page of the storage benchmarks shows what its runs measured."""

import json
from pathlib import Path

import pytest

from jobs.bench.storage import page
from storage.errors import ConfigError

ROOT = Path(__file__).parents[4]
SPREAD = {"median": 1, "low": 1, "high": 2}
RUN = {
    "rows": [
        {"data": "a", "where": "local", "peer": "one", "state": "warm", "crops_per_s": SPREAD},
        {"data": "b", "where": "local", "peer": "other"},
        {"data": "a", "where": "s3", "peer": "remote"},
    ],
    "ratios": [
        {"data": "a", "what": "won", "value": 2.0, "target": 1.0, "met": "yes"},
        {"data": "a", "what": "lost", "value": 0.5, "target": 1.0, "met": "no"},
    ],
}


def test_the_page_shows_the_committed_runs() -> None:
    text = (ROOT / "docs/benchmarks-storage.md").read_text(encoding="utf-8")
    assert page.fill(text, ROOT / "docs/benchmarks/storage") == text
    assert text.count("<!-- table ") == text.count("<!-- end -->") >= 15


def test_a_block_is_replaced_by_the_rows_it_names(tmp_path: Path) -> None:
    (tmp_path / "reads.json").write_text(json.dumps(RUN))
    text = "before\n<!-- table reads-here: a -->\nold\n<!-- end -->\nafter <!-- table reads-missed -->\n<!-- end -->\n"
    filled = page.fill(text, tmp_path)
    assert page.fill(filled, tmp_path) == filled
    assert "| one " in filled
    assert "1 [1, 2]" in filled
    assert not any(word in filled for word in ("old", "other", "remote", "won"))
    assert "| lost" in filled
    assert filled.startswith("before\n<!-- table reads-here: a -->\n")


def test_an_unknown_table_and_a_missing_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="reads-ratios"):
        page.fill("<!-- table reads-rations -->\n<!-- end -->", tmp_path)
    with pytest.raises(ConfigError, match=r"loader\.json"):
        page.fill("<!-- table loader -->\n<!-- end -->", tmp_path)
