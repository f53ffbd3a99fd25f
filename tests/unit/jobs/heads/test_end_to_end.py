"""From a store with a column to a bundle that tells classes: trained, killed and gone on with, scored, predicted."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from jobs.cli.main import main as tomoscale
from jobs.configs import FinetuneJobConfig
from jobs.finetune.driver import Task, registered_task, training_task
from jobs.finetune.heads import Which, compared_heads, train_head_from, trained_and_stored
from ssl_core.config import parse, resolved
from ssl_core.downstream.finetune import FolderCheckpoints
from ssl_core.downstream.heads.comparison import UNTESTED, HeadTraining
from ssl_core.portable import Predictor
from ssl_core.portable.head.assess import assess
from tests.kit.cohorts import image, write_cohort
from tests.kit.small_models import encoder_bundle

FINETUNE: dict[str, Any] = {"task": "classification", "epochs": 4, "steps_per_epoch": 8, "batch": 4, "lr": 0.01}
FINETUNE |= {"patch_DHW": [16, 16, 16], "warmup_steps": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    write_cohort(f"file://{folder}/store", 36, {0: {"large": ""}, 35: {"large": "NA"}})
    encoder_bundle(folder / "encoder")
    return folder


def job(place: Path, column: str = "large", **finetune: Any) -> FinetuneJobConfig:
    labelled = {"data": f"file://{place}/store", "column": column, "subjects": 16, "inner": 4}
    starts = {"pre": str(place / "encoder"), "scratch": "none"}
    settings = {"name": "whole", "runs": f"file://{place}/runs", "starts": starts, "seeds": [0]}
    return parse(FinetuneJobConfig, settings | {"labelled": labelled, "finetune": FINETUNE | finetune})


class Died(Exception):
    """The training's process ends."""


@pytest.mark.parametrize("frozen", [False, True])
def test_a_training_that_died_goes_on_to_the_same_bits(place: Path, tmp_path: Path, frozen: bool) -> None:
    config = job(place, epochs=3, head={"frozen": frozen}, select="best")
    how: dict[str, Any] = {"seed": 0, "like": str(place / "encoder")}

    def die(epoch: int, _metrics: dict[str, float]) -> None:
        if epoch == 2:
            raise Died

    checkpoints = FolderCheckpoints(tmp_path)
    start = str(place / "encoder")
    whole = train_head_from(start, config.labelled, config.finetune, **how)
    with pytest.raises(Died):
        train_head_from(start, config.labelled, config.finetune, **how, checkpoints=checkpoints, on_epoch=die)
    again = train_head_from(start, config.labelled, config.finetune, **how, checkpoints=checkpoints)
    assert again.history == whole.history
    assert len(again.history) == 3
    states = (again.network.state_dict(), whole.network.state_dict())
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())
    assert torch.equal(again.head.weight_KE, whole.head.weight_KE)


def test_a_classifier_beats_chance_and_its_bundle_says_what_training_said(place: Path, tmp_path: Path) -> None:
    config = job(place)
    assert registered_task(config) == Task("pre", 0, None)
    training = training_task(resolved(config), "run", Task("pre", 0, None))
    assert isinstance(training, HeadTraining)
    assert len(training.cases) == 11, "one of the 12 test volumes has no class"
    assert training.scores["accuracy"] == 1.0
    assert training.scores["auroc"] == 1.0
    assert HeadTraining.from_json(json.loads(json.dumps(training.to_json()))) == training
    bundle = place / "runs" / "whole" / "bundle"
    predictor = Predictor(bundle, "cpu", report=lambda _note: None)
    assert (predictor.kind, predictor.card["format"]) == ("classifier", "tomoscale-bundle/3")
    assert predictor.head is not None
    assert predictor.head.classes == ("no", "yes")
    evaluation = json.loads((bundle / "evaluation.json").read_text(encoding="utf-8"))
    assert evaluation["measure"] == "accuracy"
    assert set(evaluation["cases"]) == {case.subject for case in training.cases}
    files = [path for path in bundle.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors", ".md", ".py"}, "nothing else executes or could"

    table = tmp_path / "store.csv"
    assert tomoscale(["predict", str(bundle), f"file://{place}/store", str(table), "--split", "test"]) == 0
    rows = {row["scan"]: row for row in csv.DictReader(table.open(encoding="utf-8"))}
    assert len(rows) == 12, "those without a value are predicted too"
    for case in training.cases:
        row = rows[case.volume_id]
        assert row["class"] == case.prediction
        assert [float(row["p(no)"]), float(row["p(yes)"])] == pytest.approx(case.probabilities, abs=1e-5)

    scan = tmp_path / "scan.nii.gz"
    array = image(6.2, 99).transpose(2, 1, 0)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), scan)
    assert tomoscale(["predict", str(bundle), str(scan), str(tmp_path / "one.csv")]) == 0
    (row,) = csv.DictReader((tmp_path / "one.csv").open(encoding="utf-8"))
    assert (row["scan"], row["class"]) == ("scan", "yes")
    assert float(row["p(yes)"]) == pytest.approx(float(assess(predictor, scan)["p(yes)"]), abs=1e-6)

    words = [sys.executable, "-m", "tomoscale_portable", str(bundle), str(scan), str(tmp_path / "alone.csv")]
    alone = subprocess.run(words, cwd=bundle, capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr
    (other,) = csv.DictReader((tmp_path / "alone.csv").open(encoding="utf-8"))
    assert float(other["p(yes)"]) == pytest.approx(float(row["p(yes)"]), abs=1e-6)

    nibabel.save(nibabel.Nifti1Image(array * 0 + 7, np.eye(4)), tmp_path / "empty.nii.gz")
    refused = tomoscale(["predict", str(bundle), str(tmp_path / "empty.nii.gz"), str(tmp_path / "no.csv")])
    assert refused == 3
    assert not (tmp_path / "no.csv").exists()
    assert tomoscale(["predict", str(bundle), str(scan), str(tmp_path / "mask.nii.gz")]) == 2
    odd = ["predict", str(bundle), str(scan), str(tmp_path / "odd.csv")]
    assert tomoscale([*odd, "--mirror", "D"]) == 2
    assert tomoscale([*odd, "--overlay"]) == 2
    assert not (tmp_path / "odd.csv").exists()
    assert tomoscale(["predict", str(place / "encoder"), str(scan), str(tmp_path / "e.csv")]) == 2


def test_a_linear_probe_of_a_number_is_compared_with_random_features(place: Path, tmp_path: Path) -> None:
    config = job(place, "size", task="regression", epochs=30, lr=0.05, head={"frozen": True, "levels": 2})
    trainings = [
        trained_and_stored(config, "run", Which(start, 0, None, False), FolderCheckpoints(tmp_path / start))
        for start in config.starts
    ]
    r2 = trainings[0].scores["r2"]
    assert r2 is not None
    assert r2 > 0.5, "the mean of the training subjects has 0 at most"
    result = compared_heads(config, trainings, registered="pre", run_id="r", seconds=1.0)
    data = json.loads(json.dumps(result.to_json()))
    assert data["test"]["statement"].endswith(UNTESTED)
    assert "minus absolute error of size" in data["test"]["statement"]
    assert [row["start"] for row in data["rows"]] == ["pre", "scratch"]
    assert data["rows"][0]["scores"]["r2"] == {"mean": r2, "sd": 0.0, "trainings": 1}
