"""Bundles: a directory with everything that using a model takes, and nothing that executes on being read but code.

```
bundle.json           format, kind, name, lineage, metrics, SHA-256 of every other file
weights.safetensors   tensors under the stock network's own names, each once; its metadata names those that share one
decoder.safetensors   of an encoder whose method trained the decoder with it: that, with nothing of the output layer
architecture.json     stock class and arguments, backbone name and arguments, levels, names of the encoder's tensors
preprocess.json       axes, spacing, intensity policy, channels, window, label values and names, what it learned from
head.json             of a classifier or a regressor: column, levels that are pooled, classes, or mean and sd
head.safetensors      of a classifier or a regressor: weights and biases of its linear layer
evaluation.json       split, measure and score of each held-out case, where there was an evaluation
MODEL_CARD.md         for people
tomoscale_portable/   the code of `ssl_core.portable`, as it was when the bundle was written
```

A bundle is written only if the portable code, reading the files back, computes what the backbone computes.
"""

import hashlib
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import ssl_core.portable as portable
import storage.errors
import storage.geometry
import storage.intensity_stats
import storage.nifti_header
from ssl_core.bundle_card import CODE, BundleFacts, model_card
from ssl_core.networks import Backbone, build
from ssl_core.networks.registry import architecture as architecture_of
from ssl_core.portable import network as portable_network
from ssl_core.portable.card import WITH_HEAD, WITH_INFERENCE
from ssl_core.portable.head import settings as head_files
from ssl_core.portable.head.assess import window_features
from ssl_core.portable.head.pooling import pooled
from ssl_core.portable.inference.settings import PLAIN
from ssl_core.portable.predictor import FORMAT, Predictor, check_bundle
from ssl_core.portable.preprocess import Preprocess
from ssl_core.portable.safetensors import read_safetensors, same_tensors
from storage.errors import ConfigError, RefusedInput

WEIGHTS, DECODER = "weights.safetensors", "decoder.safetensors"
_BORROWED = {
    "errors.py": storage.errors,
    "intensity_stats.py": storage.intensity_stats,
    "grid.py": storage.geometry,
    "nifti_header.py": storage.nifti_header,
}
"""Modules of the portable package that only re-export, and the file that takes their place in a bundle."""


def write_bundle(
    target: str | os.PathLike[str],
    kind: Literal["encoder", "segmenter", "classifier", "regressor"],
    backbone: Backbone,
    facts: BundleFacts,
    *,
    decoder: bool = False,
) -> Path:
    """Write a bundle directory, whole or not at all.

    Args:
        target: Directory to create; must not exist.
        kind: `segmenter` keeps all tensors, others those of the encoder; the last two have `facts.head`.
        backbone: In any mode, on any device; left as it is.
        facts: The rest.
        decoder: Whether an encoder's bundle also has the decoder, for a fine-tuning that starts from both.

    Raises:
        ConfigError: the target exists, the network is not one that its package alone can rebuild, labels do not fit the
            number of output channels, the kind is not the head's, or the portable code computes something else.
    """
    path = Path(target)
    if path.exists():
        raise ConfigError(str(path), expected="a new directory", found="one that exists", remedy="choose another name")
    if _class_of(backbone) not in portable_network.PACKAGES:
        raise ConfigError(
            f"bundle {facts.name}",
            expected="a network that its package alone can rebuild: " + ", ".join(portable_network.PACKAGES),
            found=_class_of(backbone),
            remedy="choose another backbone; checkpoints of this one are not affected",
        )
    outputs = _ports(backbone)[1]
    if kind == "segmenter" and len(facts.labels) != outputs:
        raise ConfigError(f"bundle {facts.name}", expected=f"{outputs} labels", found=str(facts.labels))
    head = "none" if facts.head is None else facts.head.kind
    if head != (kind if kind in ("classifier", "regressor") else "none"):
        raise ConfigError(f"bundle {facts.name}", expected=f"the head of a bundle of kind {kind}", found=head)
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        _write(work, kind, backbone, facts)
        if decoder and kind == "encoder":
            _write_decoder(work, backbone)
        _write_card(work, kind, facts)
        _check(work, kind, backbone)
        work.chmod(0o755)
        os.rename(work, path)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return path


def load_backbone(bundle: str | os.PathLike[str], **changes: Any) -> Backbone:
    """The backbone of a bundle, ready to train further; a segmenter whole, others with a fresh decoder.

    Args:
        bundle: Directory.
        **changes: Arguments to change, such as `out_channels`; then only the encoder is loaded.

    Raises:
        RefusedInput: a damaged bundle, or tensors that do not match one by one.
    """
    root = Path(bundle)
    card = check_bundle(root)
    architecture = json.loads((root / "architecture.json").read_text(encoding="utf-8"))
    backbone = build(architecture["backbone"], **{**architecture["backbone_arguments"], **changes})
    keys: list[str] | None = None
    weights = read_safetensors(root / "weights.safetensors")
    if card["kind"] != "segmenter" or changes:
        keys = architecture["encoder_keys"]
        if set(keys) != set(backbone.encoder_keys()):
            raise RefusedInput(str(root), expected="the encoder of " + architecture["backbone"], found="other tensors")
        weights = {key: weights[key] for key in keys if key in weights}
    portable_network.load(str(root / "weights.safetensors"), backbone.net, weights, keys)
    return backbone


def fingerprint(bundle: str | os.PathLike[str]) -> str:
    """SHA-256 of `bundle.json`, which holds the digests of all other files."""
    return hashlib.sha256((Path(bundle) / "bundle.json").read_bytes()).hexdigest()


def _write(work: Path, kind: str, backbone: Backbone, facts: BundleFacts) -> None:
    keys = backbone.encoder_keys()
    state = backbone.net.state_dict()
    stored = list(state) if kind == "segmenter" else keys
    tensors = _save(work / WEIGHTS, state, stored)
    architecture = {
        "class": _class_of(backbone),
        "arguments": _stock_arguments(backbone),
        "dims": int(backbone.arguments.get("spatial_dims", 3)),
        "backbone": backbone.name,
        "backbone_arguments": backbone.arguments,
        "levels": [
            {"module": module, "channels": level.channels, "stride": level.stride_DHW, "offset": level.offset_DHW}
            for level, module in zip(backbone.levels, _level_modules(backbone), strict=True)
        ],
        "encoder_keys": keys,
    }
    plan = Preprocess(
        channels=_ports(backbone)[0],
        spacing_mm=facts.spacing_mm,
        interpolation=facts.interpolation,
        intensity=facts.intensity.model_dump(mode="json"),
        patch_DHW=facts.patch_DHW,
        labels=facts.labels,
        training=facts.training,
        inference=facts.inference,
    )
    if facts.head is not None:
        _dump(work / head_files.SETTINGS, facts.head.dump())
        _save(work / head_files.WEIGHTS, facts.head.tensors(), list(facts.head.tensors()))
    _dump(work / "architecture.json", architecture)
    _dump(work / "preprocess.json", plan.dump())
    (work / "MODEL_CARD.md").write_text(model_card(kind, facts, plan, _class_of(backbone), tensors), encoding="utf-8")
    if facts.evaluation is not None:
        _dump(work / "evaluation.json", facts.evaluation)
    write_code(work / CODE)


def _write_decoder(work: Path, backbone: Backbone) -> None:
    """The decoder beside the encoder: older readers know the encoder alone, and find it as it always was.

    Raises:
        ConfigError: what the file gives back is not what was written.
    """
    encoder, state = set(backbone.encoder_keys()), backbone.net.state_dict()
    keys = [key for key in backbone.decoder_keys() if key not in encoder]
    _save(work / DECODER, state, keys)
    back = read_safetensors(work / DECODER)
    odd = [key for key in keys if key not in back or not torch.equal(back[key], state[key].cpu())]
    if odd:
        raise ConfigError(f"{DECODER}", expected=f"tensor {odd[0]!r} as it is in the network", found="another")


def _save(path: Path, state: Mapping[str, Tensor], keys: list[str]) -> dict[str, Tensor]:
    """Write tensors, each once, with the names of those that share one; returns what was written."""
    others = same_tensors({key: state[key] for key in keys})
    tensors = {key: state[key].detach().cpu().contiguous().clone() for key in keys if key not in others}
    save_file(tensors, path, others)
    path.chmod(0o644)  # which it writes for its owner alone, and a container has another user
    return tensors


def _write_card(work: Path, kind: str, facts: BundleFacts) -> None:
    """`bundle.json`, last, with the digests of all other files."""
    files = sorted(p.relative_to(work).as_posix() for p in work.rglob("*") if p.is_file())
    card = {
        "format": WITH_HEAD if facts.head else FORMAT if facts.inference == PLAIN else WITH_INFERENCE,
        "kind": kind,
        "name": facts.name,
        "lineage": dict(facts.lineage),
        "metrics": dict(facts.metrics),
        "files": {name: hashlib.sha256((work / name).read_bytes()).hexdigest() for name in files},
    }
    _dump(work / "bundle.json", card)


def write_code(folder: Path) -> None:
    """The code of `ssl_core.portable` in a new folder, complete: a package that imports nothing of this project."""
    root = Path(portable.__file__).parent
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root)
        borrowed = _BORROWED.get(name.as_posix())
        text = (Path(str(borrowed.__file__)) if borrowed else file).read_text(encoding="utf-8")
        text = text.replace("from storage.errors import", "from .errors import")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def _check(work: Path, kind: str, backbone: Backbone) -> None:
    """The files, read back by the portable code, compute what the backbone computes."""
    predictor = Predictor(work, "cpu")
    parameter = next(backbone.net.parameters())
    size = [2 * m if m > 1 else 4 for m in backbone.multiple_DHW()]
    x_BCDHW = torch.randn(1, predictor.plan.channels, *size, generator=torch.Generator().manual_seed(0))
    if any(p % m for p, m in zip(predictor.plan.patch_DHW, backbone.multiple_DHW(), strict=True)):
        raise ConfigError(
            "patch_DHW", expected=f"multiples of {backbone.multiple_DHW()}", found=str(predictor.plan.patch_DHW)
        )
    training, device = backbone.net.training, parameter.device
    # Accelerators convolve in TF32 by default, which differs from float32 by more than any limit that tells networks
    # apart: both are compared where they compute alike.
    backbone.net.eval().cpu()
    try:
        with torch.no_grad():
            x_native = x_BCDHW.to(parameter.dtype)
            if kind == "segmenter":
                pairs = [(backbone.logits(x_native), predictor.forward(x_BCDHW))]
            else:
                modules = [entry["module"] for entry in predictor.architecture["levels"]]
                module_levels = [i for i, module in enumerate(modules) if module]
                maps = backbone.features(x_native)
                portable_maps = portable_network.feature_maps(
                    predictor.network, predictor.dims, [modules[i] for i in module_levels], x_BCDHW
                )
                pairs = [(maps[i], f) for i, f in zip(module_levels, portable_maps, strict=True)]
                if predictor.head is not None:
                    features = window_features(predictor, x_BCDHW)
                    pairs = [*pairs, (pooled(maps[-predictor.head.levels :]), features)]
    finally:
        backbone.net.to(device).train(training)
    for expected, actual in pairs:
        if not torch.allclose(expected.float(), actual, rtol=1e-3, atol=1e-4):
            raise ConfigError(
                f"backbone {backbone.name!r}",
                expected="a network that its stock class computes alike",
                found=f"a difference of {float((expected.float() - actual).abs().max()):.2g}",
            )


def _class_of(backbone: Backbone) -> str:
    """Public path of the stock class, where MONAI has it."""
    kind = type(backbone.net)
    package = "monai.networks.nets" if kind.__module__.startswith("monai.networks.nets.") else kind.__module__
    return f"{package}.{kind.__name__}"


def _stock_arguments(backbone: Backbone) -> dict[str, Any]:
    """Arguments of the stock class, with the defaults that the registered builder adds.

    The defaults are in the builder's signature; a builder that takes keywords only leaves them on the network.
    """
    stock_of = architecture_of(backbone.name).stock
    if stock_of is not None:
        return stock_of(dict(backbone.arguments))
    parameters = inspect.signature(architecture_of(backbone.name).make).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    if not defaults:
        stock = list(inspect.signature(type(backbone.net).__init__).parameters)[1:]
        plain = (bool, int, float, str, list, tuple)
        defaults = {k: v for k in stock if isinstance(v := getattr(backbone.net, k, None), plain)}
    return {**defaults, **backbone.arguments}


def _ports(backbone: Backbone) -> tuple[int, int]:
    """Channels in and out; 1 and 0 where the arguments do not say."""
    arguments = {**_stock_arguments(backbone), **backbone.arguments}
    inputs = arguments.get("in_channels", arguments.get("input_channels", 1))
    return int(inputs), int(arguments.get("out_channels", arguments.get("num_classes", 0)))


def _level_modules(backbone: Backbone) -> list[str]:
    """Name of the sub-module whose output each encoder level is, outermost first; empty where there is none."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs[name] = output

        return hook

    handles = [m.register_forward_hook(keep(name)) for name, m in backbone.net.named_modules() if name]
    training, parameter = backbone.net.training, next(backbone.net.parameters())
    backbone.net.eval()
    try:
        with torch.no_grad():
            size = [2 * m if m > 1 else 2 for m in backbone.multiple_DHW()]
            x = torch.randn(1, _ports(backbone)[0], *size, generator=torch.Generator().manual_seed(0))
            maps = backbone.features(x.to(parameter.device, parameter.dtype))
    finally:
        backbone.net.train(training)
        for handle in handles:
            handle.remove()
    names = []
    for level in maps:
        same = [n for n, o in outputs.items() if o.data_ptr() == level.data_ptr() and o.numel() == level.numel()]
        names.append(min(same, key=lambda n: (n.count("."), n)) if same else "")
    return names


def _dump(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
