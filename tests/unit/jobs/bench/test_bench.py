import json
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.bench import measure
from jobs.bench.storage import data, loader, reads
from jobs.bench.storage.peers import PEERS, Peer, Reader
from jobs.bench.storage.torch_peers import TORCH_PEERS, TORCH_WRITERS
from storage.errors import ConfigError, StoreError

SMALL = reads.Size(2, (40, 48, 56), crops=3, rounds=2, delays_ms=(0,), cap_s=2.0, real=0, budget_s=60)
LOCAL = [peer.name for peer in PEERS if peer.where == "local"]
WRITERS = {**data.WRITERS, **TORCH_WRITERS}


@pytest.fixture(scope="module")
def phantoms() -> data.DataSet:
    return data.phantoms(2, (40, 48, 56), crop_DHW=(20, 24, 28))


def test_phantoms_are_ct_like_and_repeatable(phantoms: data.DataSet) -> None:
    again = data.phantoms(2, (40, 48, 56))
    for name, volume in phantoms.volumes.items():
        assert volume.dtype == np.int16
        assert np.array_equal(volume, again.volumes[name])
        assert -1024 <= volume.min() < -900
        assert volume.max() > 50
        air = volume[:2, :2, :2].astype(float)
        assert 4 < air.std() < 30, "air has noise, as a scan has"


def test_crops_are_seeded_and_inside(phantoms: data.DataSet) -> None:
    wants = phantoms.crops(200, seed=3)
    assert wants == phantoms.crops(200, seed=3)
    assert wants != phantoms.crops(200, seed=4)
    assert {name for name, _ in wants} == set(phantoms.volumes)
    assert all(phantoms.cut(name, start).shape == (20, 24, 28) for name, start in wants)


@pytest.mark.parametrize("peer", [p for p in (*PEERS, *TORCH_PEERS) if p.where == "local"], ids=lambda p: p.name)
def test_every_local_reader_returns_the_voxels(peer: Peer, phantoms: data.DataSet, tmp_path: Path) -> None:
    pytest.importorskip(peer.package)
    at = data.Layouts(phantoms, tmp_path / "layouts", None, WRITERS)
    wants = phantoms.crops(5, seed=1)
    for in_flight in peer.in_flight:
        reader = peer.make(at, in_flight, tmp_path)
        crops = reader.read(wants)
        asked = reader.drawn if peer.own_crops else wants
        for (name, start), found in zip(asked, crops, strict=True):
            assert found.flags.c_contiguous or found.transpose(2, 1, 0).flags.c_contiguous
            assert not any(np.shares_memory(found, volume) for volume in phantoms.volumes.values())
            assert np.array_equal(found, phantoms.cut(name, start))
        reader.close()


def test_a_peer_without_its_package_is_a_row_that_says_how_to_get_it(phantoms: data.DataSet) -> None:
    absent = Peer("elsewhere", "local", "raw", "no_such_package", PEERS[-1].make, (1,), install="pip install elsewhere")
    result = reads.bench_reads(available=[absent, PEERS[-1]], size=replace(SMALL, rounds=1), data=[phantoms])
    (line,) = [line for line in reads.format_reads(result).splitlines() if "elsewhere" in line]
    assert "no_such_package is not installed: pip install elsewhere" in line
    assert {row["peer"] for row in result["rows"]} == {PEERS[-1].name}


def test_only_the_states_that_mean_something_are_measured(phantoms: data.DataSet) -> None:
    names = ["monai CacheDataset", "memmap"]
    size, available = replace(SMALL, rounds=1), (*PEERS, *TORCH_PEERS)
    result = reads.bench_reads(peers=names, available=available, writers=WRITERS, size=size, data=[phantoms])
    states = {(row["peer"], row["state"], row["note"]) for row in result["rows"]}
    assert states == {("memmap", "cold", ""), ("memmap", "warm", ""), (names[0], "warm", "all in memory")}


@pytest.mark.parametrize("where", ["cache", "local"])
def test_warm_is_what_the_same_reader_has_read(where: str, phantoms: data.DataSet, tmp_path: Path) -> None:
    seen: list[tuple[str, data.Triple]] = []
    new = []  # crops that each pass met first

    class Slow:
        def read(self, wants: Sequence[tuple[str, data.Triple]]) -> list[np.ndarray]:
            new.extend(want not in seen for want in wants)
            seen.extend(wants)
            time.sleep(0.01 * len(wants))
            return [phantoms.cut(*want) for want in wants]

        def close(self) -> None: ...

    peer = Peer("slow", where, "raw", "numpy", lambda *_: Slow(), (1,))
    size = replace(SMALL, crops=20, cap_s=0.05)
    run = reads._Run(data.Layouts(phantoms, tmp_path / "layouts", None, WRITERS), size, tmp_path, lambda _: None)
    run._round(peer, 0, 0, None)
    cold, warm = run._rows.values()
    assert cold.crops < size.crops, "it was cut off"
    assert not any(new[len(new) - warm.crops :])
    assert sum(new) == (1 + size.crops if where == "cache" else 1 + cold.crops)


def test_a_local_run_measures_every_installed_reader(phantoms: data.DataSet) -> None:
    said: list[str] = []
    result = reads.bench_reads(peers=LOCAL, size=SMALL, data=[phantoms], progress=said.append)
    assert json.loads(json.dumps(result))["rows"]
    measured = {row["peer"] for row in result["rows"]}
    assert measured | set(result["skipped"]) == set(LOCAL)
    assert {"tomoscale, local", "memmap", "zarr, local"} <= measured
    for row in result["rows"]:
        assert row["crops"] >= SMALL.rounds
        assert len(row["rates"]) == SMALL.rounds
        assert row["crops_per_s"]["low"] <= row["crops_per_s"]["median"] <= row["crops_per_s"]["high"]
        assert row["state"] in ("cold", "warm")
    assert result["data"]["phantom CT"]["layout_bytes"]["raw"] >= 2 * 40 * 48 * 56 * 2
    text = reads.format_reads(result)
    assert all(name in text for name in measured)
    assert any("check memmap" in line for line in said)


def test_without_an_s3_store_its_readers_are_skipped_and_said(phantoms: data.DataSet) -> None:
    result = reads.bench_reads(peers=["tensorstore", "memmap"], size=replace(SMALL, rounds=1), data=[phantoms])
    assert result["skipped"] == {"tensorstore": "no s3:// URL was given"}
    assert "no s3:// URL was given" in reads.format_reads(result)


def test_a_reader_of_other_voxels_ends_the_run_before_anything_is_timed(phantoms: data.DataSet) -> None:
    class Wrong:
        def read(self, wants: Any) -> list[np.ndarray]:
            return [phantoms.cut(name, start) + np.int16(name == "ct-01") for name, start in wants]

        def close(self) -> None: ...

    def make(at: data.Layouts, in_flight: int, scratch: Path) -> Reader:
        return Wrong()

    wrong = Peer("wrong", "local", "raw", "numpy", make, (1,))
    timed: list[str] = []
    with pytest.raises(StoreError, match="wrong: crop"):
        reads.bench_reads(available=[wrong], size=SMALL, data=[phantoms], progress=timed.append)
    assert not any("round" in line for line in timed)


def test_an_unknown_peer_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="memmap"):
        reads.bench_reads(peers=["memmapp"])


def test_the_budget_ends_the_rounds(phantoms: data.DataSet) -> None:
    size = replace(SMALL, rounds=50, budget_s=0.0)
    result = reads.bench_reads(peers=["memmap"], size=size, data=[phantoms])
    assert {len(row["rates"]) for row in result["rows"]} == {1}


def test_ratios_compare_rounds_with_their_targets() -> None:
    def row(peer: str, rates: list[float], in_flight: int = 1, requests: tuple[float, ...] = ()) -> reads._Row:
        return reads._Row("x", "s3", 20, peer, in_flight, "cold", rates, [1.0], list(requests))

    def local(peer: str, rates: list[float]) -> reads._Row:
        return reads._Row("x", "local", 0, peer, 8, "warm", rates, [1.0], [])

    rows = [
        row("tomoscale", [30.0, 44.0], requests=(10, 14)),
        row("tomoscale", [50.0, 66.0], 8),
        row("zarr + s3fs", [1.0, 2.0], requests=(65, 66)),
        row("tensorstore", [60.0, 60.0], 8),
        local("tomoscale, local", [90.0, 60.0, 30.0]),
        local("tensorstore, local", [100.0, 50.0, 40.0]),
    ]
    found = {r["what"]: (round(r["value"]["median"], 3), r["target"], r["met"]) for r in reads.ratios(rows)}
    assert found == {
        "S3 +20 ms: ours 1 in flight / zarr + s3fs one at a time": (26.0, 20.0, "yes"),
        "S3 +20 ms: ours 8 in flight / zarr + s3fs one at a time": (41.5, 20.0, "yes"),
        "S3 +20 ms: ours / tensorstore, 8 in flight": (round((50 / 60 + 66 / 60) / 2, 3), 1.0, "no"),
        "local disk, warm: ours / tensorstore, 8 in flight": (0.9, 1.0, "no"),
        "S3 +20 ms: requests a crop, ours / zarr + s3fs": (round((10 / 65 + 14 / 66) / 2, 3), 0.2, "yes"),
    }


@pytest.mark.parametrize(
    ("crop", "shape"), [((96, 96, 96), (256, 320, 320)), ((24, 96, 96), (40, 256, 256)), ((96, 96, 96), (30, 500, 20))]
)
def test_b2nd_blocks_fill_the_caches_they_are_meant_for(crop: data.Triple, shape: data.Triple) -> None:
    block, chunk = data.b2nd_layout(crop, shape)
    assert np.prod(block) * 2 <= 0.8 * 32768
    assert np.prod(block) * 2 > 0.8 * 32768 / 4 or block == shape
    assert np.prod(chunk) * 2 <= 0.8 * 1_441_792
    assert all(b <= c <= n for b, c, n in zip(block, chunk, shape, strict=True))


def test_a_table_shows_spreads_and_gaps() -> None:
    rows = [{"a": {"median": 1.234, "low": 0.5, "high": 123.4}, "b": None}, {"a": 7, "b": "x"}]
    lines = measure.table(rows, {"a": "first", "b": "second"}).splitlines()
    assert lines[0].split("|")[1].strip() == "first"
    assert "1.23 [0.5, 123]" in lines[2]
    assert lines[2].split("|")[2].strip() == "-"
    assert len({len(line) for line in lines}) == 1


def test_the_loader_run_reports_wait_throughput_and_memory(phantoms: data.DataSet) -> None:
    size = loader.Size(2, (40, 48, 56), 4, 4, 80, (0,), (10, 3000), step_s=0.02)
    before = threading.active_count()
    result = loader.bench_loader(size=size, data=phantoms)
    assert threading.active_count() <= before  # one of another test may end meanwhile
    assert [(r["where"], r["crops_per_visit"]) for r in result["rows"]] == [("local", 4), ("local", 1)]
    for row in result["rows"]:
        assert 0 <= row["wait_percent"] <= 100
        assert row["crops_per_s"] > 0
    assert [row["crops"] for row in result["memory"]] == [*range(0, 80, 8), 80]
    assert [row["what"].partition(",")[0] for row in result["targets"]][:2] == ["data wait", "data wait"]
    assert len(result["targets"]) == 6
    assert [row["volumes"] for row in result["manifests"]] == [10, 3000]
    text = loader.format_loader(result)
    assert "data wait %" in text
    assert json.loads(json.dumps(result))["name"] == "loader"


def test_a_loader_run_out_of_time_says_what_it_left_out(phantoms: data.DataSet) -> None:
    size = loader.Size(2, (40, 48, 56), 2, 2, 800, (0,), (10,), step_s=0.01, budget_s=0)
    result = loader.bench_loader(size=size, data=phantoms)
    assert [(r["where"], r["crops_per_visit"]) for r in result["rows"]] == []
    assert result["skipped"] == ["local +0 ms, 4 crops a visit", "local +0 ms, 1 crops a visit"]
    assert result["memory"][-1]["crops"] < 800
    assert "without local +0 ms, 4 crops a visit" in loader.format_loader(result)


def test_the_slope_of_memory_leaves_the_filling_of_buffers_out() -> None:
    rows = [{"crops": crops, "rss_mib": 100 + 300 * (crops > 0) + 0.002 * crops} for crops in range(0, 4001, 200)]
    assert loader.slope_mib(rows) == pytest.approx(2.0)


def test_real_volumes_are_read_canonical(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nibabel: Any = pytest.importorskip("nibabel")
    folder = tmp_path / "chaos_t2" / "images"
    folder.mkdir(parents=True)
    ras = np.arange(100 * 110 * 26, dtype=np.int16).reshape(100, 110, 26)
    affine = np.diag([-1.0, 1.0, 2.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(ras[::-1].copy(), affine), folder / "case.nii.gz")
    monkeypatch.setenv("TOMOSCALE_DATASETS", str(tmp_path))
    (found,) = data.real(3)
    assert np.array_equal(found.volumes["case"], ras.transpose(2, 1, 0))
    monkeypatch.delenv("TOMOSCALE_DATASETS")
    assert data.real(3) == []


@pytest.mark.service
def test_an_s3_run_counts_requests_and_leaves_nothing_behind(
    phantoms: data.DataSet, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    from storage.objects import open_store
    from tests.kit.s3server import S3Server

    server = S3Server()
    request.addfinalizer(server.remove)
    server.start()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    names = ["tomoscale", "zarr + s3fs", "tensorstore", "tomoscale, node cache", "memmap"]
    size = replace(SMALL, delays_ms=(0, 5), rounds=1)
    result = reads.bench_reads(peers=names, s3_url=f"s3://{server.bucket}/b", size=size, data=[phantoms])
    assert {row["peer"] for row in result["rows"]} | set(result["skipped"]) == set(names)
    for row in result["rows"]:
        assert (row["requests"] is not None) == (row["where"] == "s3" and row["delay_ms"] == 5)
    assert {r["met"] for r in result["ratios"]} <= {"yes", "no"}
    assert any("+5 ms: requests a crop" in r["what"] for r in result["ratios"])
    assert list(open_store(f"s3://{server.bucket}/b").list()) == []
