"""A study that fits a data set, from the facts of its manifest, and the pre-training that comes after it.

Whole structures in a patch, and axes halved so that voxels of the deepest map are about as long as they are wide (the
rules of nnU-Net's planner, Isensee et al. 2021); the recipe is what helped in this project's own studies.
"""

import math
import textwrap
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml
from pydantic import Field

from jobs.configs import PretrainConfig
from jobs.configs.study import StudyConfig, merged
from ssl_core.config import Config, Name, parse
from storage.errors import ConfigError, RefusedInput
from storage.format.manifest import Manifest
from storage.format.records import VolumeRecord

Triple = tuple[int, int, int]
Lengths = tuple[float, float, float]

_LARGE = 200_000
"""Voxels from which on a patch is one for a GPU, and the network four times as wide; our choice."""
_MOST_RECORDS = 200
"""Volumes whose facts are looked at, evenly over the manifest."""
_HALVINGS, _LEAST_MAP = 3, 3
"""Of the network; bf16 kernels of CPUs are wrong on maps of two slices."""
_MARGIN = 1.1
"""Length of a patch over that of the structure in it."""
_HELD = 0.8
"""Share of a structure's length below which the comment names a coarser spacing."""
_COUNTS = (1, 2, 5, 10)
_SCORED = 8
"""Most subjects that a setting is scored on; of few, all that two labels leave."""


class ProposalConfig(Config):
    """What a proposed study is to be of."""

    label: Name = Field("label", description="name of the label array that is learned")
    voxels: int = Field(
        24_000,
        ge=4096,
        description="most voxels of a patch: 24 000 are a fiftieth of a second a patch, forward and back, of one core"
        " that multiplies in bf16; from 200 000 on the network has four times the features, for a GPU",
    )


@dataclass(frozen=True)
class Fit:
    """What a patch of a data set is.

    Attributes:
        patch_DHW: Its voxels.
        strides: Of each level of the network, D, H, W.
        structure_DHW: Voxels of the box about the class that has the largest; nine of ten volumes do not exceed it.
        spacing_mm: Median voxel, D, H, W.
        coarser_mm: Spacing at which a patch of as many voxels would hold the structure.
    """

    patch_DHW: Triple
    strides: tuple[Triple, ...]
    structure_DHW: Lengths
    spacing_mm: Lengths
    coarser_mm: Lengths

    @property
    def held_DHW(self) -> Lengths:
        """Share of the structure's length that a patch holds, D, H, W, at most 1."""
        d, h, w = (min(1.0, p / s) for p, s in zip(self.patch_DHW, self.structure_DHW, strict=True))
        return d, h, w


def fit(records: list[VolumeRecord], label: str, voxels: int) -> Fit:
    """Patch and strides for volumes with labels.

    Args:
        records: Their facts; each has a box.
        label: Name of the label array.
        voxels: Most of a patch.
    """
    shape = np.median([record.shape_DHW for record in records], axis=0)
    spacing = np.median([record.spacing_mm for record in records], axis=0)
    structure = np.minimum(np.percentile([_box(record, label) for record in records], 90, axis=0), shape)
    size = np.minimum(structure * _MARGIN, shape)
    for _ in range(8):  # an axis that reaches the volume's end leaves its share to the others
        grown = size * (voxels / size.prod()) ** (1 / 3)
        size = np.minimum(grown, shape) if grown.prod() > size.prod() else grown
    strides = _strides(size, spacing)
    patch = _rounded(size, np.prod(strides, axis=0), voxels)
    coarser = _coarser(structure * spacing * _MARGIN, spacing, voxels)
    return Fit(_triple(patch), tuple(map(_triple, strides)), _lengths(structure), _lengths(spacing), _lengths(coarser))


def propose(manifest: Manifest, url: str, config: ProposalConfig) -> str:
    """A study as YAML, with comments that say where its sizes come from.

    Args:
        manifest: Of the volumes.
        url: Their store.
        config: What it is to be of.

    Raises:
        ConfigError: volumes so small that no view of them can be hidden in part.
        RefusedInput: too few labelled subjects to train, to search and to test.
    """
    label, voxels = config.label, config.voxels
    rows = manifest.select(split="train", labelled=label)
    subjects = manifest.subjects()
    trained, tested, idle = (
        len({subjects[row] for row in manifest.select(split=split, labelled=label)})
        for split in ("train", "test", "val")
    )
    if trained < 3 or not tested:
        names = sorted({name for row in _spread(len(manifest)) for name in _label_names(manifest, row)})
        raise RefusedInput(
            f"labelled subjects of {url}",
            expected=f"three of the train split and one of the test split with label {label!r}",
            found=f"{trained} and {tested}; labels there: {', '.join(names) or 'none'}",
            remedy="give the label's name with label=NAME, ingest more labelled volumes, or with other split fractions",
        )
    records = [manifest.record(int(rows[i])) for i in _spread(len(rows))]
    records = [record for record in records if record.label(label).boxes]
    if not records:
        raise RefusedInput(
            f"label {label!r} of {url}", expected="volumes with a voxel above 0", found="background alone in all seen"
        )
    fitted = fit(records, label, voxels)
    data = _study(fitted, url, config, trained, records[0].channels)
    parse(StudyConfig, data, "the proposed study")
    return _page(fitted, data, trained, tested, idle, len(records))


def kept(config: StudyConfig, start: str) -> str:
    """The pre-training of a start as a job of its own, YAML for `tomoscale pretrain`.

    Raises:
        ConfigError: no such start, or one that the study does not pre-train.
    """
    origin = config.starts.get(start)
    if origin is None or origin.pretrain is None:
        trained = ", ".join(name for name, other in config.starts.items() if other.pretrain is not None)
        found = "no such start" if origin is None else "one that is not pre-trained by it"
        raise ConfigError(f"start {start!r}", expected=f"one that the study pre-trains: {trained}", found=found)
    data = {"name": _name(f"{config.name}-{start}"), "data": config.data, **merged(config.pretrain, origin.pretrain)}
    parse(PretrainConfig, data, "the pre-training")
    return _yaml(data)


def _box(record: VolumeRecord, label: str) -> Lengths:
    boxes = np.array(record.label(label).boxes)  # (values, 2, 3)
    lengths = boxes[:, 1] - boxes[:, 0]
    return _lengths(lengths[lengths.prod(axis=1).argmax()])


def _strides(size: Any, spacing: Any) -> list[Any]:
    """Of each level: an axis is halved while its voxels are no more than twice as long as the shortest."""
    strides = [np.ones(3, dtype=int)]
    size, spacing = np.array(size), np.array(spacing)
    for _ in range(_HALVINGS):
        stride = np.where((spacing < 2 * spacing.min()) & (size >= 2 * _LEAST_MAP), 2, 1)
        strides.append(stride)
        size, spacing = size / stride, spacing * stride
    return strides


def _rounded(size: Any, total: Any, voxels: int) -> Any:
    """Multiples of what the network divides by: none below its least map, and as many voxels as the budget has."""
    patch = np.maximum(size // total, _LEAST_MAP) * total
    while True:
        short = [axis for axis in np.argsort(patch / size) if patch[axis] < size[axis]]
        larger = [patch + total * (np.arange(3) == axis) for axis in short]
        grown = next((each for each in larger if each.prod() <= voxels), None)
        if grown is None:
            return patch
        patch = grown


def _coarser(structure_mm: Any, spacing: Any, voxels: int) -> Any:
    """Spacing, no finer than `spacing`, at which so many voxels hold the structure; the finest axes give way first."""
    low, high = float(spacing.min()), float(spacing.max() + structure_mm.max())
    for _ in range(60):
        middle = (low + high) / 2
        fits = (structure_mm / np.maximum(spacing, middle)).prod() <= voxels
        low, high = (low, middle) if fits else (middle, high)
    return np.maximum(spacing, np.ceil(high * 10) / 10)


def _study(fitted: Fit, url: str, config: ProposalConfig, trained: int, channels: int) -> dict[str, Any]:
    counts = [count for count in _COUNTS if count <= trained - max(1, min(_SCORED, trained // 3))]
    different = min(math.comb(trained, count) for count in counts)  # draws that train on other subjects
    large = config.voxels >= _LARGE
    precision = {"precision": "bf16"} if not large and _bf16_kernels() else {}
    strides = [list(stride) if len(set(stride)) > 1 else stride[0] for stride in fitted.strides]
    crops = {"size_DHW": list(fitted.patch_DHW), "scale": [0.8, 1.2], "min_overlap": 0.3, "flip": [0, 0, 0]}
    return {
        "name": _name(url),
        "data": url,
        "label": config.label,
        "pretrain": {
            "method": {
                "name": "aligned",
                "w_consistency": 0,
                "w_position": 1,
                "crops": {**crops, "intensity": "strong"},
            },
            "backbone": {
                "name": "dynunet",
                "arguments": {
                    **({"in_channels": channels} if channels > 1 else {}),
                    "filters": [32, 64, 128, 256] if large else [8, 16, 32, 64],
                    "strides": strides,
                    "kernel_size": [3] * len(strides),
                },
            },
            "stream": {"global_batch": 4},
            "engine": {"steps": 3000, "warmup_steps": 100, "lr": 2e-3, "channels_last": True, **precision},
        },
        "starts": {"scratch": {}, "place": {"pretrain": {}}},
        "labels": counts,
        "draws": min(8, different),
        "pretrainings": 2,
        "primary_labels": counts[:2],
        "search": {
            "lr": [2e-3, 5e-3, 1e-2],
            "widen": 2,
            "steps": [300],
            "draws": min(4, different),
            "subjects": min(_SCORED, trained - max(counts[:2])),
            "labels": counts[:1],
        },
        "finetune": {
            "epochs": 4,
            "batch": 4,
            "patch_DHW": list(fitted.patch_DHW),
            "flip": [0, 0, 0],
            "warmup_steps": 10,
            "channels_last": True,
            **precision,
        },
    }


def _page(fitted: Fit, data: dict[str, Any], trained: int, tested: int, idle: int, seen: int) -> str:
    held = ", ".join(f"{share:.0%}" for share in fitted.held_DHW)
    spacing, coarser = (" x ".join(f"{mm:g}" for mm in each) for each in (fitted.spacing_mm, fitted.coarser_mm))
    box = " x ".join(f"{length:.0f}" for length in fitted.structure_DHW)
    notes = [
        f"Does pre-training help on {data['data']}? {trained} labelled subjects to train and search, {tested} to test.",
        f"Voxels are {spacing} mm (D x H x W). The box about the largest class has {box} of them, or fewer, in nine of"
        f" ten of the {seen} volumes whose facts were seen; a patch holds {held} of its length along D, H, W.",
    ]
    if idle:
        notes += [
            f"{idle} labelled subjects of the val split take no part: settings are searched in the train split. To use"
            " them, ingest to another store with 'split=[0.7,0,0.3]'.",
        ]
    if min(fitted.held_DHW) < _HELD:
        sizes = ",".join(f"{mm:g}" for mm in fitted.coarser_mm)
        notes += [
            f"A patch would hold all of it at {coarser} mm. Ingest to another store with 'spacing_mm=[{sizes}]', or"
            " give voxels=N to a machine that can train on a larger patch.",
        ]
    notes += [
        "The network learns to restore hidden blocks and to tell where in the scan each voxel lies. Take w_position out"
        " where scans show different parts of the body.",
        "300 steps of fine-tuning save time. On two sets 900 gained for each start: search.steps=[300,900] tries both.",
        "How long it would take on this machine: tomoscale study CONFIG --measure",
        "A look on validation draws first, which leaves the test shut: tomoscale study CONFIG until=search",
    ]
    head = "".join(f"{textwrap.fill(note, 110, initial_indent='# ', subsequent_indent='#   ')}\n" for note in notes)
    return head + _yaml(data)


def _yaml(data: dict[str, Any]) -> str:
    return str(yaml.dump(data, sort_keys=False, default_flow_style=None, width=120))


def _bf16_kernels() -> bool:
    """Whether this machine's processor multiplies in bf16."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        flags = file.read()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _label_names(manifest: Manifest, row: int) -> list[str]:
    return [label.name for label in manifest.record(row).labels]


def _spread(count: int) -> list[int]:
    """Up to `_MOST_RECORDS` of so many rows, evenly."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, _MOST_RECORDS))}) if count else []


def _name(url: str) -> str:
    words = "".join(c if c.isascii() and c.isalnum() else "-" for c in url.rstrip("/").rpartition("/")[2]).strip("-")
    return words.lower() or "study"


def _triple(values: Any) -> Triple:
    d, h, w = (int(value) for value in values)
    return d, h, w


def _lengths(values: Any) -> Lengths:
    d, h, w = (float(value) for value in values)
    return d, h, w
