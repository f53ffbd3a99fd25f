"""What a bundle says of its model: the facts that its maker gives, and the card that a person reads."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ssl_core.portable.card import read_json
from ssl_core.portable.inference.settings import PLAIN, Inference
from ssl_core.portable.network import PACKAGES
from ssl_core.portable.preprocess import Preprocess
from ssl_core.portable.training_data import TrainingData
from ssl_core.views.intensity import IntensityPolicy

CODE = "tomoscale_portable"
"""Import name of the portable code inside a bundle."""


@dataclass(frozen=True)
class BundleFacts:
    """What a bundle says beyond weights and architecture.

    Attributes:
        name: What the model is called in its card.
        patch_DHW: Window for prediction, voxels; a multiple of the network's stride.
        intensity: Policy the network was trained with.
        labels: (value, name) of each class, background first; empty for an encoder.
        spacing_mm: (D, H, W) of training where volumes are resampled at prediction too; None keeps their own. See
            `ssl_core.bundle.stored_spacing`.
        interpolation: How they are resampled.
        training: The volumes it learned from, see `ssl_core.bundle.training_data`; None says nothing of them.
        inference: What prediction does with the network's output.
        lineage: Data fingerprint, configuration digest, parent model version, run id and the like.
        metrics: Figures for the card, with the split they come from in their names.
        evaluation: What `jobs.tracking.promotion` compares: `split`, `measure`, and `cases` with one value each.
        notes: Lines for the card: data, licence, limits.
    """

    name: str
    patch_DHW: tuple[int, int, int]
    intensity: IntensityPolicy
    labels: tuple[tuple[int, str], ...] = ()
    spacing_mm: tuple[float, float, float] | None = None
    interpolation: Literal["linear", "bspline"] = "linear"
    training: TrainingData | None = None
    inference: Inference = PLAIN
    lineage: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    evaluation: Mapping[str, Any] | None = None
    notes: Sequence[str] = ()


def amend(bundle: Path, heading: str, text: str, metrics: Mapping[str, float]) -> None:
    """Add to the card of a bundle what came of its model after it was written.

    Args:
        bundle: Directory.
        heading: Of a new section.
        text: Markdown.
        metrics: Further figures.
    """
    path = bundle / "MODEL_CARD.md"
    path.write_text(f"{path.read_text(encoding='utf-8')}\n## {heading}\n\n{text}\n", encoding="utf-8")
    card = read_json(bundle / "bundle.json")
    card["metrics"] |= metrics
    card["files"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    content = json.dumps(card, indent=1, ensure_ascii=False) + "\n"
    (bundle / "bundle.json").write_text(content, encoding="utf-8")


def model_card(kind: str, facts: BundleFacts, plan: Preprocess, stock_class: str, tensors: Mapping[str, Tensor]) -> str:
    """Markdown for people: use, input, labels, figures, lineage and limits of a bundle.

    Args:
        kind: `encoder` or `segmenter`.
        facts: What the bundle says.
        plan: Its preprocessing.
        stock_class: Import path of the network's class.
        tensors: Its weights by name.
    """
    count = sum(t.numel() for t in tensors.values())
    verb = "mask" if kind == "segmenter" else "features"
    needed = ", ".join(PACKAGES[stock_class])
    spacing = "each volume's own" if plan.spacing_mm is None else f"resampled to {plan.spacing_mm} mm (D, H, W)"
    if plan.spacing_mm is None and plan.training is not None:
        spacing += " within that of the training volumes, else resampled to the nearest of it"
    lines = [
        f"# {facts.name}",
        "",
        f"A {kind} for 3-D medical volumes: `{stock_class}`, {len(tensors)} tensors, {count:,} values.",
        "",
        "## Use",
        "",
        f"From a registry, with mlflow, torch, {needed} installed and nothing else:",
        "",
        "```python",
        "import mlflow",
        f'{verb} = mlflow.pyfunc.load_model("models:/{facts.name}@candidate").predict("volume.nii.gz")',
        "```",
        "",
    ]
    if kind == "segmenter":
        lines += [
            f"From this directory, with torch, {needed} installed:",
            "",
            "```bash",
            f"python -m {CODE} . volume.nii.gz mask.nii.gz",
            "```",
            "",
        ]
    lines += [
        "## Input",
        "",
        f"- channels: {plan.channels}; axes are brought to RAS+ and back",
        f"- spacing: {spacing}",
        f"- intensity policy: {plan.intensity['kind']}",
        f"- window: {plan.patch_DHW} voxels (D, H, W)",
        *([f"- output: {plan.inference.text(plan.labels)}"] if plan.inference != PLAIN else []),
        "",
    ]
    if plan.training is not None:
        lines += ["## Learned from", "", *_learned_from(plan.training), ""]
    if plan.labels:
        lines += ["## Labels", "", *(f"- {value}: {name}" for value, name in plan.labels), ""]
    if facts.metrics:
        lines += ["## Figures", "", *(f"- {key}: {value:.4g}" for key, value in facts.metrics.items()), ""]
    if facts.lineage:
        lines += ["## Lineage", "", *(f"- {key}: `{value}`" for key, value in facts.lineage.items()), ""]
    lines += [
        "## Limits",
        "",
        "Made for research. Not a medical device; not validated for clinical use. Expect it to fail on scanners,",
        "sequences and anatomy that differ from its training data.",
        *(f"{note}" for note in facts.notes),
        "",
    ]
    return "\n".join(lines)


def _learned_from(data: TrainingData) -> list[str]:
    """What a scan to predict should be like."""
    lengths = {"voxels": data.spacing_mm, "voxels before ingest resampled them": data.source_mm}
    if data.source_mm == data.spacing_mm:
        del lengths["voxels before ingest resampled them"]
    lengths["field of view"] = data.field_mm
    lines = [f"- {data.volumes} volumes, modality {', '.join(name or 'not named' for name in data.modalities)}"]
    lines += [f"- {name}: {_text(low)} to {_text(high)} mm (D, H, W)" for name, (low, high) in lengths.items()]
    for c, channel in enumerate(data.intensities):
        low, high = channel["p0_5"][0], channel["p99_5"][1]
        lines.append(f"- foreground intensities of channel {c}: {low:.4g} to {high:.4g}")
    return [*lines, "- what lies far outside is refused, what lies a little outside is noted"]


def _text(triple: tuple[float, float, float]) -> str:
    return " x ".join(f"{value:.4g}" for value in triple)
