"""A study that is proposed for a data set fits it, and is one that could run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from jobs.cli import main as cli
from jobs.configs import PretrainConfig
from jobs.configs.study import StudyConfig
from jobs.study.prepare import prepare
from jobs.study.proposal import ProposalConfig, fit, propose
from ssl_core.config import load, parse
from ssl_core.networks.outline import check_crop
from storage.errors import ConfigError, RefusedInput
from storage.format.manifest import Manifest
from storage.format.records import LabelRecord, VolumeRecord
from storage.objects import open_store
from tests.kit import ROOT
from tests.kit.phantoms import write_phantoms
from tests.kit.records import record

Triple = tuple[int, int, int]
Boxes = tuple[tuple[Triple, Triple], ...]
SETS: dict[str, tuple[Triple, tuple[float, float, float], Boxes]] = {
    "a small organ in one frame": ((36, 50, 35), (1, 1, 1), (((2, 3, 4), (14, 40, 26)), ((12, 3, 4), (30, 30, 26)))),
    "slices far apart": ((36, 256, 256), (7.7, 1.25, 1.25), (((4, 50, 40), (30, 190, 180)),)),
    "a whole body": ((600, 512, 512), (1, 0.8, 0.8), (((100, 100, 100), (300, 350, 380)), ((0, 0, 0), (40, 40, 40)))),
    "flat": ((12, 320, 320), (4, 0.6, 0.6), (((2, 100, 100), (10, 180, 200)),)),
    "a heart": ((22, 36, 48), (2.5, 2.5, 2.5), (((2, 3, 0), (20, 32, 47)),)),
    "tiny": ((9, 10, 11), (1, 1, 1), (((2, 2, 2), (7, 7, 7)),)),
}


def records(name: str, train: int = 20, test: int = 5) -> list[VolumeRecord]:
    shape, spacing, boxes = SETS[name]
    values = tuple(range(1, len(boxes) + 1))
    label = LabelRecord("label", values, (9,) * len(boxes), boxes, ((boxes[0][0],),) * len(boxes), "uint8")
    return [
        record(
            i,
            subject=f"s{i}",
            split="train" if i < train else "test",
            shape_DHW=shape,
            spacing_mm=spacing,
            foreground_lo=(0, 0, 0),
            foreground_hi=shape,
            labels=(label,),
        )
        for i in range(train + test)
    ]


def proposed(name: str, voxels: int, **sizes: int) -> StudyConfig:
    manifest = Manifest.from_records(records(name, **sizes), {"name": "set"})
    return parse(StudyConfig, yaml.safe_load(propose(manifest, "memory://set", ProposalConfig(voxels=voxels))))


@pytest.mark.parametrize("voxels", [24_000, 800_000])
@pytest.mark.parametrize("name", SETS)
def test_a_patch_is_one_that_the_network_takes_and_no_larger_than_was_said(name: str, voxels: int) -> None:
    study = proposed(name, voxels)
    network, patch = study.pretraining(None, 0).backbone, study.finetune.patch_DHW
    assert np.prod(patch) <= voxels
    assert study.pretraining("place", 0).method_config.crops.size_DHW == patch  # type: ignore[attr-defined]
    check_crop(network.name, network.arguments, patch, "patch")
    steps = [np.broadcast_to(stride, 3) for stride in network.arguments["strides"]]
    deepest = np.array(patch) / np.prod(steps, axis=0)
    assert (deepest == deepest.round()).all()
    assert deepest.min() >= 3  # kernels of bf16 on CPUs are wrong on two slices
    shape = np.array(SETS[name][0])
    assert (np.array(patch) < shape + np.prod(steps, axis=0) * 3).all()


def test_an_axis_of_long_voxels_is_halved_once_the_others_have_caught_up() -> None:
    strides = fit(records("slices far apart"), "label", 800_000).strides
    assert strides[:3] == ((1, 1, 1), (1, 2, 2), (1, 2, 2))
    assert fit(records("a small organ in one frame"), "label", 24_000).strides[1] == (2, 2, 2)


def test_where_a_patch_does_not_hold_the_structure_the_comment_names_a_spacing_that_does() -> None:
    fitted = fit(records("a whole body"), "label", 24_000)
    assert min(fitted.held_DHW) < 0.2
    structure_mm = np.array(fitted.structure_DHW) * fitted.spacing_mm
    assert 0.6 * 24_000 < (structure_mm / fitted.coarser_mm).prod() <= 24_000
    assert (np.array(fitted.coarser_mm) >= fitted.spacing_mm).all()
    manifest = Manifest.from_records(records("a whole body"), {"name": "set"})
    text = propose(manifest, "memory://set", ProposalConfig())
    assert f"spacing_mm=[{','.join(f'{mm:g}' for mm in fitted.coarser_mm)}]" in text
    whole = fit(records("a small organ in one frame"), "label", 60_000)
    assert min(whole.held_DHW) > 0.8
    small = propose(
        Manifest.from_records(records("a small organ in one frame"), {"name": "set"}),
        "memory://set",
        ProposalConfig(voxels=60_000),
    )
    assert "spacing_mm" not in small


def test_the_tutorial_shows_what_is_proposed() -> None:
    page = (ROOT / "docs/tutorial-own-data.md").read_text(encoding="utf-8")
    shown = page.partition("```yaml\n")[2].partition("```")[0]
    manifest = Manifest.from_records(records("a heart", train=70), {"name": "set"})
    printed = propose(manifest, "s3://volumes/mine", ProposalConfig())
    # bf16 is proposed where the processor has it, so not everywhere.
    assert _without_precision(yaml.safe_load(printed)) == _without_precision(yaml.safe_load(shown))


def _without_precision(study: dict[str, Any]) -> dict[str, Any]:
    for group in (study["pretrain"]["engine"], study["finetune"]):
        group.pop("precision", None)
    return study


def test_counts_leave_subjects_to_search_on_and_settings_are_scored_on_all_that_there_are() -> None:
    scored = {}
    for train in (3, 4, 9, 11, 40):
        study = proposed("tiny", 24_000, train=train)
        assert max(study.labels) < train
        assert max(study.labels[:2]) + study.search.subjects <= train
        assert study.labels[0] == 1
        scored[train] = study.search.subjects
    assert scored == {3: 1, 4: 2, 9: 7, 11: 8, 40: 8}
    assert proposed("tiny", 24_000, train=40).labels == (1, 2, 5, 10)


def test_labelled_subjects_that_no_part_of_the_study_reads_are_named() -> None:
    some = records("tiny", train=20, test=5)
    some[3], some[4] = (replace(each, split="val") for each in some[3:5])
    text = propose(Manifest.from_records(some, {"name": "set"}), "memory://set", ProposalConfig())
    assert "18 labelled subjects to train and search, 5 to test" in text
    assert "2 labelled subjects of the val split take no part" in text
    assert "val split" not in propose(Manifest.from_records(records("tiny")), "memory://set", ProposalConfig())


@pytest.mark.parametrize("train", [3, 5, 30])
def test_as_many_draws_are_proposed_as_there_are_that_differ(train: int, tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/store")
    manifest = Manifest.from_records(records("tiny", train=train), {"name": "set"})
    manifest.write(store)
    study = parse(StudyConfig, yaml.safe_load(propose(manifest, store.url, ProposalConfig())))
    data = prepare(study, open_store(f"file://{tmp_path}/study"), print)
    assert len(data.draws) == study.draws == {3: 3, 5: 5, 30: 8}[train]


def test_a_network_takes_as_many_channels_as_the_volumes_have() -> None:
    stats = record().stats * 2
    two = [replace(each, channels=2, stats=stats) for each in records("tiny")]
    text = propose(Manifest.from_records(two, {"name": "set"}), "memory://set", ProposalConfig())
    assert parse(StudyConfig, yaml.safe_load(text)).pretraining(None, 0).backbone.arguments["in_channels"] == 2


def test_what_cannot_be_proposed_is_refused_with_the_reason() -> None:
    manifest = Manifest.from_records(records("tiny"), {"name": "set"})
    with pytest.raises(RefusedInput, match=r"memory://set.*label 'heart'.*0 and 0; labels there: label.*label=NAME"):
        propose(manifest, "memory://set", ProposalConfig(label="heart"))
    with pytest.raises(RefusedInput, match="2 and 5"):
        propose(Manifest.from_records(records("tiny", train=2)), "memory://set", ProposalConfig())
    with pytest.raises(RefusedInput, match="20 and 0"):
        propose(Manifest.from_records(records("tiny", test=0)), "memory://set", ProposalConfig())
    with pytest.raises(ConfigError, match=r"voxels.*4096"):
        load(ProposalConfig, {}, ["voxels=100"])


def test_the_command_prints_a_study_that_a_dry_run_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = f"file://{tmp_path}/store"
    write_phantoms(store, 24)
    state = ["--state", str(tmp_path / "state")]
    assert cli.main(["study", "--propose", store, "label=labels", "voxels=9000", *state]) == 0
    text = capsys.readouterr().out
    (tmp_path / "study.yaml").write_text(text, encoding="utf-8")
    assert load(StudyConfig, tmp_path / "study.yaml").label == "labels"
    assert cli.main(["study", str(tmp_path / "study.yaml"), "--local", str(tmp_path / "out"), "--dry-run"]) == 0
    assert "seen with 80 %" in capsys.readouterr().out
    assert cli.main(["study", str(tmp_path / "study.yaml"), "--keep", "place"]) == 0
    (tmp_path / "pretrain.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    job, of_study = (
        load(PretrainConfig, tmp_path / "pretrain.yaml"),
        load(StudyConfig, tmp_path / "study.yaml").pretraining("place", 0),
    )
    for key in ("data", "method", "backbone", "intensity", "stream"):
        assert getattr(job, key) == getattr(of_study, key), key
    assert (job.name, job.engine.steps) == ("store-place", of_study.engine.steps)
    for start in ("scratch", "nonesuch"):
        assert cli.main(["study", str(tmp_path / "study.yaml"), "--keep", start]) == 2
        assert f"start {start!r}; expected one that the study pre-trains: place" in capsys.readouterr().err
    assert cli.main(["study", "--propose", store, "labels=x", *state]) == 2
    assert "labels" in capsys.readouterr().err
