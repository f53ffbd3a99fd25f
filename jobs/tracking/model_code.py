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
        """Build the network on the accelerator when there is one; `model_config={"device": "cpu"}` says otherwise."""
        root = Path(context.artifacts["bundle"])
        self._predictor = _portable(root).Predictor(root, (context.model_config or {}).get("device"))

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Mask or features of one volume, or a list of them, one an item.

        Args:
            context: MLflow's.
            model_input: A path of a `.nii` or `.nii.gz` file; a dict with `image` (I, J, K) and `affine` (4, 4), as
                nibabel reads them; a list of either; or a table, which MLflow's scoring server makes of lists.
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
        if isinstance(item, dict):
            return run(np.asarray(item["image"]), np.asarray(item["affine"], dtype=np.float64))
        return run(str(item))


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
