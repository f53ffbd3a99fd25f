"""nnU-Net: a checkpoint that its released version and its main branch fine-tune, and the network for its plans.

A released nnU-Net (2.8) wants, with `nnUNetv2_train -pretrained_weights`, each tensor of the network but those of the
output layers, by name and shape: a segmenter has them, and an encoder whose decoder was trained with it. The main
branch's `nnUNetv2_preprocess_like_nnssl` and `nnUNetv2_train_pretrained` take an encoder alone, by the adaptation plan
of nnssl checkpoints.
"""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from jobs.exchange.model import Model
from jobs.exchange.torch_files import write_torch
from ssl_core.bundle import DECODER, WEIGHTS
from ssl_core.networks.weights import LoadReport, compare
from ssl_core.portable.safetensors import read_safetensors
from storage.errors import ConfigError

FILE, CONFIGURATION = "checkpoint_final.pth", "configuration.json"
HEADS = ".seg_layers."
"""In the names of output layers, which nnU-Net draws anew in every fine-tuning."""
_UNETS = "dynamic_network_architectures.architectures.unet."
_PLACES: dict[str, dict[str, Any]] = {
    f"{_UNETS}ResidualEncoderUNet": {
        "key_to_encoder": "encoder.stages",
        "key_to_stem": "encoder.stem",
        "keys_to_in_proj": ["encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"],
    },
    f"{_UNETS}PlainConvUNet": {
        "key_to_encoder": "encoder.stages",
        "key_to_stem": "encoder.stages.0",
        "keys_to_in_proj": ["encoder.stages.0.0.convs.0.conv", "encoder.stages.0.0.convs.0.all_modules.0"],
    },
}
"""By class of network: where an encoder and its first layers lie, as the adaptation plan says it."""
_LAYERS = {  # torch.nn's names as nnU-Net's plans have them
    "Conv": "torch.nn.modules.conv.",
    "InstanceNorm": "torch.nn.modules.instancenorm.",
    "BatchNorm": "torch.nn.modules.batchnorm.",
    "Dropout": "torch.nn.modules.dropout.",
}
_IMPORTED = ("conv_op", "norm_op", "dropout_op", "nonlin")


def write(model: Model, folder: Path) -> list[str]:
    """`checkpoint_final.pth`, `configuration.json`, `card.json` and `MODEL_CARD.md`.

    Raises:
        ConfigError: another network than resenc and plain_unet, or tensors that are not those of its stock class.
    """
    if model.predictor.architecture["class"] not in _PLACES:
        raise ConfigError(
            f"{model.predictor.card['name']} for nnU-Net",
            expected=f"one of nnU-Net's networks, {' or '.join(_PLACES)}",
            found=str(model.predictor.architecture["class"]),
            remedy="pre-train with `backbone.name=resenc` or `plain_unet`",
        )
    weights = read_safetensors(model.root / WEIGHTS)
    if DECODER in model.predictor.card["files"]:
        weights |= read_safetensors(model.root / DECODER)
    report = _beside_heads(model, weights)
    plan = adaptation_plan(model)
    write_torch(folder / FILE, {"network_weights": weights, "citations": [], "nnssl_adaptation_plan": plan})
    text = json.dumps(configuration(model), indent=1) + "\n"
    (folder / CONFIGURATION).write_text(text, encoding="utf-8")
    model.write_card(folder, "nnunet", file=FILE, nnssl_adaptation_plan=plan)
    main = f"nnUNetv2_preprocess_like_nnssl -d ID -n NAME -pc {{folder}}/{FILE}, then nnUNetv2_train_pretrained"
    if report.missing:
        released = (
            f"a released nnU-Net (2.8) cannot start from it: -pretrained_weights needs the decoder's"
            f" {len(report.missing)} tensors too, and this bundle has an encoder alone; export a segmenter, or an"
            f" encoder with {DECODER}"
        )
    else:
        released = (
            f"a released nnU-Net (2.8): put {{folder}}/{CONFIGURATION} into the plans, then nnUNetv2_train"
            f" -pretrained_weights {{folder}}/{FILE}; all {len(report.matched)} tensors beside the output layers match"
        )
    return [released, f"nnU-Net's main branch: {main}"]


def _beside_heads(model: Model, weights: dict[str, Tensor]) -> LoadReport:
    """The rule of a released nnU-Net, on the class that it builds; an encoder alone lacks the decoder and no more.

    Raises:
        ConfigError: anything else does not match.
    """
    network = model.predictor.network
    needed = [key for key in network.state_dict() if HEADS not in key]
    report = compare(network, {key: tensor for key, tensor in weights.items() if HEADS not in key}, needed)
    alone = set(needed) - set(model.predictor.architecture["encoder_keys"])
    if report.complete or (set(report.missing) == alone and not report.unexpected and not report.mismatched):
        return report
    raise ConfigError(
        f"{model.predictor.card['name']} for nnU-Net",
        expected="the tensors of its stock network, or of that one's encoder, and no others",
        found=str(report),
        remedy="pull the bundle again, or train it again",
    )


def configuration(model: Model) -> dict[str, Any]:
    """A configuration for nnU-Net's plans that builds this network, all else as in the full resolution one."""
    plan, dims = model.predictor.plan, model.predictor.dims
    architecture = adaptation_plan(model)["architecture_plans"]
    return {
        "inherits_from": "3d_fullres" if dims == 3 else "2d",
        "patch_size": list(plan.patch_DHW[-dims:]),
        "architecture": {
            "network_class_name": architecture["arch_class_name"],
            "arch_kwargs": architecture["arch_kwargs"],
            "_kw_requires_import": architecture["arch_kwargs_requiring_import"],
        },
    }


def adaptation_plan(model: Model) -> dict[str, Any]:
    """`nnssl_adaptation_plan`: how nnU-Net builds the network, and where its encoder lies in the weights."""
    plan, arguments = model.predictor.plan, model.predictor.architecture["arguments"]
    skipped = ("input_channels", "num_classes", "deep_supervision")  # nnU-Net gives its own
    spacing = None if plan.spacing_mm is None else list(plan.spacing_mm)
    window = list(plan.patch_DHW)
    return {
        "architecture_plans": {
            "arch_class_name": model.predictor.architecture["class"],
            "arch_kwargs": {
                "dropout_op": None,
                "dropout_op_kwargs": None,
                **{key: _plain(value) for key, value in arguments.items() if key not in skipped},
                **{key: _by_axis(arguments[key], model.predictor.dims) for key in ("kernel_sizes", "strides")},
            },
            "arch_kwargs_requiring_import": list(_IMPORTED),
        },
        "pretrain_plan": {"configurations": {"tomoscale": {"spacing": spacing, "patch_size": window}}},
        "pretrain_num_input_channels": plan.channels,
        "pretrain_patch_size": window,
        "recommended_downstream_patchsize": window,
        **_PLACES[model.predictor.architecture["class"]],
        "key_to_lpe": None,
    }


def _plain(value: Any) -> Any:
    """Layers by their import path, tuples as lists."""
    if isinstance(value, dict) and list(value) == ["torch.nn"]:
        name = str(value["torch.nn"])
        place = next((place for prefix, place in _LAYERS.items() if name.startswith(prefix)), "torch.nn.")
        return f"{place}{name}"
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _by_axis(values: Any, dims: int) -> list[list[int]]:
    """A size a stage, one number an axis: nnU-Net's deep supervision reads strides so."""
    return [[int(value)] * dims if isinstance(value, int) else [int(n) for n in value] for value in values]
