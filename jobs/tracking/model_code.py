"""The MLflow model: a script that MLflow stores beside the bundle and runs where the model is loaded.

It imports nothing of this project. The code that predicts lies in the bundle and is loaded from there under a name of
its own, so that two versions of a model in one process each run the code they were registered with.
"""

import base64
import hashlib
import importlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

CONFIG: dict[str, Any] = {"device": None, "batch": 4, "force": False}
"""What `model_config` may say, and its defaults. MLflow leaves out other keys before a model sees them, and warns."""
PARAMS: dict[str, Any] = {
    "device": "",
    "batch": 0,
    "features": False,
    "probabilities": False,
    "nifti": False,
    "force": False,
}
"""Parameters of `predict` and their defaults; "" and 0 mean those of `model_config`."""
_ITEM = {"path", "image", "affine", "modality", *PARAMS}
_CONFIG_VARIABLE = "MLFLOW_PYFUNC_INFERENCE_CONFIG"
_FETCH_S = 60.0


class Bundle:
    """Masks from a segmenter, features of the deepest level from an encoder, a class or a number from others.

    `predict` has no type hints, which MLflow would read as a schema (and none can say "a path or an array"), and is not
    in the class that derives from MLflow's, where it would ask for them at every load.
    """

    def load_context(self, context: Any) -> None:
        """Build the network on the accelerator when there is one; `model_config={"device": "cpu"}` says otherwise.

        `model_config={"force": True}` predicts what is far from all that the model learned from, instead of refusing.

        Raises:
            MlflowException: `model_config`, or MLflow's variable for it, has a key that there is not.
        """
        self._root = Path(context.artifacts["bundle"])
        self._config = dict(CONFIG)
        for name, settings in (
            (_CONFIG_VARIABLE, json.loads(os.environ.get(_CONFIG_VARIABLE) or "{}")),
            ("model_config", context.model_config or {}),
        ):
            _refuse_unknown(name, settings, set(CONFIG))
            self._config |= settings
        self._portable = _portable(self._root)
        self._predictors: dict[tuple[str | None, int], Any] = {}
        self._predictor(self._config["device"], self._config["batch"])

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Mask or features of one volume, or a list of them, one an item.

        Args:
            context: MLflow's.
            model_input: A path or URL of a `.nii` or `.nii.gz` file; a dict with `path`, or with `image` (I, J, K) and
                `affine` (4, 4) as nibabel reads them, and with `modality` or parameters for this volume alone; a list
                of either; or a table, which MLflow's scoring server makes of lists.
            params: See `PARAMS`.

        Returns:
            Of each volume the mask (I, J, K), of an encoder its features (E, D, H, W), of a classifier a dict of
            `class` and `p(NAME)` of each class, of a regressor one of its column and value. With parameters that
            ask for more a dict of `mask`, `probabilities` (I, J, K, classes) and `features`. With `nifti` masks and
            probabilities are gzipped NIfTI files in base64.

        Raises:
            MlflowException: a key or a parameter that there is not, and whatever the code of the bundle refuses.
        """
        _refuse_unknown("params", params or {}, set(PARAMS))
        if hasattr(model_input, "columns"):
            rows = [{k: v for k, v in row.items() if not _absent(v)} for row in model_input.to_dict("records")]
            model_input = [row if set(row) & _ITEM else next(iter(row.values()), "") for row in rows]
        if isinstance(model_input, np.ndarray) and model_input.dtype.kind in "OUS":
            model_input = model_input.ravel().tolist()
        if isinstance(model_input, (list, tuple)):
            return [self._one(item, params or {}) for item in model_input]
        return self._one(model_input, params or {})

    def _one(self, item: Any, params: Mapping[str, Any]) -> Any:
        try:
            return self._result(item if isinstance(item, dict) else {"path": item}, params)
        except self._portable.errors.TomoscaleError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error

    def _result(self, item: Mapping[str, Any], params: Mapping[str, Any]) -> Any:
        if ("path" in item) == ("image" in item) or set(item) - _ITEM:
            raise self._portable.predictor.ConfigError(
                "dictionary",
                expected="`image` (I, J, K) and its `affine` (4, 4), or `path`, and nothing else but `modality`,"
                f" {', '.join(PARAMS)}",
                found=", ".join(sorted(map(str, item))) or "nothing",
                remedy="give both, or the path of a file",
            )
        options = {**PARAMS, **params, **{key: _scalar(item[key]) for key in PARAMS if key in item}}
        predictor = self._predictor(
            options["device"] or self._config["device"], int(options["batch"]) or int(self._config["batch"])
        )
        # The code of a bundle from before knows none of these arguments.
        how: dict[str, Any] = {"force": True} if bool(options["force"]) or self._config["force"] else {}
        how |= {"modality": str(_scalar(item["modality"]))} if "modality" in item else {}
        with _local(item) as (source, affine):
            if predictor.kind in ("classifier", "regressor"):
                if odd := [name for name in ("probabilities", "features", "nifti") if options[name]]:
                    raise self._portable.predictor.ConfigError(
                        odd[0], expected="a segmenter", found=f"a {predictor.kind}, whose result has all that it gives"
                    )
                assess = importlib.import_module(f"{self._portable.__name__}.head.assess").assess
                return dict(assess(predictor, source, affine, **how))
            if predictor.kind != "segmenter":
                if options["probabilities"] or options["nifti"]:
                    raise self._portable.predictor.ConfigError(
                        "probabilities and nifti", expected="a segmenter", found=f"an {predictor.kind}"
                    )
                return predictor.features(source, affine, **how)
            if not (options["probabilities"] or options["features"] or options["nifti"]):
                return predictor.predict(source, affine, **how)
            result: dict[str, Any] = {}
            if options["probabilities"]:
                result["mask"], result["probabilities"] = predictor.predict_probabilities(source, affine, **how)
            else:
                result["mask"] = predictor.predict(source, affine, **how)
            if options["nifti"]:
                matrix = self._portable.nifti.read_nifti(source).affine if affine is None else affine
                for name in result:
                    result[name] = _nifti(self._portable.nifti.write_nifti, result[name], matrix)
            if options["features"]:
                result["features"] = predictor.features(source, affine, **how)
            return result

    def _predictor(self, device: str | None, batch: int) -> Any:
        """The model on a device; each is built once."""
        key = (device, batch)
        if key not in self._predictors:
            more = {} if batch == CONFIG["batch"] else {"batch": batch}
            self._predictors[key] = self._portable.Predictor(self._root, device, **more)
        return self._predictors[key]


class BundleModel(Bundle, PythonModel):
    """What MLflow loads."""


def _refuse_unknown(name: str, settings: Any, allowed: set[str]) -> None:
    unknown = sorted(set(settings) - allowed) if isinstance(settings, dict) else [repr(settings)]
    if unknown:
        raise MlflowException.invalid_parameter_value(
            f"{name}; expected {', '.join(sorted(allowed))}; found {', '.join(map(str, unknown))}; correct the name"
        )


def _scalar(value: Any) -> Any:
    """A number or a text, which MLflow may have made an array of."""
    return value.ravel()[0].item() if isinstance(value, np.ndarray) and value.size == 1 else value


def _absent(value: Any) -> bool:
    """Whether a table has nothing there, for which pandas writes NaN."""
    return isinstance(value, float) and value != value


@contextmanager
def _local(item: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """An array and its affine, or a path; of a URL the path of a copy that is gone afterwards."""
    if "image" in item:
        affine = item.get("affine")
        yield np.asarray(item["image"]), None if affine is None else np.asarray(affine, dtype=np.float64)
        return
    place = str(_scalar(item["path"]))
    url = urlparse(place)
    if "://" not in place:
        yield place, None
        return
    with tempfile.TemporaryDirectory(prefix="tomoscale-scan-") as folder:
        name = Path(url.path).name or "scan.nii"
        target = Path(folder) / name
        try:
            if url.scheme in ("http", "https"):
                with urllib.request.urlopen(place, timeout=_FETCH_S) as answer, target.open("wb") as file:
                    shutil.copyfileobj(answer, file)
            else:
                from mlflow.artifacts import download_artifacts

                target = Path(download_artifacts(place, dst_path=folder))
        except (OSError, MlflowException, ImportError, ValueError) as error:
            raise MlflowException.invalid_parameter_value(
                f"{place}; expected a file that this machine can fetch; found {error}; check the URL and its rights"
            ) from error
        yield str(target), None


def _nifti(write: Any, array: Any, affine: Any) -> Any:
    """Arrays (I, J, K) as a gzipped NIfTI file in base64; of (I, J, K, classes) one for each class."""
    if array.ndim == 4:
        return [_nifti(write, np.ascontiguousarray(array[..., k]), affine) for k in range(array.shape[3])]
    with tempfile.TemporaryDirectory(prefix="tomoscale-nifti-") as folder:
        path = Path(folder) / "volume.nii.gz"
        write(path, array, affine)
        return base64.b64encode(path.read_bytes()).decode()


def _portable(root: Path) -> Any:
    """The bundle's own code, as a package named by its digest."""
    name = "tomoscale_portable_" + hashlib.sha256((root / "bundle.json").read_bytes()).hexdigest()[:16]
    if name not in sys.modules:
        folder = root / "tomoscale_portable"
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        if spec is None or spec.loader is None:
            raise ImportError(f"no code in {folder}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


set_model(BundleModel())
