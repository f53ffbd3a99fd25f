"""The page of the step, loss and view benchmarks shows what its runs measured."""

import json
from pathlib import Path
from typing import Any

from jobs.bench.device.page import TABLES
from jobs.bench.storage.page import fill

ROOT = Path(__file__).parents[4]
RUNS = ROOT / "docs/benchmarks/steps"


def run(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RUNS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def test_the_page_shows_the_committed_runs_in_every_table() -> None:
    text = (ROOT / "docs/benchmarks-steps.md").read_text(encoding="utf-8")
    assert fill(text, RUNS, TABLES) == text
    assert all(f"<!-- table {name} -->" in text for name in TABLES)


def test_committed_runs_name_their_machine_and_versions() -> None:
    for name in {source for source, _ in TABLES.values()}:
        facts = run(name)["machine"]
        assert facts["processor"]
        assert facts["threads"] >= 1
        assert {"torch", "monai"} <= set(facts["versions"])


def test_shares_and_ratios_of_the_committed_runs_add_up() -> None:
    for name in ("variants", "methods", "backbones", "nnssl"):
        for row in run(name)["rows"]:
            assert abs(sum(row["shares"].values()) - 1) < 1e-9
            assert abs(row["gflop"] / row["step_s"][0] / row["rate_gflops"] - row["reached"]) < 1e-9
            assert row["reached"] < 1


def test_every_method_and_variant_is_in_the_committed_runs() -> None:
    from jobs.bench.device.step import VARIANTS
    from ssl_core.methods.base import method_names

    # One that was added since is measured when its author wants it in the table.
    ours = "aligned byol compose lrc mae mocov2 models_genesis pcl pcrlv2 pgl simclr ssal supervised"
    assert set(ours.split()) <= {row["method"] for row in run("methods")["rows"]} <= set(method_names())
    assert {row["variant"] for row in run("variants")["rows"]} == set(VARIANTS)
