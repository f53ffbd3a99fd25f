"""Models with a head: what MLflow is told and given, what is refused, and that their encoders are starts."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mlflow.exceptions import MlflowException
from safetensors.torch import load_file, save_file

from jobs.exchange.model import open_model
from jobs.tracking.bundles import pull_encoder
from jobs.tracking.model_code import Bundle
from jobs.tracking.model_entry import _names, _signature
from jobs.tracking.starts import read_start
from ssl_core.bundle import load_backbone, write_bundle
from ssl_core.portable import Predictor
from ssl_core.portable.head.assess import assess
from storage.errors import ConfigError, RefusedInput
from tests.kit.bundles import facts, learned
from tests.kit.cohorts import image
from tests.kit.small_models import WINDOW, encoder_bundle, head_bundle, resenc

SCAN = image(5.0, 3).transpose(2, 1, 0)
EYE = np.eye(4)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads")
    head_bundle(folder / "classifier")
    head_bundle(folder / "regressor", ())
    return folder


def loaded(bundle: Path) -> Any:
    model = Bundle()
    model.load_context(SimpleNamespace(artifacts={"bundle": str(bundle)}, model_config={"device": "cpu"}))
    return model


def quiet(bundle: Path) -> Predictor:
    return Predictor(bundle, "cpu", report=lambda _note: None)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_mlflows_model_says_what_the_bundle_says(place: Path) -> None:
    item = {"image": SCAN, "affine": EYE}
    row = loaded(place / "classifier").predict(None, item)
    assert row == dict(assess(quiet(place / "classifier"), SCAN, EYE))
    assert list(row) == ["class", "p(no)", "p(yes)"]
    assert row["p(no)"] + row["p(yes)"] == pytest.approx(1)
    assert row["class"] == ("yes" if row["p(yes)"] > 0.5 else "no")
    (number,) = loaded(place / "regressor").predict(None, [item])
    assert list(number) == ["age"]
    with pytest.raises(MlflowException, match="nifti; expected a segmenter; found a classifier"):
        loaded(place / "classifier").predict(None, item, {"nifti": True})


def test_the_signature_names_each_column_of_a_result(place: Path) -> None:
    for kind, names in (("classifier", ["class", "p(no)", "p(yes)"]), ("regressor", ["age"])):
        card = json.loads((place / kind / "bundle.json").read_text(encoding="utf-8"))
        signature = _signature(card, {}, _names(place / kind, card["kind"]))
        assert signature.outputs.input_names() == names
        assert [str(t) for t in signature.outputs.input_types()][-1] == "DataType.double"
        text = (place / kind / "MODEL_CARD.md").read_text(encoding="utf-8")
        assert "result.csv" in text
        assert ("- class: yes" in text) == (kind == "classifier")


def test_a_number_is_in_the_unit_of_its_column(place: Path) -> None:
    predictor = quiet(place / "regressor")
    assert predictor.head is not None
    raw = predictor.head.outputs(torch.zeros(1, 16, dtype=torch.float64))[0]
    assert predictor.head.row(raw)["age"] == pytest.approx(60 + 12 * float(predictor.head.bias_K[0]))


def test_a_scan_that_is_not_like_those_of_training_is_refused(tmp_path: Path) -> None:
    bundle = head_bundle(tmp_path / "knows", training=learned())
    predictor = quiet(bundle)
    ct = np.where(SCAN > 400, 1500, -1000).astype(np.int16)
    spacing = np.diag([1.5, 1.5, 2.0, 1.0])
    with pytest.raises(RefusedInput, match="a CT by its values"):
        assess(predictor, np.tile(ct, (2, 2, 2)), spacing)
    with pytest.raises(RefusedInput, match="modality PT, where it learned from MR"):
        assess(predictor, np.tile(SCAN, (2, 2, 2)), spacing, modality="PT")
    with pytest.raises(RefusedInput, match="1 channel"):
        assess(predictor, np.stack([SCAN, SCAN], -1), EYE)
    with pytest.raises(ConfigError, match="a segmenter bundle.*a classifier bundle"):
        predictor.predict(SCAN, EYE, force=True)


def test_the_encoder_of_a_classifier_is_a_start(place: Path) -> None:
    bundle = place / "classifier"
    start, model = read_start(str(bundle)), pull_encoder(str(bundle))
    start.require_transfer("encoder")
    assert start.kind == "classifier"
    with pytest.raises(ConfigError):
        start.require_transfer("encoder_decoder")
    assert set(model.weights) == set(start.encoder_keys)
    assert model.modules == start.modules
    again = load_backbone(bundle)
    assert all(torch.equal(again.net.state_dict()[key], tensor) for key, tensor in model.weights.items())


def test_a_head_is_not_exported_without_a_word(place: Path) -> None:
    with pytest.raises(ConfigError, match="a classifier, whose head no export has"):
        open_model(place / "classifier")


def changed(bundle: Path, **data: Any) -> Path:
    """With another `head.json`, under its right digest."""
    path = bundle / "head.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | data), encoding="utf-8")
    card = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    card["files"]["head.json"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (bundle / "bundle.json").write_text(json.dumps(card), encoding="utf-8")
    return bundle


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"classes": ["a", "b", "c"]}, "weights .2, 16. for 3 outputs"),
        ({"classes": []}, "2 levels, regressor"),
        ({"levels": 1}, "for 2 outputs of 8 features"),
        ({"levels": 9}, "9 levels"),
        ({"sd": -1.0}, "sd -1"),
    ],
)
def test_a_head_of_another_network_is_refused(tmp_path: Path, data: dict[str, Any], words: str) -> None:
    with pytest.raises(RefusedInput, match=words):
        quiet(changed(head_bundle(tmp_path / "b"), **data))


def test_weights_of_a_head_are_in_the_digest(tmp_path: Path) -> None:
    bundle = head_bundle(tmp_path / "b")
    tensors = load_file(bundle / "head.safetensors")
    save_file({key: tensor + 1 for key, tensor in tensors.items()}, bundle / "head.safetensors")
    with pytest.raises(RefusedInput, match="head.safetensors"):
        quiet(bundle)


def test_a_kind_without_its_head_is_not_written(tmp_path: Path) -> None:
    for kind in ("classifier", "regressor"):
        with pytest.raises(ConfigError, match=f"the head of a bundle of kind {kind}; found none"):
            write_bundle(tmp_path / "b", kind, resenc(), facts(patch_DHW=WINDOW, labels=()))  # type: ignore[arg-type]
    head = quiet(head_bundle(tmp_path / "c")).head
    with pytest.raises(ConfigError, match="kind encoder; found classifier"):
        write_bundle(tmp_path / "b", "encoder", resenc(), facts(patch_DHW=WINDOW, labels=(), head=head))
    assert not (tmp_path / "b").exists()
    encoder_bundle(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "bundle.json").read_text(encoding="utf-8"))["format"] == "tomoscale-bundle/1"
