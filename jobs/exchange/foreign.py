"""`tomoscale models import`: a checkpoint of another trainer becomes an encoder's bundle, by a mapping that says all.

Nothing is guessed: each tensor of the file is renamed by a rule or dropped by one, and each tensor of the encoder, and
of the decoder where the mapping asks for it, is given one of its name and shape.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field
from torch import Tensor

from jobs.exchange.torch_files import read_torch
from ssl_core.bundle import write_bundle
from ssl_core.bundle_card import BundleFacts
from ssl_core.config import Config
from ssl_core.networks import Backbone, build
from ssl_core.networks.weights import load_exact
from ssl_core.views.intensity import IntensityPolicy
from storage.errors import ConfigError, RefusedInput

TOOLS = {"nnunet": "network_weights", "nnssl": "network_weights"}
"""Tools, and the key below which their checkpoints keep the weights."""


class Network(Config):
    """The network that takes the weights."""

    name: str = Field("resenc", description="registered backbone")
    arguments: dict[str, Any] = Field(default_factory=dict, description="its arguments")


class ImportMap(Config):
    """What a YAML file given to `--map` says."""

    name: str = Field(description="what the model is called in its card")
    backbone: Network = Network()
    rename: dict[str, str] = Field(
        default_factory=lambda: {"encoder.": "encoder."},
        description="beginnings of names in the file, and what stands in their place; the longest that fits counts",
    )
    drop: tuple[str, ...] = Field(("decoder.",), description="beginnings of names that are left out")
    decoder: bool = Field(
        False, description="take the decoder too, but for its output layers, for fine-tuning with transfer"
    )
    patch_DHW: tuple[int, int, int] = Field(description="sliding window, voxels; a multiple of the network's stride")
    spacing_mm: tuple[float, float, float] | None = Field(
        None, description="D, H, W that the encoder was trained at; empty: each volume's own"
    )
    intensity: IntensityPolicy = IntensityPolicy(kind="zscore")
    notes: tuple[str, ...] = Field((), description="lines for the card: data, licence, citation")


def import_checkpoint(file: Path, tool: str, mapping: ImportMap, target: Path) -> Path:
    """Write an encoder's bundle of a checkpoint's weights.

    Args:
        file: Written by `torch.save`; nothing in it is executed.
        tool: One of `TOOLS`.
        mapping: Whose tensors go where.
        target: Folder to create.

    Raises:
        ConfigError: the target exists, a backbone that cannot be built, or a tensor that no rule names.
        RefusedInput: no checkpoint of the tool, or one that would execute something.
        WeightsError: tensors missing, left over or of another shape; nothing is written.
    """
    weights = _weights(file, read_torch(file), TOOLS[tool])
    backbone = build(mapping.backbone.name, **mapping.backbone.arguments)
    renamed = _renamed(file, weights, mapping)
    keys = _keys(backbone, renamed)
    if mapping.decoder:
        keys = list(dict.fromkeys([*keys, *backbone.decoder_keys()]))
    load_exact(backbone.net, renamed, keys)
    facts = BundleFacts(
        name=mapping.name,
        patch_DHW=mapping.patch_DHW,
        intensity=mapping.intensity,
        spacing_mm=mapping.spacing_mm,
        lineage={
            "imported_from": tool,
            "imported_file": file.name,
            "imported_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        },
        notes=(
            f"Imported from {tool}: its volumes may have lain in another orientation, and what it learned from is not"
            " recorded.",
            *mapping.notes,
        ),
    )
    return write_bundle(target, "encoder", backbone, facts, decoder=mapping.decoder)


def _weights(file: Path, data: Any, key: str) -> dict[str, Tensor]:
    weights = data.get(key) if isinstance(data, Mapping) else None
    if not isinstance(weights, Mapping) or not weights or not all(isinstance(t, Tensor) for t in weights.values()):
        keys = ", ".join(sorted(map(str, data))[:8]) if isinstance(data, Mapping) else type(data).__name__
        raise RefusedInput(
            str(file), expected=f"a checkpoint with tensors below {key!r}", found=keys, remedy="check the file"
        )
    return {str(name): tensor for name, tensor in weights.items()}


def _renamed(file: Path, weights: Mapping[str, Tensor], mapping: ImportMap) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        rules = [old for old in (*mapping.rename, *mapping.drop) if name.startswith(old)]
        if not rules:
            raise ConfigError(
                f"{file}: tensor {name}",
                expected="a rule of `rename` or `drop` for it",
                found="none",
                remedy=f"add `drop: [{name}]` or a beginning of it to the map, or rename it",
            )
        rule = max(rules, key=len)
        if rule not in mapping.rename:
            continue
        new = mapping.rename[rule] + name.removeprefix(rule)
        if new in renamed:
            raise ConfigError(f"{file}: tensor {name}", expected="a name of its own", found=f"{new} again")
        renamed[new] = tensor
    return renamed


def _keys(backbone: Backbone, renamed: Mapping[str, Tensor]) -> list[str]:
    """Names of the encoder's tensors; nnU-Net's decoder has them a second time, which a file may leave out."""
    keys, second = backbone.encoder_keys(), "decoder.encoder."
    return keys if any(name.startswith(second) for name in renamed) else [k for k in keys if not k.startswith(second)]
