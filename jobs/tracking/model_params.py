"""What callers of a registered model may say, as MLflow records it: its configuration and its parameters."""

from typing import Any

from jobs.tracking.model_code import CONFIG as CONFIG
from jobs.tracking.model_code import PARAMS

_TYPE_OF = {bool: "boolean", int: "long", str: "string"}


def params_schema() -> Any:
    """Parameters of `predict` with their defaults, for a model's signature."""
    from mlflow.types import ParamSchema, ParamSpec

    return ParamSchema([ParamSpec(name, _TYPE_OF[type(default)], default) for name, default in PARAMS.items()])
