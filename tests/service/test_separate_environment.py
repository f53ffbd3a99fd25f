"""A registered segmenter in an environment of its own, with mlflow, torch and monai and nothing of this project.

Takes minutes and a package index: it runs when TOMOSCALE_TEST_FRESH_ENV is 1.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from jobs.tracking import models as registry
from ssl_core.bundle import write_bundle
from ssl_core.portable import Predictor
from tests.kit.bundles import facts, network, scan
from tests.kit.mlflow_server import environment, mlflow_server

pytestmark = [
    pytest.mark.service,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        os.environ.get("TOMOSCALE_TEST_FRESH_ENV") != "1",
        reason="makes a virtual environment from the package index, minutes; set TOMOSCALE_TEST_FRESH_ENV=1",
    ),
]

_USER = """
import sys, importlib.util
import numpy as np
import mlflow
for absent in ("storage", "ssl_core", "jobs", "nibabel", "safetensors", "ray", "zarr"):
    assert importlib.util.find_spec(absent) is None, absent
model = mlflow.pyfunc.load_model("models:/fresh@candidate")
np.save(sys.argv[2], model.predict(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as url, pytest.MonkeyPatch.context() as patch:
        for key, value in {**environment(), "MLFLOW_TRACKING_URI": url}.items():
            patch.setenv(key, value)
        yield url


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment with the three packages, at the versions that the model asks for."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    found = folder / "bin" / "python"
    for package in ("torch", "mlflow", "monai"):  # torch first: the others must not bring one of their own
        pin = f"{package}=={version(package).partition('+')[0]}"
        subprocess.run([str(found), "-m", "pip", "install", "-q", "--disable-pip-version-check", pin], check=True)
    return found


def test_three_packages_are_enough(server: str, python: Path, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", "segmenter", network(), facts())
    registry.register(bundle, "fresh")
    source = scan(tmp_path)
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    command = [str(python), "-I", "-c", _USER, str(source), str(tmp_path / "mask.npy")]
    done = subprocess.run(command, cwd=tmp_path, env=kept, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found, wanted = np.load(tmp_path / "mask.npy"), Predictor(bundle).predict(source)
    assert found.dtype == wanted.dtype
    assert np.array_equal(found, wanted)
    assert len(np.unique(found)) > 1
