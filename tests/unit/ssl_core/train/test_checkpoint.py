"""A checkpoint is whole or not there, and nothing damaged is ever read as if it were sound."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ssl_core.train import checkpoint
from ssl_core.train.checkpoint import Buffers, Snapshot
from storage.errors import ConfigError, CorruptChunk, NotFound, StoreError


def state(seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    tied = torch.randn(3, generator=g)
    return {
        "method": {
            "w": torch.randn(2, 3, 4, generator=g).transpose(0, 2),
            "half": torch.randn(5, generator=g).bfloat16(),
            "count": torch.tensor(7),
            "flag": torch.tensor(True),
            "none": torch.zeros(0, 3),
            "tied.a": tied,
            "tied.b": tied,
            "slice": torch.arange(10.0)[2:5],
            "odd": torch.tensor([math.nan, math.inf, -0.0, 5e-324], dtype=torch.float64),
        },
        "optimizer": {"w": {"exp_avg": torch.randn(4, generator=g), "step": torch.tensor(3.0)}},
        "engine": {"step": 3, "lr": 0.1 + 0.2, "bad": math.nan, "name": "ü", "list": [1, None, True, [2.5]]},
    }


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert bits(a) == bits(b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert type(a) is type(b)
        assert repr(a) == repr(b)


def test_round_trip_is_bitwise(tmp_path: Path) -> None:
    meta = {"step": 3, "stream": {"seed": 1, "next": 24}, "fingerprint": "abc"}
    assert checkpoint.save(tmp_path / "c", state(), meta) == tmp_path / "c"
    loaded, facts = checkpoint.load(tmp_path / "c")
    assert_same(state(), loaded)
    assert facts == meta
    assert checkpoint.read_meta(tmp_path / "c") == meta
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_holds_no_pickle(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", state(), {})
    names = sorted(p.name for p in (tmp_path / "c").iterdir())
    assert names == ["manifest.json", "method.safetensors", "optimizer.safetensors", "state.json"]


def test_saved_tensors_do_not_follow_the_live_ones(tmp_path: Path) -> None:
    live = {"method": {"w": torch.ones(4)}}
    checkpoint.save(tmp_path / "c", live, {})
    live["method"]["w"].zero_()
    assert checkpoint.load(tmp_path / "c")[0]["method"]["w"].tolist() == [1.0] * 4


def test_snapshots_one_after_another_share_their_memory_and_follow_no_live_tensor() -> None:
    live = {"method": {"w": torch.zeros(3), "b": [torch.zeros(2)]}, "optimizer": {"w": torch.zeros(3)}}
    buffers = Buffers()
    first = Snapshot.of(live, {"step": 1}, buffers)
    place = first.state["method"]["w"].data_ptr()
    live["method"]["w"] += 1
    live["method"]["b"] = [torch.ones(4)]
    assert first.state["method"]["w"].tolist() == [0, 0, 0]
    second = Snapshot.of(live, {"step": 2}, buffers)
    assert second.state["method"]["w"].data_ptr() == place
    assert second.state["method"]["w"].tolist() == [1, 1, 1]
    assert second.state["method"]["b"][0].tolist() == [1, 1, 1, 1]
    assert second.state["optimizer"]["w"].tolist() == [0, 0, 0]
    alone = Snapshot.of(live, {})
    assert alone.state["method"]["w"].data_ptr() != place


def test_replaces_only_by_a_complete_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path / "c", state(0), {"n": 0})
    checkpoint.save(tmp_path / "c", state(1), {"n": 1})
    assert checkpoint.read_meta(tmp_path / "c") == {"n": 1}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(StoreError, match=r"No space left.*previous checkpoint is untouched"):
        checkpoint.save(tmp_path / "c", state(2), {"n": 2})
    monkeypatch.undo()
    loaded, meta = checkpoint.load(tmp_path / "c")
    assert meta == {"n": 1}
    assert_same(state(1), loaded)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("which", [0, 1])
def test_a_crash_at_either_rename_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: int) -> None:
    checkpoint.save(tmp_path / "c", state(0), {"n": 0})
    rename, calls = Path.rename, []

    def dies(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == which + 1:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", dies)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path / "c", state(1), {"n": 1})
    monkeypatch.undo()
    loaded, meta = checkpoint.load(tmp_path / "c")
    assert meta == {"n": 0}
    assert_same(state(0), loaded)
    checkpoint.save(tmp_path / "c", state(2), {"n": 2})
    assert checkpoint.read_meta(tmp_path / "c") == {"n": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_what_a_killed_writer_left_goes_with_the_next_save(tmp_path: Path) -> None:
    (tmp_path / ".c.tmp-0123").mkdir()
    (tmp_path / ".c.tmp-0123" / "state.json").write_text("{")
    (tmp_path / ".other.tmp-0123").mkdir()
    checkpoint.save(tmp_path / "c", state(), {})
    assert sorted(p.name for p in tmp_path.iterdir()) == [".other.tmp-0123", "c"]


def test_an_unfinished_write_is_not_a_checkpoint(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", state(), {})
    (tmp_path / "c" / "manifest.json").unlink()
    with pytest.raises(NotFound, match=r"manifest\.json"):
        checkpoint.load(tmp_path / "c")


@pytest.mark.parametrize("name", ["method.safetensors", "optimizer.safetensors", "state.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    checkpoint.save(tmp_path / "c", state(), {})
    (tmp_path / "c" / name).unlink()
    with pytest.raises(NotFound, match=f"{name}.*no file.*earlier checkpoint"):
        checkpoint.load(tmp_path / "c")


@pytest.mark.parametrize("name", ["method.safetensors", "optimizer.safetensors", "state.json"])
def test_a_truncated_file_is_named(tmp_path: Path, name: str) -> None:
    file = checkpoint.save(tmp_path / "c", state(), {}) / name
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CorruptChunk, match=rf"{name}; expected \d+ bytes; found \d+ bytes"):
        checkpoint.load(tmp_path / "c")


@pytest.mark.parametrize("name", ["method.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_any_flipped_bit_is_found(tmp_path: Path, name: str) -> None:
    file = checkpoint.save(tmp_path / "c", state(), {"step": 3}) / name
    whole = file.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 23)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 7)
        file.write_bytes(damaged)
        try:
            loaded, meta = checkpoint.load(tmp_path / "c")
        except StoreError:
            continue
        else:
            # White space in JSON may change without a change of meaning; nothing else may.
            assert name == "manifest.json"
            assert meta == {"step": 3}
            assert_same(state(), loaded)


def test_a_newer_version_says_what_to_do(tmp_path: Path) -> None:
    file = checkpoint.save(tmp_path / "c", state(), {}) / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["version"] = checkpoint.VERSION + 1
    file.write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match=r"version 2; update tomoscale"):
        checkpoint.load(tmp_path / "c")


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="nowhere"):
        checkpoint.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("wrong", "thing"),
    [({"a": {"b": object()}}, "a/b"), ({"a": {1: 2}}, "a/"), ({"a/b": 1}, "a/b"), ({"$x": 1}, "x")],
)
def test_refuses_what_has_no_place(tmp_path: Path, wrong: dict[str, Any], thing: str) -> None:
    with pytest.raises(ConfigError, match=thing):
        checkpoint.save(tmp_path / "c", wrong, {})
    assert not list(tmp_path.iterdir())


def test_refuses_meta_that_is_not_json(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="JSON"):
        checkpoint.save(tmp_path / "c", state(), {"x": object()})


def test_another_run_is_refused_unless_told() -> None:
    meta = {"config_digest": "aa", "fingerprint": "f0"}
    assert checkpoint.require_same(meta, config_digest="aa", fingerprint="f0") == []
    with pytest.raises(ConfigError, match=r"fingerprint.*'f1', as in this run.*'f0'"):
        checkpoint.require_same(meta, config_digest="aa", fingerprint="f1")
    lines = checkpoint.require_same(meta, allow=True, config_digest="bb", fingerprint="f1")
    assert len(lines) == 2
