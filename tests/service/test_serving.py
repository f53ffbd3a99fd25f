"""`mlflow models serve` answers the requests that the documentation shows."""

import base64
import gzip
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from cluster import ports
from jobs.tracking import model_code
from jobs.tracking.model_params import CONFIG, params_schema
from ssl_core.portable import Predictor
from tests.kit import ROOT
from tests.kit.bundles import scan
from tests.kit.mlflow_server import environment
from tests.kit.small_models import segmenter_bundle

pytestmark = pytest.mark.service
PAGE = (ROOT / "docs/how-to-use-models.md").read_text(encoding="utf-8")
REQUESTS = [json.loads(a or b) for a, b in re.findall(r"-d '(\{.*?\})'|```json\n(.*?)```", PAGE, re.DOTALL)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return segmenter_bundle(tmp_path_factory.mktemp("served") / "b")


@pytest.fixture(scope="module")
def saved(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    folder = tmp_path_factory.mktemp("saved")
    mlflow.pyfunc.save_model(
        folder / "model",
        python_model=str(model_code.__file__),
        artifacts={"bundle": str(bundle)},
        model_config={**CONFIG, "device": "cpu"},
        signature=ModelSignature(
            outputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1), "mask")]), params=params_schema()
        ),
        pip_requirements=["mlflow"],
    )
    return folder / "model"


@pytest.fixture(scope="module")
def address(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("serve")
    (port,) = ports.find_free(1)
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(saved)]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port), "--timeout", "600"]
    log = folder / "log"
    with log.open("wb") as out:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # the command runs `uvicorn` by its name
        server = subprocess.Popen(
            command, stdout=out, stderr=out, start_new_session=True, env={**os.environ, **environment(), "PATH": path}
        )
        try:
            deadline = time.monotonic() + 240
            while not _answers(f"http://127.0.0.1:{port}/ping"):
                assert server.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.3)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait(30)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _post(address: str, body: Any) -> Any:
    request = urllib.request.Request(
        f"{address}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.loads(answer.read())["predictions"]


def test_the_documented_requests_are_answered(address: str, bundle: Path, tmp_path: Path) -> None:
    source = scan(tmp_path, (18, 16, 17))
    expected = Predictor(bundle, "cpu").predict(source)
    by_path, by_array = REQUESTS
    for place in (str(source), source.as_uri()):
        by_path["inputs"][0]["path"] = place
        (answer,) = _post(address, by_path)
        image = nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(answer["mask"])))
        assert np.array_equal(np.asanyarray(image.dataobj), expected)
    image = nib.load(source)
    by_array["inputs"] = {"image": np.asanyarray(image.dataobj).tolist(), "affine": image.affine.tolist()}
    answer = _post(address, by_array)
    assert np.array_equal(np.array(answer["mask"]), expected)
    assert np.array(answer["probabilities"]).shape == (*expected.shape, 3)
    assert np.array_equal(np.array(_post(address, {"inputs": [str(source)]})[0]), expected)


def test_what_is_wrong_with_a_request_is_said(address: str) -> None:
    for body, words in (
        ({"inputs": [{"path": "/none.nii", "nifty": True}]}, "found nifty, path"),
        ({"inputs": [{"path": "/none.nii"}]}, "/none.nii; expected a readable file"),
        ({"inputs": {"image": [[[0.0, 1.0]]]}}, "array; expected its affine"),
    ):
        with pytest.raises(urllib.error.HTTPError) as error:
            _post(address, body)
        assert error.value.code == 400
        assert words in json.loads(error.value.read())["message"]


def test_what_mlflow_leaves_out_it_names_in_a_warning(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model never sees such a key: MLflow compares it with those that were registered."""
    import mlflow

    for name in ("mlflow", "mlflow.pyfunc", "mlflow.models.utils"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    source = scan(tmp_path, (18, 16, 17))
    model = mlflow.pyfunc.load_model(str(saved), model_config={"forse": True, "batch": 2})
    assert "forse were ignored" in caplog.text
    assert "Current allowed configuration includes batch, device, force" in caplog.text
    mask = model.predict(str(source), params={"probabilites": True})
    assert isinstance(mask, np.ndarray)
    assert "['probabilites'] are ignored" in caplog.text
    assert set(model.predict(str(source), params={"probabilities": True})) == {"mask", "probabilities"}
    assert model.unwrap_python_model()._config == {"device": "cpu", "batch": 2, "force": False}
