"""A study of two minutes, to see every part of it at work: tiny networks, so its numbers mean nothing."""

from typing import Any

from jobs.configs.study import StudyConfig, merged
from ssl_core.config import parse, resolved

_CROP = [16, 24, 16]
_FINETUNE: dict[str, Any] = {"epochs": 2, "batch": 2, "patch_DHW": _CROP, "warmup_steps": 2}
_SIZE: dict[str, Any] = {
    "draws": 3,
    "pretrainings": 1,
    "search": {"lr": [5e-3, 2e-2], "steps": [8], "draws": 1, "subjects": 1, "labels": []},
    "validation": 1,
    "test_limit": 3,
}
_SHORT = {"engine": {"steps": 6, "warmup_steps": 1, "checkpoint_every": 3, "log_every": 1}}
_STEPS = 12
"""Of a start's own pre-training, at most."""


def simulated() -> StudyConfig:
    """Two starts and two counts on the simulated cohort."""
    pretrain = {
        "method": {"name": "aligned", "crops": {"size_DHW": _CROP, "min_overlap": 0.3}},
        "backbone": {
            "name": "resenc",
            "arguments": {
                "n_blocks_per_stage": [1, 1, 1],
                "features_per_stage": [4, 8, 16],
                "n_conv_per_stage_decoder": [1, 1],
            },
        },
        "stream": {"global_batch": 2, "lanes": 8},
        **_SHORT,
    }
    return parse(
        StudyConfig,
        {
            "name": "smoke",
            "data": "s3://volumes/simulated",
            "source": "simulated",
            "pretrain": pretrain,
            "starts": {"scratch": {}, "aligned": {"pretrain": {}}},
            "labels": [1, 2],
            "finetune": _FINETUNE,
            **_SIZE,
        },
        "the built-in study",
    )


def shrunk(config: StudyConfig) -> StudyConfig:
    """The same study with two of its starts, two counts and a few steps, under a name of its own."""
    data = resolved(config)
    other = next(name for name in config.starts if name != config.reference)
    starts = {name: data["starts"][name] for name in (config.reference, other)}
    for start in starts.values():
        if start["pretrain"] and "steps" in start["pretrain"].get("engine", {}):
            engine = start["pretrain"]["engine"]
            start["pretrain"]["engine"] = {**engine, "steps": min(engine["steps"], _STEPS)}
        start["trained"]["steps"] = min(start["trained"]["steps"], 2)
        if start["supervised"]:
            start["supervised"] |= {"subjects": 2, "steps": 4}
    data |= _SIZE | {
        "name": f"{config.name}-smoke",
        "starts": starts,
        "labels": data["labels"][:2],
        "primary": [],
        "primary_labels": [],
        "halves": False,
        "pretrain": merged(data["pretrain"], _SHORT),
        "finetune": {**data["finetune"], "epochs": 2, "warmup_steps": 2},
    }
    return parse(StudyConfig, data, f"a smaller {config.name}")
