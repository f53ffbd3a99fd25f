"""What a bundle says of its model: the facts that its maker gives, and the card that a person reads."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ssl_core.portable.card import read_json
from ssl_core.portable.head.settings import Head
from ssl_core.portable.inference.settings import PLAIN, Inference
from ssl_core.portable.network import PACKAGES
from ssl_core.portable.preprocess import Preprocess
from ssl_core.portable.training_data import TrainingData
from ssl_core.views.intensity import IntensityPolicy
from storage.errors import ConfigError
from storage.format.records import VolumeRecord
from storage.intensity_stats import STATS_ORDER

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
            `stored_spacing`.
        interpolation: How they are resampled.
        training: The volumes it learned from, see `training_data`; None says nothing of them.
        inference: What prediction does with the network's output.
        head: Of a classifier or a regressor.
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
    head: Head | None = None
    lineage: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    evaluation: Mapping[str, Any] | None = None
    notes: Sequence[str] = ()


def stored_spacing(
    records: Iterable[VolumeRecord],
) -> tuple[tuple[float, float, float] | None, Literal["linear", "bspline"]]:
    """Spacing that ingest resampled these volumes to, and how; None where it kept each volume's own.

    Raises:
        ConfigError: some were resampled, and yet their spacings differ.
    """
    spacings: list[tuple[float, ...]] = []
    ways = set()
    for record in records:
        spacing = tuple(round(s, 6) for s in record.spacing_mm)
        # Ingest leaves a volume as it is whose header, often float32, is within rounding of the spacing wanted.
        near = any(all(abs(a - b) <= 1e-5 * b for a, b in zip(spacing, other, strict=True)) for other in spacings)
        if not near and len(spacings) < 5:
            spacings.append(spacing)
        ways |= {note.rpartition(", ")[2] for note in record.notes if note.startswith("resampled from ")}
    if not ways:
        return None, "linear"
    if len(spacings) > 1 or len(ways) > 1:
        raise ConfigError(
            "spacing of the training volumes",
            expected="one spacing, as some of them were resampled",
            found=", ".join(map(str, sorted(spacings)[:4])),
            remedy="ingest all volumes with one policy",
        )
    d, h, w = spacings.pop()
    return (d, h, w), "bspline" if ways == {"bspline"} else "linear"


def training_data(records: Iterable[VolumeRecord]) -> TrainingData:
    """What of its training volumes a bundle records, from their manifest.

    Raises:
        ValueError: no volume.
    """
    volumes = list(records)
    if not volumes:
        raise ValueError("no training volume")
    spacings = np.array([record.spacing_mm for record in volumes])
    sources = np.array([_source_spacing(record) for record in volumes])
    fields = spacings * np.array([record.shape_DHW for record in volumes])
    channels = range(min(record.channels for record in volumes))
    return TrainingData(
        volumes=len(volumes),
        modalities=tuple(sorted({record.modality for record in volumes})),
        spacing_mm=_range(spacings),
        source_mm=_range(sources),
        field_mm=_range(fields),
        intensities=tuple(
            {
                key: (min(record.stats[c][key] for record in volumes), max(record.stats[c][key] for record in volumes))
                for key in STATS_ORDER
            }
            for c in channels
        ),
    )


def _source_spacing(record: VolumeRecord) -> tuple[float, ...]:
    """The spacing before ingest resampled the volume, which is in its notes only."""
    for note in record.notes:
        match = re.match(r"resampled from ([\d.e+-]+)x([\d.e+-]+)x([\d.e+-]+) to ", note)
        if match:
            return tuple(map(float, match.groups()))
    return record.spacing_mm


def _range(triples: NDArray[np.float64]) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    (a, b, c), (x, y, z) = triples.min(axis=0).tolist(), triples.max(axis=0).tolist()
    return (a, b, c), (x, y, z)


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
        kind: One of `ssl_core.portable.card.KINDS`.
        facts: What the bundle says.
        plan: Its preprocessing.
        stock_class: Import path of the network's class.
        tensors: Its weights by name.
    """
    count = sum(t.numel() for t in tensors.values())
    verb = {"segmenter": "mask", "encoder": "features"}.get(kind, "result")
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
    if kind != "encoder":
        lines += [
            f"From this directory, with torch, {needed} installed:",
            "",
            "```bash",
            f"python -m {CODE} . volume.nii.gz {'mask.nii.gz' if facts.head is None else 'result.csv'}",
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
    if facts.head is not None:
        lines += ["## Output", "", *_output(facts.head), ""]
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


def _output(head: Head) -> list[str]:
    """What its numbers mean, and how a volume becomes one."""
    pooling = f"the means over positions of the {head.levels} deepest encoder levels, averaged over windows"
    if head.classes:
        return [f"- class of `{head.column}` and a probability of each, of one linear layer on {pooling}",
                *(f"- class: {name}" for name in head.classes)]  # fmt: skip
    learned = f"{head.mean:.4g}, standard deviation {head.sd:.4g}"
    return [f"- `{head.column}`, in the unit of its column, of one linear layer on {pooling}",
            f"- mean over the training subjects {learned}"]  # fmt: skip


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
