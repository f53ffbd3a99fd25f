"""What MLflow loads of a bundle: paths, URLs, arrays and tables, with parameters, and refusals by name."""

import base64
import gzip
import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pandas
import pytest
from mlflow.exceptions import MlflowException

from jobs.tracking.model_code import CONFIG, PARAMS, Bundle
from ssl_core.portable import Predictor
from tests.kit.bundles import scan
from tests.kit.small_models import encoder_bundle, segmenter_bundle


def _loaded(bundle: Path, **config: Any) -> Bundle:
    model = Bundle()
    model.load_context(SimpleNamespace(artifacts={"bundle": str(bundle)}, model_config={"device": "cpu", **config}))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Path:
    return segmenter_bundle(folder / "b")


@pytest.fixture(scope="module")
def source(folder: Path) -> Path:
    return scan(folder, (18, 16, 17))


@pytest.fixture(scope="module")
def model(bundle: Path) -> Bundle:
    return _loaded(bundle)


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_paths_urls_arrays_and_tables_give_one_mask(model: Bundle, bundle: Path, source: Path, address: str) -> None:
    expected = Predictor(bundle, "cpu").predict(source)
    assert len(np.unique(expected)) == 3
    image = nib.load(source)
    array = {"image": np.asanyarray(image.dataobj), "affine": image.affine}
    for item in (str(source), {"path": str(source)}, {"path": np.array(str(source))}, array, source.as_uri(),
                 f"{address}/{source.name}", {"path": f"{address}/{source.name}"}):  # fmt: skip
        assert np.array_equal(model.predict(None, item), expected), item
    for many in (
        [str(source)],
        np.array([str(source)]),
        pandas.DataFrame({"scan": [str(source)]}),
        pandas.DataFrame([{"path": str(source), "batch": float("nan")}]),
    ):
        (mask,) = model.predict(None, many)
        assert np.array_equal(mask, expected)


def test_parameters_give_probabilities_features_and_files(model: Bundle, bundle: Path, source: Path) -> None:
    predictor, affine = Predictor(bundle, "cpu"), nib.load(source).affine
    mask, maps = predictor.predict_probabilities(source)
    result = model.predict(None, str(source), {"probabilities": True, "features": True})
    assert set(result) == {"mask", "probabilities", "features"}
    assert np.array_equal(result["mask"], mask)
    assert np.array_equal(result["probabilities"], maps)
    assert maps.shape == (*mask.shape, 3)
    assert np.array_equal(np.array([0, 1, 7])[maps.argmax(-1)], mask)
    assert np.array_equal(result["features"], predictor.features(source))
    other = model.predict(None, str(source), {"batch": 2, "device": "cpu"})
    assert (other == mask).mean() > 0.999
    coded = model.predict(None, {"path": str(source), "nifti": np.array(True)})
    written = nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(coded["mask"])))
    assert np.array_equal(np.asanyarray(written.dataobj), mask)
    assert np.allclose(written.affine, affine)
    assert len(model.predict(None, str(source), {"nifti": True, "probabilities": True})["probabilities"]) == 3


def test_an_encoder_gives_features_and_no_probabilities(tmp_path: Path, source: Path) -> None:
    model = _loaded(encoder_bundle(tmp_path / "e"))
    assert model.predict(None, str(source)).ndim == 4
    with pytest.raises(MlflowException, match="expected a segmenter; found an encoder"):
        model.predict(None, str(source), {"probabilities": True})


def test_what_is_misspelt_is_refused_by_name(
    model: Bundle, bundle: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MlflowException, match="params; expected .*probabilities.*; found probabilites"):
        model.predict(None, str(source), {"probabilites": True})
    with pytest.raises(MlflowException, match=r"dictionary.*found batchs, path"):
        model.predict(None, {"path": str(source), "batchs": 2})
    with pytest.raises(MlflowException, match="model_config; expected batch, device, force; found devise"):
        _loaded(bundle, devise="cuda")
    monkeypatch.setenv("MLFLOW_PYFUNC_INFERENCE_CONFIG", json.dumps({"forse": True}))
    with pytest.raises(MlflowException, match="MLFLOW_PYFUNC_INFERENCE_CONFIG; .*found forse"):
        _loaded(bundle)


def test_refusals_say_what_is_wrong(model: Bundle, tmp_path: Path, address: str) -> None:
    image = np.zeros((8, 8, 8), np.float32)
    for item, words in (
        ({"image": image}, "array; expected its affine"),
        ({"image": image, "affine": np.eye(4), "path": "x"}, "dictionary; expected `image`"),
        ({}, "found nothing"),
        (str(tmp_path / "absent.nii.gz"), "expected a readable file"),
        (
            f"{address}/absent.nii.gz",
            "absent.nii.gz; expected a file that this machine can fetch; found HTTP Error 404",
        ),
        ("nonsense://x/y.nii", "nonsense://x/y.nii; expected a file that this machine can fetch"),
    ):
        with pytest.raises(MlflowException, match=words):
            model.predict(None, item)
    with pytest.raises(MlflowException, match="batch; expected windows computed at once"):
        model.predict(None, {"path": "x.nii", "batch": -1})


def test_what_mlflow_is_told_of_it_is_what_it_takes() -> None:
    from jobs.tracking.model_params import params_schema

    schema = params_schema()
    assert {spec.name: spec.default for spec in schema.params} == PARAMS
    assert set(CONFIG) == {"device", "batch", "force"}
