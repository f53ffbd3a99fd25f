"""Configurations of the demo, sized for two cores: a 16-channel U-Net and few steps."""

from collections.abc import Mapping
from typing import Any

BACKBONE = {"name": "basic_unet", "arguments": {"features": [16, 16, 32, 64, 128, 16]}}
PATCH = [32, 48, 32]


def pretrain(name: str, data: str, runs: str, **changes: Any) -> dict[str, Any]:
    """PGL on small crops; the feature level is the stride-8 one, so that most of the encoder learns."""
    return {
        "name": name,
        "data": data,
        "runs": runs,
        "model": f"{name}-encoder",
        "method": {
            "name": "pgl",
            "crops": {"size_DHW": PATCH, "scale": [1.0, 1.2], "min_overlap": 0.3, "flip": [0, 0, 0.5]},
            "feature_level": 3,
            "hidden": 256,
            "out": 128,
        },
        "backbone": BACKBONE,
        "stream": {"global_batch": 8},
        "engine": {
            "steps": 60,
            "warmup_steps": 6,
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
