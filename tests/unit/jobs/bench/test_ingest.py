"""`bench ingest` and `bench layout`: what they measure is what they say."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jobs.bench.storage import data, ingest, layouts, monai_ingest
from jobs.bench.storage.data import write_nifti
from storage.errors import StoreError
from storage.format.manifest import Manifest
from storage.ingest.policy import IngestPolicy
from storage.reading.volume_store import VolumeStore

SMALL = ingest.Size(phantoms=2, real=0, rounds=1, shape=(24, 28, 32), cores=(1,))


@pytest.fixture(autouse=True)
def _no_real_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOMOSCALE_DATASETS", raising=False)


def test_an_ingest_run_measures_each_spacing_in_a_process_of_its_own() -> None:
    said: list[str] = []
    size = replace(SMALL, rounds=3, budget_s=0)  # of which one is always done
    result = ingest.bench_ingest(size=size, progress=said.append)
    assert json.loads(json.dumps(result))["rows"]
    assert [(r["tool"], r["spacing"], r["cores"], r["volumes"]) for r in result["rows"]] == [
        ("tomoscale", "as found", 1, 2),
        ("tomoscale", "to 1 mm", 1, 2),
    ]
    for row in result["rows"]:
        assert len(row["seconds"]) == 1
        assert row["raw_mb"] == pytest.approx(2 * 24 * 28 * 32 * 2 / 1e6)
        assert row["mb_per_s"]["median"] == pytest.approx(row["raw_mb"] / row["seconds"][0])
        assert row["stored_mb"] > 0
    assert result["ratios"] == []
    assert "phantom CT 32x28x24" in ingest.format_ingest(result)


def test_a_tool_that_fails_ends_the_run_with_its_last_words() -> None:
    with pytest.raises(StoreError, match=r"no_such_module"):
        ingest.bench_ingest(size=SMALL, tools=[ingest.Tool("broken", "no_such_module")])


def test_ratios_are_times_of_the_peer_over_ours_round_by_round() -> None:
    same = {"data": "x", "spacing": "as found", "cores": 1}
    rows = [
        {**same, "tool": "tomoscale", "seconds": [1.0, 2.0], "cpu_s": [3.0, 3.0]},
        {**same, "tool": "peer", "seconds": [2.0, 1.0], "cpu_s": [1.0, 2.0]},
    ]
    clock, processor = ingest._ratios(rows)
    assert (clock["value"]["low"], clock["value"]["high"], clock["met"]) == (0.5, 2.0, "yes")
    assert (processor["value"]["median"], processor["met"]) == (pytest.approx(0.5), "no")


def test_both_sides_ingest_the_same_files(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    volumes = data.phantoms(2, (24, 28, 32))
    write_nifti(volumes, source)
    files = [str(path) for path in sorted(source.iterdir())]
    job = {"files": files, "target": str(tmp_path / "ours"), "spacing_mm": None, "cores": 1}
    took = ingest.timed(ingest.ours, job)
    assert took["seconds"] > 0
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("source", "ours")] == []
    url = (tmp_path / "ours" / "store").as_uri()
    assert Manifest.open(url).record(0).policy == IngestPolicy().version
    with VolumeStore(url) as store:
        assert np.array_equal(store.read_volume("ct-00")[0], volumes.volumes["ct-00"])
    monai_ingest.first_pass({**job, "target": str(tmp_path / "monai"), "spacing_mm": 1.5})
    assert len(list((tmp_path / "monai").glob("*.pt"))) == 2


def test_the_layout_study_finds_the_chosen_layout_and_its_costs() -> None:
    size = layouts.Size((64, 64, 64), real=0, edges=(32,), repeats=1, most_chunks=8)
    result = layouts.bench_layout(size=size)
    (chosen,) = [row for row in result["rows"] if row["chosen"]]
    assert chosen["codec"] == "lz4 5, bit shuffle"
    assert chosen["chunk"] == "32x32x32"
    assert chosen["chunks"] == pytest.approx((127 / 32) ** 3)
    assert chosen["fetch_mb"] == pytest.approx(127**3 * 2 / chosen["ratio"] / 1e6)
    assert chosen["ratio"] > 1.5
    assert "decode ms/crop" in layouts.format_layout(result)
