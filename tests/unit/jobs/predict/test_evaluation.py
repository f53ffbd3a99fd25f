"""`tomoscale evaluate` of models of whole scans: the scores of fine-tuning, from a bundle and a store alone."""

import json
from pathlib import Path

import numpy as np
import pytest

from jobs.cli.main import main
from jobs.predict.evaluation import of_heads
from ssl_core.portable import Predictor
from ssl_core.portable.head.assess import assess_values
from storage.errors import ConfigError
from storage.format.manifest import Manifest
from storage.reading.slabs import StoredSlabs
from storage.reading.volume_store import VolumeStore
from tests.kit.cohorts import write_cohort
from tests.kit.small_models import encoder_bundle, head_bundle


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = (tmp_path_factory.mktemp("store") / "cohort").as_uri()
    write_cohort(url, 12, {2: {"age": "61.5"}, 5: {"age": "70"}, 8: {"large": "", "age": "44"}})
    return url


def test_a_classifier_is_scored_on_a_split_by_the_column_it_learned(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = head_bundle(tmp_path / "model")
    assert main(["evaluate", str(model), store, "--json", "--force"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["column"] == "large"
    assert result["without_value"] == ["v008"], "of the test split; it is named and not scored"
    predictor = Predictor(model, "cpu", lambda _note: None)
    hits = []
    with VolumeStore(store) as volumes:
        for case in result["cases"]:
            record = next(r for r in volumes.manifest.records() if r.volume_id == case["volume_id"])
            slabs = StoredSlabs(volumes, record.volume_id)
            said = assess_values(predictor, slabs, np.eye(4), record.stats, force=True)
            assert case["prediction"] == said["class"]
            assert case["truth"] == ("no" if case["volume_id"] == "v005" or case["volume_id"] == "v011" else "yes")
            hits.append(said["class"] == case["truth"])
    assert [case["volume_id"] for case in result["cases"]] == ["v002", "v005", "v011"]
    assert result["scores"]["accuracy"] == pytest.approx(np.mean(hits))
    assert main(["evaluate", str(model), store, "--force"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["case", "large,", "truth", "model"]
    assert any(line.startswith("balanced_accuracy") for line in lines)


def test_a_regressor_is_scored_in_the_unit_of_its_column(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = head_bundle(tmp_path / "model", ())
    assert main(["evaluate", str(model), store, "--json", "--force"]) == 0
    result = json.loads(capsys.readouterr().out)
    errors = [abs(case["prediction"] - case["truth"]) for case in result["cases"]]
    assert [case["truth"] for case in result["cases"]] == [61.5, 70.0, 44.0]
    assert result["scores"]["mae"] == pytest.approx(np.mean(errors))


def test_a_class_that_the_model_does_not_know_is_named(store: str, tmp_path: Path) -> None:
    predictor = Predictor(head_bundle(tmp_path / "model", ("no", "maybe")), "cpu", lambda _note: None)
    with pytest.raises(ConfigError, match="'yes' of v002; write them"):
        of_heads(predictor, store, Manifest.open(store), "test", force=True)


def test_what_cannot_be_scored_is_refused(store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, without = head_bundle(tmp_path / "model"), (tmp_path / "plain").as_uri()
    write_cohort(without, 3, {i: {"large": ""} for i in range(3)})
    encoder = encoder_bundle(tmp_path / "encoder")
    for words, found in (
        ([str(model), store, "--label", "tumour"], "volumes with label 'tumour'"),
        ([str(model), store, "--split", "val"], "split 'val'"),
        ([str(model), without], "columns there are: 'size'"),
        ([str(model), store, "--mirror", "D"], "--mirror"),
        ([str(model), store, "--tolerance-mm", "2"], "--tolerance-mm"),
        ([str(encoder), store], "a segmenter, a classifier or a regressor; found an encoder"),
    ):
        assert main(["evaluate", *words]) == 2, words
        assert found in capsys.readouterr().err, words
