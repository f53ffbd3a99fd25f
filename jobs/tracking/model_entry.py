"""What MLflow stores of a bundle and says of it: the model, its signature, an example, the packages that it needs."""

import json
import logging
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from jobs.tracking import runs as tracking
from ssl_core.portable.head.settings import read_head
from ssl_core.portable.network import PACKAGES

_INPUTS = (
    "the path of a .nii or .nii.gz file; a dictionary of `image` (I, J, K) and `affine` (4, 4); or a list of either"
)
_LONGEST_DESCRIPTION = 4900  # characters; MLflow's databases hold 5000


def log_model(
    api: Any, bundle: Path, name: str, card: Mapping[str, Any], run_id: str | None, tags: Mapping[str, str]
) -> str:
    """Store the model under its run and create the version; returns its number.

    Args:
        api: MLflow's client.
        bundle: Directory.
        name: Registered model name.
        card: Object of its `bundle.json`.
        run_id: Run that the model belongs to; a new one when None.
        tags: Of the version.
    """
    import mlflow
    from mlflow.models import Model

    from jobs.tracking.model_params import CONFIG  # of code that imports MLflow

    plan = json.loads((bundle / "preprocess.json").read_text(encoding="utf-8"))
    packages = PACKAGES[json.loads((bundle / "architecture.json").read_text(encoding="utf-8"))["class"]]
    if run_id is None:
        run_id = tracking.open_run(api, "tomoscale", f"register {name}", "register", params={}, tags=tags)
        api.set_terminated(run_id)
    quiet()
    with tempfile.TemporaryDirectory(prefix="tomoscale-register-") as folder, warnings.catch_warnings():
        # MLflow predicts the example, of which a predictor says that it is like nothing that it learned from.
        warnings.filterwarnings("ignore", "array: ", UserWarning)
        copy = Path(folder) / "bundle"
        for file in [*card["files"], "bundle.json"]:  # what is listed, without caches of compiled code
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle / file, copy / file)
        # Beside its run: without this the artifacts would go to whatever experiment is active in this process.
        experiment = api.get_run(run_id).info.experiment_id
        logged = api.create_logged_model(experiment, name=name, source_run_id=run_id, model_type=card["kind"])
        info = Model.log(
            None,
            mlflow.pyfunc,
            model_id=logged.model_id,
            registered_model_name=name,
            run_id=run_id,
            python_model=str(Path(__file__).with_name("model_code.py")),
            artifacts={"bundle": str(copy)},
            model_config=dict(CONFIG),
            signature=_signature(card, plan, _names(bundle, card["kind"])),
            tags=dict(tags),  # with the version, so that no death leaves one without them
            input_example=_example(plan),
            pip_requirements=[f"{package}=={_public(package)}" for package in ("mlflow", "torch", *packages)],
            metadata={"tomoscale_kind": card["kind"], "tomoscale_inputs": _INPUTS},
        )
    return str(info.registered_model_version)


def describe(api: Any, bundle: Path, name: str, version: str) -> None:
    """The model card as the version's description, which MLflow's pages render, with links to where it comes from."""
    text = (bundle / "MODEL_CARD.md").read_text(encoding="utf-8")
    links = "\n".join(_links(api, json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))["lineage"]))
    links = f"\n## Links\n\n{links}\n" if links else ""
    if len(text) + len(links) > _LONGEST_DESCRIPTION:
        most = _LONGEST_DESCRIPTION - len(links)
        text = text[:most].rpartition("\n")[0] + "\n\n(The rest is in the bundle's MODEL_CARD.md.)\n"
    if api.get_model_version(name, version).description != text + links:
        api.update_model_version(name, version, description=text + links)


def _links(api: Any, lineage: Mapping[str, str]) -> Iterator[str]:
    """Within MLflow's pages: the model that it was trained from, and its run."""
    from mlflow.exceptions import MlflowException

    parent = re.fullmatch(r"models:/(?P<name>[^/@]+)/(?P<version>\d+)", lineage.get("parent", ""))
    if parent:
        yield f"- trained from [{parent[0]}](#/models/{quote(parent['name'])}/versions/{parent['version']})"
    if run_id := lineage.get("run_id"):
        try:
            experiment = api.get_run(run_id).info.experiment_id
        except MlflowException:  # of another server, or deleted
            return
        yield f"- by [its run](#/experiments/{experiment}/runs/{run_id})"


def _names(bundle: Path, kind: str) -> tuple[str, ...]:
    """What a result of a classifier or a regressor names; nothing of others."""
    levels = json.loads((bundle / "architecture.json").read_text(encoding="utf-8"))["levels"]
    head = read_head(bundle, kind, levels)
    return () if head is None else head.names


def _signature(card: Mapping[str, Any], plan: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The output and the parameters, and no schema of inputs.

    A path, an array with its affine and lists of both are all inputs, which no schema of MLflow's says; and under one
    that allows anything MLflow turns each voxel of an array into a Python number.
    """
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec

    from jobs.tracking.model_params import params_schema

    if names:
        kinds = [DataType.string if name == "class" and card["kind"] == "classifier" else DataType.double
                 for name in names]  # fmt: skip
        columns: list[ColSpec | TensorSpec] = [ColSpec(kind, name) for kind, name in zip(kinds, names, strict=True)]
        return ModelSignature(outputs=Schema(columns), params=params_schema())
    if card["kind"] == "segmenter":
        values = [label["value"] for label in plan["labels"]]
        output = TensorSpec(np.dtype(np.uint8 if max(values) < 256 else np.int32), (-1, -1, -1), "mask")
    else:
        output = TensorSpec(np.dtype(np.float32), (-1, -1, -1, -1), "features")
    return ModelSignature(outputs=Schema([output]), params=params_schema())


def _example(plan: Mapping[str, Any]) -> dict[str, Any]:
    """A small ball in the dark, brightest inside, in file order."""
    i, j, k = np.meshgrid(*(np.arange(n) for n in (12, 12, 12)), indexing="ij")
    squared = (i - 5.5) ** 2 + (j - 5.5) ** 2 + (k - 5.5) ** 2
    ball = np.clip(100 - 4 * squared, 0, None).astype(np.float32)  # of one value it would be refused
    image = ball if plan["channels"] == 1 else np.stack([ball] * int(plan["channels"]), axis=-1)
    # It is like no scan: a model that knows what it learned from would refuse it. MLflow wants all values as arrays.
    return {"image": image, "affine": np.eye(4), **({"force": np.array([True])} if plan.get("training") else {})}


def _public(package: str) -> str:
    """Installed version without a local part such as `+cpu`, which no index has."""
    return installed(package).partition("+")[0]


def quiet() -> None:
    """No progress bars where no terminal shows them, and no log of every file that is tried again."""
    for name in ("store.artifact.http_artifact_repo", "utils.file_utils"):
        logging.getLogger(f"mlflow.{name}").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
