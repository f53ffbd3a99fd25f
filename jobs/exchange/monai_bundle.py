"""A bundle of MONAI: `monai.bundle` loads it, and `python -m monai.bundle run` segments a folder with it.

```
configs/metadata.json     what MONAI asks of a bundle
configs/inference.json    network, preprocessing, sliding windows, postprocessing, evaluator
configs/preprocess.json   the preprocessing of training, as it lies in the bundle
models/model.pt           state dict of the stock network, loaded with `weights_only=True`
tomoscale_monai/          the transforms that the configuration names, and the portable code that they call
docs/                     the model card
```
"""

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jobs.exchange.model import Model
from jobs.exchange.torch_files import read_torch, write_torch
from ssl_core.bundle import write_code
from ssl_core.portable.network import PACKAGES
from storage.errors import ConfigError

CODE = "tomoscale_monai"
_WEIGHTS = "models/model.pt"


def write(model: Model, folder: Path) -> list[str]:
    """The folder of a bundle of MONAI.

    Raises:
        ConfigError: an encoder, which has no masks to write, or a 2-D network, whose class takes no volumes.
    """
    if model.predictor.kind != "segmenter" or model.predictor.dims != 3:
        raise ConfigError(
            f"{model.predictor.card['name']} as a bundle of MONAI",
            expected="a 3-D segmenter",
            found=f"a {model.predictor.dims}-D {model.predictor.kind}",
            remedy="export an encoder with `--to safetensors` or `--to torchscript`, or fine-tune it first",
        )
    for name in ("configs", "models", "docs"):
        (folder / name).mkdir()
    write_torch(folder / _WEIGHTS, model.predictor.network.state_dict())
    (folder / CODE).mkdir()
    (folder / CODE / "__init__.py").write_text(
        Path(__file__).with_name("monai_code.py").read_text(encoding="utf-8").replace("ssl_core.portable", ".portable"),
        encoding="utf-8",
    )
    write_code(folder / CODE / "portable")
    _dump(folder / "configs/preprocess.json", model.predictor.plan.dump())
    _dump(folder / "configs/metadata.json", _metadata(model))
    _dump(folder / "configs/inference.json", _inference(model))
    card = model.root / "MODEL_CARD.md"
    if card.is_file():
        (folder / "docs/README.md").write_bytes(card.read_bytes())
    model.write_card(folder, "monai", file=_WEIGHTS)
    from monai.bundle.config_parser import ConfigParser

    parser = ConfigParser()
    parser.read_config(str(folder / "configs/inference.json"))
    network = parser.get_parsed_content("network_def")
    network.load_state_dict(read_torch(folder / _WEIGHTS))
    model.check("a bundle of MONAI", type(model.outputs)(network.eval(), 3, ()))
    run = "python -m monai.bundle run --config_file {folder}/configs/inference.json --bundle_root {folder}"
    notes = [f"{run} --dataset_dir SCANS --output_dir MASKS, with pytorch-ignite and fire installed"]
    if axes := model.predictor.inference.mirror:
        notes.append(f"it predicts without the windows mirrored along {', '.join(axes)} that the bundle averages over")
    return notes


def _inference(model: Model) -> dict[str, Any]:
    plan, architecture = model.predictor.plan, model.predictor.architecture
    arguments = {key: _expression(value) for key, value in architecture["arguments"].items()}
    return {
        "imports": ["$import glob", "$import os", "$import torch"],
        "bundle_root": ".",
        "dataset_dir": "@bundle_root",
        "output_dir": "$@bundle_root + '/eval'",
        "force": False,
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "images": "$sorted(glob.glob(os.path.join(@dataset_dir, '*.nii*')))",
        "network_def": {"_target_": architecture["class"], **arguments},
        "network": "$@network_def.to(@device)",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {
                    "_target_": "LoadImaged",
                    "keys": "image",
                    "dtype": None,  # integers stay what they are, as ingest reads them
                    "image_only": True,
                    "ensure_channel_first": True,
                },
                {
                    "_target_": f"{CODE}.PrepareVolumed",
                    "keys": "image",
                    "plan": "$@bundle_root + '/configs/preprocess.json'",
                    "force": "@force",
                },
            ],
        },
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': image} for image in @images]",
            "transform": "@preprocessing",
        },
        "dataloader": {
            "_target_": "DataLoader",
            "dataset": "@dataset",
            "batch_size": 1,
            "shuffle": False,
            "num_workers": 0,
        },
        "inferer": {
            "_target_": "SlidingWindowInferer",
            "roi_size": list(plan.patch_DHW),
            "sw_batch_size": 4,
            "overlap": 0.5,
            "mode": "gaussian",
            "sigma_scale": 0.125,
        },
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {
                    "_target_": f"{CODE}.FinishMaskd",
                    "keys": "pred",
                    "plan": "$@bundle_root + '/configs/preprocess.json'",
                },
                {"_target_": f"{CODE}.SaveMaskd", "keys": "pred", "output_dir": "@output_dir"},
            ],
        },
        "handlers": [
            {
                "_target_": "CheckpointLoader",
                "load_path": f"$@bundle_root + '/{_WEIGHTS}'",
                "load_dict": {"model": "@network"},
            }
        ],
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
        },
        "run": ["$@evaluator.run()"],
    }


def _expression(value: Any) -> Any:
    """An argument of the stock class as MONAI's configurations write it."""
    if isinstance(value, dict) and list(value) == ["torch.nn"]:
        return f"$torch.nn.{value['torch.nn']}"
    if isinstance(value, list | tuple):
        return f"${_tuple(value)!r}"
    if isinstance(value, str) and re.match(r"[$@%]", value):
        raise ConfigError("argument of the network", expected="no text with $, @ or % in front", found=repr(value))
    return value


def _tuple(value: Any) -> Any:
    return tuple(map(_tuple, value)) if isinstance(value, list | tuple) else value


def _metadata(model: Model) -> dict[str, Any]:
    plan, name = model.predictor.plan, str(model.predictor.card["name"])
    packages = {package: version(package) for package in PACKAGES[model.predictor.architecture["class"]]}
    labels = {str(index): label for index, (_, label) in enumerate(plan.labels)}
    return {
        "version": "1.0.0",
        "changelog": {"1.0.0": "exported by tomoscale"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch").partition("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {
            "pytorch-ignite": "0.5.5",
            "fire": "0.7.1",  # the command line of MONAI
            "nibabel": version("nibabel"),
            "scipy": version("scipy"),
            **{package: number for package, number in packages.items() if package != "monai"},
        },
        "supported_apps": {},
        "name": name,
        "task": "segmentation",
        "description": f"{name}: see docs/README.md",
        "authors": "see docs/README.md",
        "copyright": "see docs/README.md",
        "intended_use": "research, not clinical use",
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "magnitude",
                    "modality": ", ".join(filter(None, plan.training.modalities)) if plan.training else "n/a",
                    "num_channels": plan.channels,
                    "spatial_shape": list(plan.patch_DHW),
                    "dtype": "float32",
                    "value_range": [],
                    "is_patch_data": True,
                    "channel_def": {str(c): "image" for c in range(plan.channels)},
                }
            },
            "outputs": {
                "pred": {
                    "type": "image",
                    "format": "segmentation",
                    "num_channels": len(plan.labels),
                    "spatial_shape": list(plan.patch_DHW),
                    "dtype": "float32",
                    "value_range": [],
                    "is_patch_data": True,
                    "channel_def": labels,
                }
            },
        },
    }


def _dump(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
