"""A bundle as exports see it: one network with one input and named outputs, and its card."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssl_core.portable.card import with_article
from ssl_core.portable.network import feature_maps, logits
from ssl_core.portable.predictor import Predictor
from storage.errors import ConfigError

RTOL, ATOL = 1e-3, 1e-4
"""Between two ways of computing one network in float32, as `ssl_core.bundle` has it."""


class Outputs(nn.Module):
    """The stock network with all that a bundle computes as outputs.

    Args:
        network: Stock network.
        dims: 2 or 3.
        modules: Sub-modules whose outputs are the feature maps; none gives the logits.
    """

    def __init__(self, network: nn.Module, dims: int, modules: Sequence[str]) -> None:
        super().__init__()
        self.network, self.dims, self.modules_ = network, dims, list(modules)

    def forward(self, x_BCDHW: Tensor) -> tuple[Tensor, ...]:
        """Logits (B, K, D, H, W), or one feature map a level, finest first."""
        if self.modules_:
            return tuple(feature_maps(self.network, self.dims, self.modules_, x_BCDHW))
        return (logits(self.network, self.dims, x_BCDHW),)


@dataclass(frozen=True)
class Model:
    """What an export reads.

    Attributes:
        root: Folder of the bundle.
        predictor: The bundle, on the CPU.
        outputs: Its network.
        names: Of the outputs: `logits`, or `level0` onwards.
    """

    root: Path
    predictor: Predictor
    outputs: Outputs
    names: tuple[str, ...]

    def window(self, batch: int = 1) -> Tensor:
        """A random input of the size of the sliding window, (B, C, D, H, W)."""
        size = (batch, self.predictor.plan.channels, *self.predictor.plan.patch_DHW)
        return torch.randn(size, generator=torch.Generator().manual_seed(0))

    def card(self, form: str, **more: Any) -> dict[str, Any]:
        """What a person or a program has to know of the exported network, as a JSON object."""
        architecture = self.predictor.architecture
        return {
            "form": form,
            "name": self.predictor.card["name"],
            "kind": self.predictor.kind,
            "bundle_sha256": hashlib.sha256((self.root / "bundle.json").read_bytes()).hexdigest(),
            "network": {"class": architecture["class"], "arguments": architecture["arguments"]},
            "dims": self.predictor.dims,
            "outputs": list(self.names),
            "levels": architecture["levels"],
            "encoder_keys": architecture["encoder_keys"],
            "preprocess": self.predictor.plan.dump(),
            "lineage": self.predictor.card["lineage"],
            "metrics": self.predictor.card["metrics"],
            **more,
        }

    def write_card(self, folder: Path, form: str, **more: Any) -> None:
        """`card.json` and the model card for people."""
        text = json.dumps(self.card(form, **more), indent=1, ensure_ascii=False) + "\n"
        (folder / "card.json").write_text(text, encoding="utf-8")
        source = self.root / "MODEL_CARD.md"
        if source.is_file():
            (folder / source.name).write_bytes(source.read_bytes())

    def check(self, form: str, other: Callable[[Tensor], Sequence[Tensor]], batch: int = 1) -> None:
        """Refuse an export whose outputs on a random window are not the bundle's.

        Raises:
            ConfigError: they differ, with the largest difference.
        """
        x_BCDHW = self.window(batch)
        with torch.no_grad():
            pairs = list(zip(self.outputs(x_BCDHW), other(x_BCDHW), strict=True))
        if not all(torch.allclose(one, two, rtol=RTOL, atol=ATOL) for one, two in pairs):
            largest = max(float((one - two).abs().max()) for one, two in pairs)
            raise ConfigError(
                f"{self.predictor.card['name']} as {form}",
                expected="outputs equal to the bundle's on a random window",
                found=f"a difference of {largest:.2g}",
                remedy="this network cannot be exported so; `--to safetensors` exports its weights",
            )


def open_model(bundle: Path) -> Model:
    """A bundle to export.

    Raises:
        RefusedInput: it is damaged.
        ConfigError: it has no outputs that its stock network computes, or a head that would be left out.
    """
    predictor = Predictor(bundle, "cpu")
    if predictor.head is not None:
        raise ConfigError(
            str(bundle),
            expected="a segmenter or an encoder, whose network is exported",
            found=f"{with_article(predictor.kind)}, whose head no export has",
            remedy="export the encoder that it was trained from, or use the bundle as it is",
        )
    if predictor.kind == "segmenter":
        return Model(bundle, predictor, Outputs(predictor.network, predictor.dims, ()).eval(), ("logits",))
    modules = {f"level{i}": level["module"] for i, level in enumerate(predictor.architecture["levels"])}
    modules = {name: module for name, module in modules.items() if module}
    if not modules:
        raise ConfigError(
            str(bundle), expected="a level that is a module's output", found="none", remedy="export a segmenter"
        )
    outputs = Outputs(predictor.network, predictor.dims, list(modules.values())).eval()
    return Model(bundle, predictor, outputs, tuple(modules))
