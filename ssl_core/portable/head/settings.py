"""`head.json` and `head.safetensors`: what an encoder's pooled features are mapped to, and how."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..card import read_json
from ..errors import RefusedInput
from ..safetensors import read_safetensors

SETTINGS, WEIGHTS = "head.json", "head.safetensors"


@dataclass(frozen=True)
class Head:
    """A linear layer on pooled features, and what its outputs mean.

    Attributes:
        column: Column of the manifest that it learned; of a regression its values carry its unit.
        levels: Deepest encoder levels whose maps are averaged over positions and joined, finest of them first.
        classes: Names of the classes, in the order of the outputs; empty for a regression.
        mean: Of a regression: value that the output 0 stands for, in the column's unit.
        sd: Of a regression: value of one unit of the output.
        weight_KE: Weights (outputs, features).
        bias_K: Biases.
    """

    column: str
    levels: int
    classes: tuple[str, ...]
    mean: float
    sd: float
    weight_KE: Tensor
    bias_K: Tensor

    @property
    def kind(self) -> Literal["classifier", "regressor"]:
        """Kind of the bundle that has it."""
        return "classifier" if self.classes else "regressor"

    @property
    def names(self) -> tuple[str, ...]:
        """What a row of results says of a scan: the class and the probability of each, or the value."""
        return ("class", *(f"p({name})" for name in self.classes)) if self.classes else (self.column,)

    def dump(self) -> dict[str, Any]:
        """The object of `head.json`."""
        meaning = {"classes": list(self.classes)} if self.classes else {"mean": self.mean, "sd": self.sd}
        return {"column": self.column, "levels": self.levels, **meaning}

    def tensors(self) -> dict[str, Tensor]:
        """What `head.safetensors` holds."""
        return {"weight": self.weight_KE, "bias": self.bias_K}

    def outputs(self, features_BE: Tensor) -> Tensor:
        """Logits of the classes, or standardised values, (B, K)."""
        return torch.nn.functional.linear(features_BE, self.weight_KE.to(features_BE), self.bias_K.to(features_BE))

    def row(self, outputs_K: Tensor) -> dict[str, str | float]:
        """What outputs of one scan mean, by `names`.

        The class is the most probable one, of equals the first.
        """
        if not self.classes:
            return {self.column: float(outputs_K[0].double() * self.sd + self.mean)}
        shares = torch.softmax(outputs_K.double(), 0).tolist()
        most = shares.index(max(shares))
        return dict(zip(self.names, (self.classes[most], *shares), strict=True))


def read_head(root: Path, kind: str, levels: Sequence[Mapping[str, Any]]) -> Head | None:
    """The head of a bundle; None where its kind has none.

    Args:
        root: The bundle.
        kind: Of its `bundle.json`.
        levels: Encoder levels of its `architecture.json`.

    Raises:
        RefusedInput: a file that says something else than a head of this kind and network.
    """
    if kind not in ("classifier", "regressor"):
        return None
    path = root / SETTINGS
    data, tensors = read_json(path), read_safetensors(root / WEIGHTS)
    try:
        head = Head(
            column=str(data["column"]),
            levels=int(data["levels"]),
            classes=tuple(str(name) for name in data.get("classes", ())),
            mean=float(data.get("mean", 0.0)),
            sd=float(data.get("sd", 1.0)),
            weight_KE=tensors["weight"],
            bias_K=tensors["bias"],
        )
        if not 1 <= head.levels <= len(levels) or head.kind != kind:
            raise ValueError(f"{head.levels} levels, {head.kind}")
        if not (math.isfinite(head.mean) and math.isfinite(head.sd) and head.sd > 0):
            raise ValueError(f"mean {head.mean}, sd {head.sd}")
        outputs = len(head.classes) or 1
        width = sum(int(level["channels"]) for level in levels[-head.levels :])
        if head.weight_KE.shape != (outputs, width) or head.bias_K.shape != (outputs,):
            raise ValueError(f"weights {tuple(head.weight_KE.shape)} for {outputs} outputs of {width} features")
        if not all(level["module"] for level in levels[-head.levels :]):
            raise ValueError("a level that is no module's output")
    except (KeyError, TypeError, ValueError) as error:
        raise RefusedInput(
            str(path),
            expected=f"the head of a {kind} for this network",
            found=str(error),
            remedy="pull the bundle again",
        ) from error
    return head
