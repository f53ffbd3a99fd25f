"""nnU-Net: a checkpoint with the adaptation plan that nnU-Net's fine-tuning from nnssl checkpoints reads.

Keys are those that nnU-Net's `nnUNetv2_preprocess_like_nnssl` and `nnUNetv2_train_pretrained` look up. Of a segmenter
the whole network is written, so that `nnUNetv2_train -pretrained_weights` takes it too.
"""

from pathlib import Path
from typing import Any

from jobs.exchange.model import Model
from jobs.exchange.torch_files import write_torch
from ssl_core.portable.safetensors import read_safetensors
from storage.errors import ConfigError

FILE = "checkpoint_final.pth"
CLASS = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
_LAYERS = {  # torch.nn's names as nnU-Net's plans have them
    "Conv": "torch.nn.modules.conv.",
    "InstanceNorm": "torch.nn.modules.instancenorm.",
    "BatchNorm": "torch.nn.modules.batchnorm.",
    "Dropout": "torch.nn.modules.dropout.",
}
_IMPORTED = ("conv_op", "norm_op", "dropout_op", "nonlin")


def write(model: Model, folder: Path) -> list[str]:
    """`checkpoint_final.pth`, `card.json` and `MODEL_CARD.md`.

    Raises:
        ConfigError: another network than resenc.
    """
    if model.predictor.architecture["class"] != CLASS:
        raise ConfigError(
            f"{model.predictor.card['name']} for nnU-Net",
            expected=f"nnU-Net's residual encoder, {CLASS}",
            found=str(model.predictor.architecture["class"]),
            remedy="pre-train with `backbone.name=resenc`",
        )
    weights = read_safetensors(model.root / "weights.safetensors")
    plan = adaptation_plan(model)
    write_torch(folder / FILE, {"network_weights": weights, "citations": [], "nnssl_adaptation_plan": plan})
    model.write_card(folder, "nnunet", file=FILE, nnssl_adaptation_plan=plan)
    notes = [f"nnUNetv2_preprocess_like_nnssl -d ID -n NAME -pc {{folder}}/{FILE}, then nnUNetv2_train_pretrained"]
    if model.predictor.kind == "segmenter":
        notes.append(f"with plans of the same architecture also nnUNetv2_train -pretrained_weights {{folder}}/{FILE}")
    return notes


def adaptation_plan(model: Model) -> dict[str, Any]:
    """`nnssl_adaptation_plan`: how nnU-Net builds the network, and where its encoder lies in the weights."""
    plan, arguments = model.predictor.plan, model.predictor.architecture["arguments"]
    skipped = ("input_channels", "num_classes", "deep_supervision")  # nnU-Net gives its own
    spacing = None if plan.spacing_mm is None else list(plan.spacing_mm)
    window = list(plan.patch_DHW)
    return {
        "architecture_plans": {
            "arch_class_name": CLASS,
            "arch_kwargs": {
                "dropout_op": None,
                "dropout_op_kwargs": None,
                **{key: _plain(value) for key, value in arguments.items() if key not in skipped},
            },
            "arch_kwargs_requiring_import": list(_IMPORTED),
        },
        "pretrain_plan": {"configurations": {"tomoscale": {"spacing": spacing, "patch_size": window}}},
        "pretrain_num_input_channels": plan.channels,
        "pretrain_patch_size": window,
        "recommended_downstream_patchsize": window,
        "key_to_encoder": "encoder.stages",
        "key_to_stem": "encoder.stem",
        "keys_to_in_proj": ["encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"],
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
