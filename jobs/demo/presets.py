"""Configurations of the demo, sized for two cores: a 16-channel U-Net and few steps."""

from collections.abc import Mapping
from typing import Any

BACKBONE = {"name": "basic_unet", "arguments": {"features": [16, 16, 32, 64, 128, 16]}}
PATCH = [32, 48, 32]


def pretrain(name: str, data: str, runs: str, **changes: Any) -> dict[str, Any]:
    """Hidden blocks are restored, and the place of each voxel told: what helped with few labels in studies."""
    return {
        "name": name,
        "data": data,
        "runs": runs,
        "model": f"{name}-encoder",
        "method": {
            "name": "aligned",
            "w_consistency": 0,
            "w_position": 1,
            "crops": {
                "size_DHW": PATCH,
                "scale": [0.9, 1.2],
                "min_overlap": 0.3,
                "flip": [0, 0, 0],
                "intensity": "strong",
            },
        },
        "backbone": BACKBONE,
        "stream": {"global_batch": 4},
        "engine": {
            "steps": 80,
            "warmup_steps": 8,
            "lr": 2e-3,
            "log_every": 3,
            "checkpoint_every": 20,
            "probe_every": 20,
        },
        "cluster": {"workers": 2},
        **changes,
    }


def finetuning() -> dict[str, Any]:
    """Budget of one fine-tuning, the same in the search and after it."""
    return {"epochs": 8, "steps_per_epoch": 15, "batch": 2, "patch_DHW": PATCH}


def labelled(data: str, label: str) -> dict[str, Any]:
    """Eight labelled subjects, two of which only steer the search."""
    return {"data": data, "label": label, "subjects": 8, "inner": 2, "test_limit": 16}


def tune(name: str, data: str, label: str, runs: str, encoder: str) -> dict[str, Any]:
    """A few trials that ASHA may stop after each second epoch, one after another.

    Of trials side by side ASHA stops others from run to run, since it goes by who has reported so far.
    """
    return {
        "name": name,
        "runs": runs,
        "encoders": [encoder],
        "labelled": labelled(data, label),
        "finetune": finetuning(),
        "trials": 4,
        "concurrent": 1,
        "cpus_per_trial": 2,
        "grace_epochs": 2,
        "reduction": 3,
    }


def finetune(name: str, data: str, label: str, runs: str, encoder: str, best: Mapping[str, Any]) -> dict[str, Any]:
    """From the encoder and from random weights, three seeds each, with the settings that the search chose."""
    return {
        "name": name,
        "runs": runs,
        "starts": {"pre-trained": encoder, "from scratch": "none"},
        "labelled": labelled(data, label),
        "finetune": {**finetuning(), **{name: best[f"finetune.{name}"] for name in ("lr", "encoder_lr_scale")}},
        "seeds": [0, 1, 2],
        "concurrent": 2,
        "model": f"{name}-segmenter",
    }
