"""The loop of one rank: a resumed run is the undisturbed run; another configuration or other data is refused."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.configs import PretrainConfig, ProbeConfig
from jobs.configs.groups import BackboneConfig, ClusterConfig
from jobs.pinning import identity
from jobs.pretrain import label_probe, loop
from jobs.pretrain.inputs import open_manifest
from jobs.pretrain.label_probe import LabelProbe, read_labelled
from jobs.pretrain.loop import Hooks, Take, build_engine, run
from jobs.tracking import bundles as bundling
from jobs.tracking.bundles import EncoderBundle
from jobs.tracking.runs import Point
from ssl_core.config import parse
from ssl_core.methods.base import method_class
from ssl_core.monitor.collapse import CollapseWarning
from ssl_core.networks import build
from ssl_core.networks.weights import WeightsError, encoder_state
from ssl_core.testing.views import synthetic_views
from ssl_core.train import checkpoint
from ssl_core.views.intensity import IntensityPolicy
from ssl_core.views.types import ViewSpec
from storage.errors import ConfigError
from storage.format.manifest import Manifest
from storage.reading.volume_store import VolumeStore
from tests.kit.phantoms import write_phantoms
from tests.kit.pretraining import CPU, config, train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = f"file://{tmp_path_factory.mktemp('store')}"
    write_phantoms(url, 8)
    return url


def views_of(job: PretrainConfig) -> ViewSpec:
    spec: ViewSpec = method_class(job.method_name).view_spec(job.method_config)
    return spec


@pytest.mark.parametrize("method", ["pgl", "simclr"])
def test_a_resumed_run_is_bitwise_the_undisturbed_run(data: str, method: str, tmp_path: Path) -> None:
    job = config(data, method)
    whole, points = train(job, tmp_path / "whole")
    resumed, later = train(job, tmp_path / "resumed", tmp_path / "whole" / "step-4")
    assert resumed["samples"] == whole["samples"]
    state, meta = checkpoint.load(tmp_path / "whole" / "step-9")
    again, meta_again = checkpoint.load(tmp_path / "resumed" / "step-9")
    for name, tensor in state["method"].items():
        assert torch.equal(tensor, again["method"][name]), name
    for name, entry in state["optimizer"].items():
        for key, value in entry.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(again["optimizer"][name][key])), (name, key)
    losses = {p.step: p.metrics["loss"] for p in points}
    assert [p.step for p in points] == [1, 2, 4, 6, 8, 9]
    assert {p.step: p.metrics["loss"] for p in later} == {s: v for s, v in losses.items() if s > 4}
    journal = [(p[0], p[2]["loss"]) for p in meta_again["journal"]]
    assert journal == [(p[0], p[2]["loss"]) for p in meta["journal"]] == sorted(losses.items())


def test_a_resume_with_other_settings_or_other_data_is_refused(data: str, tmp_path: Path) -> None:
    job = config(data, "simclr")
    train(job, tmp_path / "a")
    kept = tmp_path / "a" / "step-4"
    with pytest.raises(ConfigError) as caught:
        train(config(data, "simclr", lr=3e-4, log_every=3), tmp_path / "b", kept)
    assert caught.value.found == f"engine.lr=0.0003 (was {job.engine.lr})", "how often to log is free"
    assert "another name" in caught.value.remedy
    other = f"file://{tmp_path / 'other'}"
    write_phantoms(other, 8, seed=1)
    with pytest.raises(ConfigError) as caught:
        train(config(other, "simclr"), tmp_path / "b", kept)
    assert f"data={other} (was {data}), manifest " in caught.value.found
    train(config(other, "simclr"), tmp_path / "c")
    first = Manifest.open(other).fingerprint
    write_phantoms(other, 9, seed=1)
    with pytest.raises(ConfigError, match=rf"; found manifest \w+ \(was {first}\); .*; fingerprint={first} goes on"):
        train(config(other, "simclr"), tmp_path / "b", tmp_path / "c" / "step-4")


def test_where_and_how_often_are_not_part_of_the_identity(data: str) -> None:
    job = config(data, "simclr")
    manifest = open_manifest(job)
    moved = job.model_copy(
        update={"name": "x", "runs": "s3://elsewhere", "engine": job.engine.model_copy(update={"log_every": 7})}
    )
    assert identity(moved, manifest) == identity(job, manifest)
    reseeded = job.model_copy(update={"engine": job.engine.model_copy(update={"seed": 5})})
    assert identity(reseeded, manifest) != identity(job, manifest)


def test_an_empty_split_is_named(data: str) -> None:
    job = config(data, "simclr")
    wrong = job.model_copy(update={"stream": job.stream.model_copy(update={"split": "nope"})})
    with pytest.raises(ConfigError, match="nope"):
        open_manifest(wrong)


WATCHED = {"steps": 4, "warmup_steps": 1, "probe_every": 2, "checkpoint_every": 4}


@pytest.mark.parametrize("method", ["simclr", "byol"])
def test_watching_labels_changes_neither_samples_nor_weights(data: str, method: str, tmp_path: Path) -> None:
    job = config(data, method, **WATCHED)
    blind = job.model_copy(update={"probe": ProbeConfig(label=None)})
    seen, points = train(job, tmp_path / "seen")
    unseen, other = train(blind, tmp_path / "unseen")
    dice = {p.step: p.metrics["probe/knn_dice"] for p in points if "probe/knn_dice" in p.metrics}
    assert 2 in dice
    assert all(0.0 <= value <= 1.0 for value in dice.values())
    assert not any("probe/knn_dice" in p.metrics for p in other)
    assert seen["samples"] == unseen["samples"]
    one, two = (checkpoint.load(tmp_path / name / "step-4")[0] for name in ("seen", "unseen"))
    for part in ("method", "optimizer"):
        assert list(one[part]) == list(two[part])
    for name, tensor in one["method"].items():
        assert torch.equal(tensor, two["method"][name]), name
    for name, entry in one["optimizer"].items():
        for key, value in entry.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(two["optimizer"][name][key])), (name, key)


def test_known_and_asked_crops_are_of_different_subjects_of_the_runs_split(data: str) -> None:
    job = config(data, "simclr")
    with VolumeStore(data, open_manifest(job)) as store:
        found = read_labelled(job, store, (16, 32, 16), build_engine(job, CPU))
        again = read_labelled(job, store, (16, 32, 16), build_engine(job, CPU))
        missing = job.model_copy(update={"probe": ProbeConfig(label="nothing")})
        assert read_labelled(missing, store, (16, 32, 16), build_engine(job, CPU)) is None
    assert found is not None
    assert again is not None
    assert found.image_BCDHW.shape == (6, 1, 16, 32, 16)  # of 8 phantoms every fourth is a test subject's
    assert found.bank_crops == 3
    assert torch.equal(found.image_BCDHW, again.image_BCDHW)
    assert len(found.image_BCDHW.flatten(1).unique(dim=0)) == 6
    assert all(bool(label.any()) for label in found.label_BDHW)  # each crop is centred on the structure


def test_label_transfer_keeps_to_its_share_of_the_time(data: str) -> None:
    job = config(data, "simclr", probe_every=1, steps=40)
    engine, now = build_engine(job, CPU), [0.0]

    def clock() -> float:
        now[0] += 1.0  # what is timed takes a second
        return now[0]

    with VolumeStore(data, open_manifest(job)) as store:
        watch = LabelProbe(job, store, views_of(job), print, clock)
        views = synthetic_views(views_of(job), [0, 1])
        turns = []
        for step in range(1, 41):
            engine.step_done = step
            now[0] += 4.0
            turns.append("probe/knn_dice" in watch(engine, views))
    assert turns[0]
    assert sum(turns) == 4  # 1 s at first, then 2 % of about 200 s


def test_labels_that_cannot_be_read_are_named_and_the_run_goes_on(tmp_path: Path) -> None:
    url = f"file://{tmp_path / 'store'}"
    write_phantoms(url, 8)
    for folder in (tmp_path / "store").glob("volumes/*/labels/labels/0/c"):
        shutil.rmtree(folder)
    said: list[str] = []
    job = config(url, "simclr", **WATCHED)
    result = run(job, Hooks(publish=lambda *_: None, say=said.append), restore=None, device=CPU)
    assert result["steps"] == 4
    assert "probe/knn_dice" not in result
    assert len([line for line in said if line.startswith("labels are not watched: ") and "phantom-" in line]) == 1


def test_a_measure_that_is_not_a_number_ends_neither_run_nor_registration(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As where the few places looked at miss a small structure.
    monkeypatch.setattr(label_probe, "knn_dice", lambda *_, **__: math.nan)
    job = config(data, "simclr", **WATCHED)
    train(job, tmp_path)
    meta = checkpoint.read_meta(tmp_path / "step-4")
    points = [Point.from_json(item) for item in meta["journal"]]
    assert any(math.isnan(p.metrics.get("probe/knn_dice", 0.0)) for p in points)
    result, later = train(job, tmp_path / "again", tmp_path / "step-4")
    assert (result["steps"], later) == (4, [])
    bundle = bundling.write_encoder(job, tmp_path / "step-4", tmp_path / "bundle", run_id="r")
    assert "nan" not in (bundle / "MODEL_CARD.md").read_text().lower().split()


def test_a_probe_between_the_probes_is_refused(data: str) -> None:
    plan = config(data, "simclr", probe_every=20).model_dump()
    with pytest.raises(ConfigError, match="multiple of engine.probe_every"):
        parse(PretrainConfig, plan | {"probe": {"every": 30}})


def test_how_labels_are_watched_is_not_part_of_the_identity(data: str) -> None:
    job = config(data, "simclr")
    other = job.model_copy(update={"probe": ProbeConfig(train=2, label=None)})
    assert identity(other, open_manifest(job)) == identity(job, open_manifest(job))


def test_a_collapse_is_named_in_the_log_and_in_the_metrics(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    points: list[Point] = []
    job = config(data, "simclr", steps=4, warmup_steps=1, probe_every=2, weight_decay=0.0, lr=1e-9)
    real = loop.build_engine

    def dead(*arguments: Any, **named: Any) -> Any:
        engine = real(*arguments, **named)
        with torch.no_grad():
            for parameter in engine.method.encoder().net.down_4.parameters():
                parameter.zero_()
            list(engine.method.encoder().net.down_4.parameters())[-1].fill_(1.0)
        return engine

    hooks = Hooks(publish=lambda *_: None, on_point=points.append, say=said.append)
    monkeypatch.setattr(loop, "build_engine", dead)
    with pytest.warns(CollapseWarning, match="features have collapsed"):
        run(job, hooks, restore=None, device=CPU)
    assert {p.step: p.metrics.get("probe/collapsed") for p in points}[2] == 1.0
    assert any(line.startswith("step 2: COLLAPSE WARNING, feature_std ") for line in said)


def test_checkpoints_carry_only_points_that_are_nowhere_else(data: str) -> None:
    """Those that MLflow has taken would be in each of them again; the last one tells what the encoder's metrics are."""
    job, journals = config(data, "simclr"), []

    def keep(_step: int, take: Take | None, _metrics: dict[str, float]) -> None:
        assert take is not None
        journals.append([item[0] for item in take().meta["journal"]])

    run(job, Hooks(publish=keep, is_recorded=lambda step: step in (1, 4, 8, 9)), restore=None, device=CPU)
    assert journals == [[2, 4], [2, 6, 8], [2, 6, 9]]


def encoder_of(name: str, **arguments: Any) -> EncoderBundle:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        backbone = build(name, **arguments)
    return EncoderBundle(name, arguments, encoder_state(backbone), IntensityPolicy(), {})


def test_a_run_starts_from_an_encoder_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    job = config("memory://x", "byol").model_copy(update={"init": "models:/e@champion"})
    encoder = encoder_of("basic_unet", **job.backbone.arguments)
    method = build_engine(job, CPU, encoder).method
    plain = build_engine(job, CPU).method.state_dict()
    for part in ("backbone", "target_backbone"):
        for name, tensor in encoder.weights.items():
            assert torch.equal(method.state_dict()[f"{part}.net.{name}"], tensor), (part, name)
    fresh = [name for name in plain if not any(name.endswith(f".net.{key}") for key in encoder.weights)]
    assert fresh
    assert all(torch.equal(method.state_dict()[name], plain[name]) for name in fresh), "heads are the seed's"
    with pytest.raises(WeightsError, match="conv_0.conv_0.conv.weight .* wanted"):
        build_engine(job, CPU, encoder_of("basic_unet", features=(8, 8, 8, 8, 16, 8)))
    with pytest.raises(ConfigError, match="models:/e@champion; expected an encoder of backbone.name basic_unet"):
        build_engine(job, CPU, encoder_of("unet", channels=(4, 8, 8), strides=(2, 2)))


def test_a_worker_holds_no_more_at_once_when_workers_become_fewer(data: str, tmp_path: Path) -> None:
    """Of two workers with two samples each, one is left: it has four, two at a time, and says so."""
    job = config(data, "simclr", steps=2, warmup_steps=1, checkpoint_every=2)
    alone, _ = train(job, tmp_path / "fixed")
    elastic = job.model_copy(update={"cluster": ClusterConfig(min_workers=1)})
    assert (job.micro_batch, elastic.micro_batch, build_engine(elastic, CPU).config.micro_batch) == (None, 2, 2)
    normed = {"features": [4, 4, 8, 8, 16, 4], "norm": "batch"}
    wide = elastic.model_copy(update={"backbone": BackboneConfig(arguments=normed)})
    assert build_engine(wide, CPU).config.micro_batch is None
    lines: list[str] = []
    result = run(elastic, Hooks(publish=lambda *_: None, say=lines.append), restore=None, device=CPU)
    assert lines[0] == (
        "1 of at most 2 workers: 4 samples a step and 4 a contrast, as with any number, 2 at once in the network of a"
        " worker"
    )
    assert result["samples"] == alone["samples"]
    assert result["loss"] == pytest.approx(alone["loss"], rel=1e-4)
