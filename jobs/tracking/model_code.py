"""The MLflow model: a script that MLflow stores beside the bundle and runs where the model is loaded.

It imports nothing of this project. The code that predicts lies in the bundle and is loaded from there under a name of
its own, so that two versions of a model in one process each run the code they were registered with.
"""

import hashlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class Bundle:
    """Masks from a segmenter, features of the deepest level from an encoder.

    `predict` has no type hints, which MLflow would read as a schema (and none can say "a path or an array"), and is not
    in the class that derives from MLflow's, where it would ask for them at every load.
    """

    def load_context(self, context: Any) -> None:
        """Build the network on the accelerator when there is one; `model_config={"device": "cpu"}` says otherwise.

        `model_config={"force": True}` predicts what is far from all that the model learned from, instead of refusing.
        """
        root, settings = Path(context.artifacts["bundle"]), context.model_config or {}
        self._portable = _portable(root)
        self._predictor = self._portable.Predictor(root, settings.get("device"))
        self._force = bool(settings.get("force"))

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Mask or features of one volume, or a list of them, one an item.

        Args:
            context: MLflow's.
            model_input: A path of a `.nii` or `.nii.gz` file; a dict with `image` (I, J, K) and `affine` (4, 4), as
                nibabel reads them, and `force` where a refusal is not wanted; a list of either; or a table, which
                MLflow's scoring server makes of lists.
            params: None are known.
        """
        if hasattr(model_input, "columns"):
            rows = model_input.to_dict("records")
            return [self._one(row if "image" in row else next(iter(row.values()))) for row in rows]
        if isinstance(model_input, np.ndarray) and model_input.dtype.kind in "OUS":
            model_input = model_input.ravel().tolist()
        if isinstance(model_input, (list, tuple)):
            return [self._one(item) for item in model_input]
        return self._one(model_input)

    def _one(self, item: Any) -> Any:
        run = self._predictor.predict if self._predictor.kind == "segmenter" else self._predictor.features
        force = self._force or (isinstance(item, dict) and bool(np.any(item.get("force", False))))
        options = {"force": True} if force else {}  # the code of a bundle from before knows no such argument
        if isinstance(item, dict):
            if set(item) - {"image", "affine", "force"} or "image" not in item:
                raise self._portable.predictor.ConfigError(
                    "dictionary",
                    expected="`image` (I, J, K), its `affine` (4, 4), and nothing else but `force`",
                    found=", ".join(sorted(map(str, item))) or "nothing",
                    remedy="give both, or the path of a file",
                )
            affine = item.get("affine")
            return run(
                np.asarray(item["image"]), None if affine is None else np.asarray(affine, dtype=np.float64), **options
            )
        return run(str(item), **options)


class BundleModel(Bundle, PythonModel):
    """What MLflow loads."""


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
