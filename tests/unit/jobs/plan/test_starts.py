"""What a job starts from is looked at before the job is sent: there, readable, fitting; of metadata alone."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from jobs.cli import main as cli
from jobs.configs import FinetuneJobConfig, PretrainConfig
from jobs.configs.groups import BackboneConfig
from jobs.configs.search import TuneConfig
from jobs.configs.study import StudyConfig
from jobs.plan.starts import require_starts
from jobs.tracking.bundles import pull_encoder
from jobs.tracking.starts import read_start
from ssl_core.bundle import write_bundle
from ssl_core.config import Config, parse
from storage.errors import ConfigError, NotFound, RefusedInput, TomoscaleError
from storage.format.manifest import Manifest
from storage.format.volume import Membership, Provenance, Volume
from storage.format.volume_writer import write_volume
from storage.objects import open_store
from tests.kit.bundles import facts
from tests.kit.networks import SMALL
from tests.kit.phantoms import write_phantoms
from tests.kit.small_models import WINDOW, encoder_bundle, resenc, segmenter_bundle

DATA, PAIRS = "memory://plan-starts", "memory://plan-starts-pairs"
ARGUMENTS = {key: list(value) for key, value in SMALL["resenc"].items()}
PATCH = {"patch_DHW": list(WINDOW)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles of an encoder, of one with its decoder, and of a segmenter; stores of one channel and of two."""
    folder = tmp_path_factory.mktemp("starts")
    encoder_bundle(folder / "encoder")
    write_bundle(folder / "both", "encoder", resenc(1), facts(patch_DHW=WINDOW, labels=()), decoder=True)
    segmenter_bundle(folder / "segmenter")
    write_phantoms(DATA, 8)
    records = [
        write_volume(
            open_store(PAIRS),
            f"v{i}",
            Volume(
                np.ones((2, 8, 9, 10), np.int16),
                spacing_mm=(1.0, 1.0, 1.0),
                affine=np.eye(4),
                labels={"labels": np.ones((8, 9, 10), np.uint8)},
            ),
            membership=Membership(subject=f"s{i}", split="test" if i == 3 else "train"),
            provenance=Provenance(source=f"v{i}"),
        )
        for i in range(4)
    ]
    Manifest.from_records(records, {"name": "pairs"}).write(open_store(PAIRS))
    return folder


def finetune(start: str | Path, data: str = DATA, subjects: int = 3, **settings: Any) -> FinetuneJobConfig:
    labelled = {"data": data, "label": "labels", "subjects": subjects, "inner": 1}
    job = {"name": "n", "starts": {"own": str(start), "scratch": "none"}, "labelled": labelled}
    return parse(FinetuneJobConfig, job | {"finetune": PATCH | settings})


def tune(start: Path, **changes: Any) -> TuneConfig:
    labelled = {"data": DATA, "label": "labels", "subjects": 3, "inner": 1}
    job = {"name": "n", "encoders": [str(start), "none"], "labelled": labelled, "finetune": PATCH}
    return parse(TuneConfig, job | changes)


def notes_of(config: Any) -> list[str]:
    lines: list[str] = []
    require_starts(config, lines.append)
    return lines


def refused(config: Config, kind: type[TomoscaleError], *parts: str) -> None:
    with pytest.raises(kind) as raised:
        notes_of(config)
    for part in parts:
        assert part in str(raised.value), raised.value


def test_starts_that_fit_are_taken_without_a_look_at_their_weights(place: Path, tmp_path: Path) -> None:
    for name in ("encoder", "both", "segmenter"):
        shutil.copytree(place / name, tmp_path / name)
        for weights in (tmp_path / name).glob("*.safetensors"):
            weights.unlink()
        assert notes_of((tune if name == "both" else finetune)(tmp_path / name)) == []
    assert notes_of(finetune((tmp_path / "encoder").as_uri())) == []


def test_a_bundle_behind_a_url_is_a_start(place: Path) -> None:
    job = finetune((place / "both").as_uri())
    assert pull_encoder(job.starts["own"]).rest
    with pytest.raises(ConfigError, match="user or password"):
        finetune("https://me:hush@host/bundle")


def test_what_a_bundle_cannot_give_over_is_refused_by_the_key(place: Path) -> None:
    for transfer in ("encoder_decoder", "all_but_head"):
        words = f"starts.own: finetune.transfer: transfer {transfer} of {place}/encoder"
        refused(finetune(place / "encoder", transfer=transfer), ConfigError, words, "missing, the first: ")
        assert notes_of(finetune(place / "both", transfer=transfer)) == []
        assert notes_of(finetune(place / "segmenter", transfer=transfer)) == []
    space = {"finetune.transfer": {"choice": ["encoder", "encoder_decoder"]}}
    refused(tune(place / "encoder", space=space), ConfigError, f"encoders {place}/encoder: space: finetune.transfer: ")
    assert notes_of(tune(place / "both", space=space)) == []


def test_more_levels_than_a_network_has_are_refused_by_the_key(place: Path) -> None:
    words = ("starts.own: finetune.deep_supervision", "the decoder levels of resenc")
    refused(finetune(place / "encoder", deep_supervision=9), ConfigError, *words)
    assert notes_of(finetune(place / "encoder", deep_supervision=1)) == []
    space = {"finetune.deep_supervision": {"choice": [0, 9]}}
    refused(tune(place / "both", space=space), ConfigError, f"encoders {place}/both: finetune.deep_supervision", "9")


def test_a_newer_a_foreign_and_a_changed_bundle_are_refused_by_the_key(place: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(place / "encoder", copy)
    card = json.loads((copy / "bundle.json").read_text())
    (copy / "bundle.json").write_text(json.dumps(card | {"format": "tomoscale-bundle/9"}))
    refused(finetune(copy), RefusedInput, "starts.own: ", "a newer version wrote; update tomoscale")
    (copy / "bundle.json").write_text(json.dumps(card))
    (copy / "architecture.json").write_text("{}")
    refused(finetune(copy), RefusedInput, "starts.own: ", "architecture.json; expected SHA-256")
    refused(finetune(tmp_path), RefusedInput, "starts.own: ", "the folder of a bundle, with bundle.json")
    refused(finetune("memory://nothing/bundle"), NotFound, "starts.own: ", "bundle.json")
    assert ["own" in line and "on the nodes" in line for line in notes_of(finetune("/absent/bundle"))] == [True]


def test_a_network_that_this_version_cannot_build_is_refused_by_the_key(place: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(place / "encoder", copy)
    card = json.loads((copy / "bundle.json").read_text())
    architecture = json.loads((copy / "architecture.json").read_text())
    architecture["backbone_arguments"]["features_per_stage"] = [4]
    (copy / "architecture.json").write_text(json.dumps(architecture))
    card["files"]["architecture.json"] = hashlib.sha256((copy / "architecture.json").read_bytes()).hexdigest()
    (copy / "bundle.json").write_text(json.dumps(card))
    refused(finetune(copy), ConfigError, "starts.own: backbone.arguments.")


def test_channels_and_subjects_are_counted_before_anything_is_sent(place: Path) -> None:
    refused(finetune(place / "encoder", PAIRS), ConfigError, "starts.own: volume v", "1 channel(s)", "found 2")
    assert notes_of(finetune(place / "encoder", PAIRS, channels="repeat")) == []
    refused(finetune(place / "encoder", subjects=99), RefusedInput, "labelled subjects of", "expected 99")
    (line,) = notes_of(finetune(place / "encoder", "memory://plan-starts-absent"))
    assert line.startswith("labelled.data is not looked at from here: ")


def test_a_pretraining_starts_from_an_encoder_of_its_own_network(place: Path) -> None:
    job = {"name": "n", "data": DATA, "method": {"name": "simclr"}, "init": str(place / "encoder")}
    network = {"name": "resenc", "arguments": ARGUMENTS}
    assert notes_of(parse(PretrainConfig, job | {"backbone": network})) == []
    other = BackboneConfig.model_construct(name="unet", arguments={})  # whose package takes seconds
    named = parse(PretrainConfig, job | {"backbone": network}).model_copy(update={"backbone": other})
    refused(named, ConfigError, "init: ", "backbone.name unet", "found resenc")
    wide = network | {"arguments": ARGUMENTS | {"features_per_stage": [4, 8, 16]}}
    refused(parse(PretrainConfig, job | {"backbone": wide}), ConfigError, "init: ", "encoder.stages.2", "backbone.name")


def test_a_study_compares_models_of_its_own_network(place: Path) -> None:
    def study(bundle: str, features: Sequence[int] = (4, 8, 8), **start: Any) -> StudyConfig:
        network = {"name": "resenc", "arguments": ARGUMENTS | {"features_per_stage": list(features)}}
        starts = {"scratch": {}, "own": {"model": str(place / bundle), **start}}
        settings = {"name": "n", "data": DATA, "starts": starts, "pretrain": {"backbone": network}, "finetune": PATCH}
        return parse(StudyConfig, settings)

    assert notes_of(study("both", transfer="encoder_decoder")) == []
    refused(study("encoder", transfer="encoder_decoder"), ConfigError, "starts.own.model: starts.own.transfer: ")
    refused(study("."), RefusedInput, "starts.own.model: ")
    refused(study("both", (4, 8, 16)), ConfigError, "starts.own.model: ", "the study's network, resenc")


@pytest.mark.parametrize("verb", ["plan finetune {}", "finetune {} --dry-run", "finetune {}"])
@pytest.mark.usefixtures("nothing_configured")
def test_every_verb_that_takes_a_job_looks_at_its_starts(
    verb: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "job.yaml"
    job = finetune(place / "encoder", transfer="encoder_decoder").model_dump(mode="json")
    path.write_text(yaml.safe_dump(job), encoding="utf-8")
    assert cli.main(verb.format(path).split()) == 2
    out, err = capsys.readouterr()
    assert "starts.own: finetune.transfer: transfer encoder_decoder" in err
    assert "Traceback" not in out + err


@pytest.mark.usefixtures("nothing_configured")
def test_without_a_registry_a_start_of_it_is_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(finetune("models:/e@candidate").model_dump(mode="json")), encoding="utf-8")
    assert cli.main(["plan", "finetune", str(path)]) == 0
    out, err = capsys.readouterr()
    assert "note: not looked at from here: starts.own: MLFLOW_TRACKING_URI" in err
    assert yaml.safe_load(out)["starts"]["own"] == "models:/e@candidate"


def test_a_start_says_what_it_is(place: Path) -> None:
    start = read_start(str(place / "both"))
    assert (start.kind, start.backbone, start.channels, start.has_decoder) == ("encoder", "resenc", 1, True)
