"""LRC and supervised pre-training from a store: super-pixels are made once, read along, carried through the views."""

import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs.cli import main as cli
from jobs.configs import PretrainConfig
from jobs.pinning import as_started, identity, note_start
from jobs.pretrain.inputs import open_manifest, stream_spec
from jobs.pretrain.loop import Hooks, Take, run
from jobs.superpixels import compute, ensure_superpixels
from ssl_core.config import parse
from ssl_core.methods.base import method_class
from ssl_core.superpixels.settings import Superpixels
from ssl_core.train import checkpoint
from ssl_core.views.make import make_views
from storage.errors import ConfigError
from storage.format.manifest import Manifest
from storage.ingest import derived_maps as derive
from storage.objects import open_store
from storage.reading.volume_store import VolumeStore
from storage.stream.crop_stream import CropStream
from tests.kit.phantoms import write_phantoms

SETTINGS = {"mode": "volume", "scale": 50.0, "background": 0.0}
NAME = Superpixels.model_validate(SETTINGS).name
NARROW: dict[str, dict[str, Any]] = {
    "simclr": {"hidden": 16, "out": 8},
    "byol": {"hidden": 16, "out": 8},
    "mocov2": {"hidden": 16, "out": 8, "queue": 16},
    "supervised": {"label": "labels"},
}


def config(data: str, base: str = "simclr", **more: Any) -> PretrainConfig:
    method = {
        "name": "lrc",
        "base": base,
        "base_settings": NARROW[base],
        "superpixels": SETTINGS,
        "crops": {"size_DHW": [16, 32, 16], "min_overlap": 0.3},
        "hidden": 8,
        "out": 8,
        "pixels": 8,
    }
    small = {
        "name": "t",
        "data": data,
        "method": method,
        "backbone": {"name": "basic_unet", "arguments": {"features": [4, 4, 8, 8, 16, 4]}},
        "stream": {"global_batch": 4, "lanes": 8},
        "engine": {"steps": 4, "warmup_steps": 1, "log_every": 1, "checkpoint_every": 2, "probe_every": 0},
        "probe": {"label": None},
    }
    return parse(PretrainConfig, small | more)


def train(
    job: PretrainConfig, folder: Path, restore: Path | None = None, cache_dir: Path | None = None
) -> list[dict[str, float]]:
    points: list[dict[str, float]] = []

    def keep(step: int, take: Take | None, _metrics: dict[str, float]) -> None:
        assert take is not None
        take().save(folder / f"step-{step}")

    hooks = Hooks(publish=keep, on_point=lambda p: points.append(p.metrics))
    run(job, hooks, restore=restore, device=torch.device("cpu"), cache_dir=cache_dir)
    return points


@pytest.fixture
def data() -> str:
    url = f"memory://{uuid.uuid4().hex}"
    write_phantoms(url, 6)
    return url


@pytest.fixture(scope="module")
def ready() -> Iterator[str]:
    url = f"memory://{uuid.uuid4().hex}"
    write_phantoms(url, 6)
    compute(url, Superpixels.model_validate(SETTINGS), say=lambda _line: None)
    return url


def test_a_store_without_them_is_named_with_the_command_that_makes_them(data: str, tmp_path: Path) -> None:
    fingerprint = Manifest.open(data).fingerprint
    with pytest.raises(ConfigError) as caught:
        train(config(data), tmp_path)
    message = str(caught.value)
    command = f"tomoscale data superpixels {data} mode=volume scale=50.0 background=0.0"
    assert all(part in message for part in (data, NAME, fingerprint, command, "5 volumes of split 'train'"))
    arguments = cli.parser().parse_args(command.split()[1:])
    assert arguments.data == data
    assert parse(Superpixels, dict(item.split("=") for item in arguments.settings)).name == NAME
    with pytest.raises(ConfigError, match="leave `fingerprint` empty"):
        open_manifest(config(data, fingerprint=fingerprint))


def test_the_job_makes_them_once(data: str) -> None:
    said: list[str] = []
    ensure_superpixels(config(data), say=said.append)
    assert NAME in said[0]
    assert "6 computed" in said[1]
    fingerprint = Manifest.open(data).fingerprint
    ensure_superpixels(config(data), say=said.append)
    assert len(said) == 2
    assert open_manifest(config(data)).fingerprint == fingerprint


def test_the_job_leaves_a_pinned_manifest_alone(data: str) -> None:
    pinned = Manifest.open(data).fingerprint
    ensure_superpixels(config(data, fingerprint=pinned), say=pytest.fail)
    assert Manifest.open(data).fingerprint == pinned


def test_a_job_goes_on_with_its_own_manifest_when_another_has_added_super_pixels(data: str) -> None:
    runs = f"memory://{uuid.uuid4().hex}"
    plain = {"name": "simclr", "crops": {"size_DHW": [16, 16, 16]}}
    job = config(data, method=plain, runs=runs)
    assert as_started(job) == job
    started = open_manifest(job)
    note_start(job, started)
    ensure_superpixels(config(data), say=lambda _line: None)
    assert Manifest.open(data).fingerprint != started.fingerprint
    again = as_started(job)
    assert again.fingerprint == started.fingerprint
    assert identity(again, open_manifest(again)) == identity(job, started)
    # Where it is said which manifest, or under other settings, nothing is filled in.
    latest = Manifest.open(data).fingerprint
    assert as_started(config(data, method=plain, runs=runs, fingerprint=latest)).fingerprint == latest
    wrong = config(data, runs=runs)
    assert as_started(wrong).fingerprint is None
    # A start with wrong settings under this name, which the checkpoint refuses, changes nothing for the right ones.
    note_start(wrong, Manifest.open(data))
    note_start(job, Manifest.open(data))
    assert as_started(job).fingerprint == started.fingerprint


def test_methods_without_super_pixels_ask_for_none(data: str) -> None:
    job = config(data, method={"name": "simclr", "crops": {"size_DHW": [16, 16, 16]}})
    ensure_superpixels(job, say=pytest.fail)
    assert stream_spec(job).maps == ()


@pytest.mark.parametrize("base", sorted(NARROW))
def test_lrc_trains_on_them_with_any_base(ready: str, base: str, tmp_path: Path) -> None:
    points = train(config(ready, base), tmp_path)
    assert [p["loss/region"] > 0 for p in points] == [True] * 4
    assert all(np.isfinite(p["loss"]) for p in points)
    assert all(p["monitor/regions"] >= 2 for p in points), points[0]


def test_a_resumed_run_is_bitwise_the_undisturbed_run(ready: str, tmp_path: Path) -> None:
    whole = train(config(ready, "mocov2"), tmp_path / "whole")
    again = train(config(ready, "mocov2"), tmp_path / "again", tmp_path / "whole" / "step-2")
    assert [p["loss"] for p in again] == [p["loss"] for p in whole][2:]
    states = [checkpoint.load(tmp_path / kind / "step-4")[0]["method"] for kind in ("whole", "again")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_node_cache_changes_nothing(ready: str, tmp_path: Path) -> None:
    plain = train(config(ready), tmp_path / "plain")
    cached = config(ready, stream={"global_batch": 4, "lanes": 8, "cache_gib": 0.1})
    for _ in range(2):  # filled, then read
        points = train(cached, tmp_path / "cached", cache_dir=tmp_path / "cache")
        assert [p["loss"] for p in points] == [p["loss"] for p in plain]
    assert any((tmp_path / "cache").rglob("*"))


def test_a_composition_reads_the_maps_of_all_its_parts(ready: str, tmp_path: Path) -> None:
    lrc = {"name": "lrc", "settings": {k: v for k, v in config(ready).method.items() if k not in ("name", "crops")}}
    parts = [{"name": "supervised", "weight": 0.5, "settings": {"label": "labels"}}, lrc]
    crops = {"size_DHW": [16, 32, 16], "min_overlap": 0.3}
    job = config(ready, method={"name": "compose", "crops": crops, "parts": parts})
    assert stream_spec(job).maps == ("labels", NAME)
    points = train(job, tmp_path)
    assert all(p["loss/supervised/segmentation"] > 0 and p["loss/lrc/region"] > 0 for p in points)
    url = f"memory://{uuid.uuid4().hex}"
    write_phantoms(url, 4)
    with pytest.raises(ConfigError, match=NAME):
        open_manifest(config(url, method=job.method))


def by_value(stored_CDHW: Any, _record: Any) -> Any:
    return stored_CDHW[0].astype(np.int32) + np.int32(1000)


def test_views_carry_the_map_of_the_voxels_that_they_show(data: str) -> None:
    """A map that is the image itself: whatever way it goes, it must come out as the image does."""
    crops = {"size_DHW": [12, 14, 16], "min_overlap": 0.3, "flip": [0.5, 0.5, 0.5], "intensity": "none"}
    whole = config(data, "simclr").method | {"crops": crops}
    job = config(data, method=whole, intensity={"kind": "none"})
    derive.run(data, NAME, by_value, recipe="by value")
    views = method_class("lrc").view_spec(job.method_config)
    with VolumeStore(data, open_manifest(job)) as store, CropStream(store, stream_spec(job)) as stream:
        batch = next(stream)
    made = make_views(batch, views, seed=0, policy=job.intensity)
    for view in made.roles["global"]:
        inside = view.valid_B1DHW[:, 0] > 0
        assert inside.float().mean() > 0.5
        shown = view.image_BCDHW[:, 0].round().long() + 1000
        assert torch.equal(view.maps[NAME][inside], shown[inside])


def test_supervised_learns_from_the_labelled_volumes_alone(tmp_path: Path) -> None:
    url = f"memory://{uuid.uuid4().hex}"
    manifest = write_phantoms(url, 8)
    some = [replace(r, labels=() if i in (0, 2, 4) else r.labels) for i, r in enumerate(manifest.records())]
    Manifest.from_records(some).write(open_store(url))
    crops = {"size_DHW": [16, 32, 16], "intensity": "none"}
    engine = {"steps": 40, "warmup_steps": 2, "lr": 0.01, "log_every": 1, "checkpoint_every": 40, "probe_every": 0}
    job = config(url, method={"name": "supervised", "label": "labels", "crops": crops}, engine=engine)
    with VolumeStore(url) as store, CropStream(store, stream_spec(job)) as stream:
        assert stream.indices.tolist() == [1, 5, 6]  # every fourth is in the test split
    points = train(job, tmp_path)
    first, last = (np.mean([p["loss/segmentation"] for p in part]) for part in (points[:5], points[-5:]))
    assert last < 0.7 * first
    with pytest.raises(ConfigError, match="with 'nothing'"):
        train(config(url, method={"name": "supervised", "label": "nothing", "crops": crops}), tmp_path)


def test_volumes_without_the_label_need_no_super_pixels(data: str) -> None:
    """Nobody reads them, so their lack stops no job."""
    compute(data, Superpixels.model_validate(SETTINGS), say=lambda _line: None)
    records = list(Manifest.open(data).records())
    records[0] = replace(records[0], labels=(), derived=())
    Manifest.from_records(records).write(open_store(data))
    assert len(open_manifest(config(data, "supervised"))) == 6
    with pytest.raises(ConfigError, match="1 without it"):
        open_manifest(config(data, "simclr"))


def test_the_verb_makes_them_shows_them_and_verifies_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = (tmp_path / "store").as_uri()
    write_phantoms(url, 3)
    state = ["--state", str(tmp_path / "state")]
    assert cli.main(["data", "superpixels", url, "mode=volume", "scale=50", "background=0", "--local", *state]) == 0
    assert f"{NAME} beside the images of {url}" in capsys.readouterr().out
    assert cli.main(["data", "show", url, *state]) == 0
    assert f"{NAME} in 3 volumes" in capsys.readouterr().out
    assert cli.main(["data", "verify", url, *state]) == 0
    assert "0 problems" in capsys.readouterr().out
    assert cli.main(["data", "superpixels", url, "scal=50", "--local", *state]) == 2
    assert "did you mean 'scale'" in capsys.readouterr().err
    assert cli.main(["data", "superpixels", (tmp_path / "none").as_uri(), "--local", *state]) == 1
    assert "a published data set" in capsys.readouterr().err
