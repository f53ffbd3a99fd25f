"""`data show --html`: one page about a store: its facts, how its volumes are distributed, and what they look like."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import pyplot as plt

from jobs.pages.charts import COLOURS, INK, chart
from jobs.pages.html import Picture, page
from jobs.pages.pictures import COLOURS as OUTLINES
from jobs.pages.pictures import thumbnail
from storage.format.manifest import Manifest
from storage.format.notes import note_kinds
from storage.format.records import VolumeRecord, stats_from_items
from storage.reading.volume_store import Crop, VolumeStore

THUMBNAILS = 24
LABELS = 20
CHANNELS = 4
DOTS = 400
Floats = npt.NDArray[np.float64]


def render(store: VolumeStore, facts: Mapping[str, Any]) -> str:
    """The page.

    Args:
        store: Where the slices are read from; its manifest has the rest.
        facts: Shown as a table, in order; mappings as lists of counts.
    """
    manifest = store.manifest
    shapes = np.array(manifest.column("shape_DHW"), float)
    spacings = np.array(manifest.column("spacing_mm"), float)
    indices = evenly(len(manifest), THUMBNAILS)
    count = max(manifest.column("channels"), default=0)
    return page(
        "store.html.j2",
        url=store.url,
        manifest=manifest.fingerprint[:16],
        headline={
            "volumes": f"{len(manifest):,}",
            "subjects": f"{len(manifest.subjects()):,}",
            "voxels": _short(float(shapes.prod(1).sum())),
            "with labels": f"{sum(bool(names) for names in manifest.column('labels')):,}",
        },
        which_slices="all volumes"
        if len(indices) == len(manifest)
        else f"{len(indices)} of {len(manifest):,}, evenly spread",
        several_channels=count > 1,
        slices=_thumbnails(store, indices),
        sizes=(
            Picture(histograms(_by_axis(shapes, "{} (voxels)")), "Voxels along each axis; counts of volumes."),
            Picture(histograms(_by_axis(spacings, "{} (mm)")), "Voxel spacing along each axis, mm."),
        ),
        intensities=_intensities(manifest),
        channels=count,
        labels=_labels(manifest),
        notes=[
            (kind.volumes, kind.note, "; ".join(f"{name}: {note}" for name, note in kind.examples))
            for kind in note_kinds(zip(manifest.column("volume_id"), manifest.column("notes"), strict=True))
        ],
        facts=[
            (key, ", ".join(f"{name} {n}" for name, n in value.items()) if isinstance(value, dict) else value)
            for key, value in facts.items()
        ],
    )


def _labels(manifest: Manifest) -> Picture | None:
    """Dots of the most frequent labels; None where there is no label."""
    labels = label_volumes(manifest)
    if not labels:
        return None
    most = sorted(labels, key=lambda key: -len(labels[key]))[:LABELS]
    caption = "Millilitres of each label value, in the colour of its outline; a dot is a volume, the bar the median."
    if len(most) < len(labels):
        caption += f" The {len(most)} most frequent of {len(labels)} are shown."
    return Picture(label_figure({key: labels[key] for key in labels if key in most}), caption)


def _intensities(manifest: Manifest) -> list[Picture]:
    """A row of histograms for each channel, up to `CHANNELS` of them."""
    rows = zip(manifest.column("volume_id"), manifest.column("stats"), manifest.column("channels"), strict=True)
    stats = [stats_from_items(items, channels, f"volume {name}") for name, items, channels in rows]
    channels = max(map(len, stats), default=0)
    pictures = []
    for c in range(min(channels, CHANNELS)):
        of_channel = [volume[c] for volume in stats if c < len(volume)]
        values = {
            name: np.array([item[key] for item in of_channel], float)
            for name, key in (("0.5th percentile", "p0_5"), ("mean", "mean"), ("99.5th percentile", "p99_5"))
        }
        whose = f"channel {c} (counted from 0) of {len(of_channel):,} volumes" if channels > 1 else "each volume"
        caption = f"Of the foreground of {whose}, in units of its values (HU for CT);"
        pictures.append(Picture(histograms(values), f"{caption} outliers here are odd scans or wrong scales."))
    return pictures


def evenly(count: int, most: int) -> list[int]:
    """Up to `most` of the indices 0 to `count` - 1, first and last among them, evenly spread."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, most)).round()})


def label_volumes(manifest: Manifest) -> dict[tuple[str, int], Floats]:
    """Millilitres of each label, by (name, value), in the volumes that have it, names and values in order."""
    volumes: dict[tuple[str, int], list[float]] = defaultdict(list)
    for record in manifest.records():
        millilitres = float(np.prod(record.spacing_mm)) / 1000
        for label in record.labels:
            for value, voxels in zip(label.values, label.voxels, strict=True):
                volumes[label.name, value].append(voxels * millilitres)
    return {key: np.array(volumes[key]) for key in sorted(volumes)}


def histograms(panels: Mapping[str, Floats]) -> bytes:
    """PNG with a histogram a panel; a panel whose volumes all agree says so instead.

    Values with a long tail, such as MR of several scanners, are shown on an axis that is linear near 0 and logarithmic
    far from it.
    """
    finite = {name: values[np.isfinite(values)] for name, values in panels.items()}
    plain = {name for name, values in finite.items() if _agree(values)}
    height = 2.3 if len(plain) < len(panels) else 1.0
    drawing, axes = plt.subplots(1, len(panels), figsize=(8.4, height), squeeze=False)
    for axis, (name, values) in zip(axes[0], finite.items(), strict=True):
        axis.set_xlabel(name)
        if name in plain:
            text = f"all {values.size:,}: {values[0]:g}" if values.size else "none known"
            axis.text(0.5, 0.5, text, ha="center", va="center", color=INK, fontsize=11, transform=axis.transAxes)
            axis.set(xticks=[], yticks=[])
            axis.spines["left"].set_visible(False)
            continue
        bins: int | Floats = min(40, max(5, len(np.histogram_bin_edges(values, "auto")) - 1))
        typical = float(np.median(np.abs(values)))
        if typical > 0 and np.abs(values).max() > 50 * typical:
            low, high = np.arcsinh(np.array([values.min(), values.max()]) / typical)
            bins = typical * np.sinh(np.linspace(low, high, 25))
            axis.set_xscale("asinh", linear_width=typical)
            powers = [sign * 10.0**k for sign in (-1, 1) for k in range(-6, 13) if 10.0**k > 2 * typical]
            ticks = [t for t in (0.0, *powers) if values.min() - typical <= t <= values.max()]
            axis.set_xticks(ticks, [f"{t:g}" if abs(t) < 1e3 else _short(t) for t in ticks])
        else:
            axis.locator_params(axis="x", nbins=5)
        axis.hist(values, bins=bins, color=COLOURS[0], edgecolor="white", lw=0.5)
        axis.yaxis.get_major_locator().set_params(integer=True)
    if len(plain) < len(panels):
        axes[0][0].set_ylabel("volumes")
    return chart(drawing, list(axes[0]))


def _agree(values: Floats) -> bool:
    """Whether they are one value, but for what rounding of an affine to single precision does."""
    return values.size == 0 or bool(np.ptp(values) <= 1e-5 * np.abs(values).max())


def label_figure(labels: Mapping[tuple[str, int], Floats]) -> bytes:
    """PNG with a row of dots for each label value, on a logarithmic axis where they differ much."""
    drawing, axis = plt.subplots(figsize=(8.4, 0.9 + 0.36 * len(labels)))
    random = np.random.default_rng(0)
    for row, ((_, value), values) in enumerate(labels.items()):
        dots = values[evenly(len(values), DOTS)]
        colour = OUTLINES[(value - 1) % len(OUTLINES)]
        axis.scatter(dots, row + random.uniform(-0.22, 0.22, len(dots)), s=11, color=colour, alpha=0.6, lw=0)
        axis.plot([np.median(values)] * 2, [row - 0.34, row + 0.34], color=INK, lw=1.8)
    axis.set_yticks(range(len(labels)), [f"{name} {i}  (n = {len(v):,})" for (name, i), v in labels.items()])
    axis.set_ylim(len(labels) - 0.4, -0.6)
    largest, smallest = (f(float(f(v)) for v in labels.values()) for f in (max, min))
    if smallest > 0 and largest / smallest > 20:
        axis.set_xscale("log")
    else:
        axis.set_xlim(left=0)
    axis.set_xlabel("ml")
    return chart(drawing, [axis], grid="x")


def _thumbnails(store: VolumeStore, indices: Sequence[int]) -> list[Picture]:
    records = [store.manifest.record(i) for i in indices]
    images = store.read_many([_middle(r) for r in records])
    pictures = []
    for record, image in zip(records, images, strict=True):
        name = record.labels[0].name if record.labels else None
        mask = store.read(_middle(record), name)[0, 0] if name is not None else None
        caption = f"{record.volume_id}, slice {_middle(record).start_DHW[0]} of {record.shape_DHW[0]}"
        caption += f", {record.split}" if record.split else ""
        pictures.append(Picture(thumbnail(image[0, 0], mask, spacing_mm=record.spacing_mm[1:]), caption))
    return pictures


def _middle(record: VolumeRecord) -> Crop:
    depth, height, width = record.shape_DHW
    return Crop(record.volume_id, (depth // 2, 0, 0), (1, height, width))


def _by_axis(values: Floats, name: str) -> dict[str, Floats]:
    return {name.format(axis): values[:, i] for i, axis in enumerate("DHW")}


def _short(number: float) -> str:
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"
