"""Volumes of made-up anatomy, for tests and benchmarks of stores."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from storage.format.layout import Layout
from storage.format.manifest import Manifest
from storage.format.volume import Membership, Provenance, Volume
from storage.format.volume_writer import write_volume
from storage.objects import open_store


def phantom(shape_DHW: Sequence[int], seed: int = 0, channels: int = 1) -> npt.NDArray[np.int16]:
    """A CT-like volume (C, D, H, W) in HU: air, a body of soft tissue, bones, and noise of 12 HU.

    It compresses about as real CT does, which neither constants nor plain noise do.
    """
    generator = np.random.default_rng(seed)
    axes = [np.linspace(-1, 1, n, dtype=np.float32) for n in shape_DHW]
    z, y, x = np.meshgrid(*axes, indexing="ij", sparse=True)
    out = np.empty((channels, *shape_DHW), dtype=np.int16)
    for c in range(channels):
        values = np.full(tuple(shape_DHW), -1000, dtype=np.float32)
        values[(x / 0.85) ** 2 + (y / 0.7) ** 2 + (z / 1.2) ** 2 < 1] = 40
        for _ in range(12):
            centre, radius = generator.uniform(-0.6, 0.6, 3), generator.uniform(0.08, 0.3)
            inside = (z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2 < radius**2
            values[inside] = generator.choice([-80.0, 10.0, 60.0, 120.0, 700.0])
        noise = generator.standard_normal(values.shape, dtype=np.float32) * 12
        out[c] = np.clip(values + np.where(values > -900, noise, 0), -1024, 3071).astype(np.int16)
    return out


def phantom_label(image_CDHW: npt.NDArray[np.int16]) -> npt.NDArray[np.uint8]:
    """A label (D, H, W) of a phantom: 1 for soft tissue above 50 HU, 2 for bone."""
    label: npt.NDArray[np.uint8] = np.digitize(image_CDHW[0], [51, 401]).astype(np.uint8)
    return label


def publish_phantoms(
    url: str,
    shapes_DHW: Sequence[Sequence[int]],
    *,
    layout: Layout | None = None,
    channels: int = 1,
    labelled: bool = True,
) -> tuple[Manifest, dict[str, npt.NDArray[np.int16]]]:
    """Write and publish one phantom a shape, two thirds of them for training; returns manifest and arrays by id."""
    store = open_store(url)
    records, arrays = [], {}
    for i, shape in enumerate(shapes_DHW):
        name = f"phantom-{i:03d}"
        arrays[name] = phantom(shape, seed=i, channels=channels)
        records.append(
            write_volume(
                store,
                name,
                Volume(
                    arrays[name],
                    spacing_mm=(2.0, 0.8, 0.8),
                    affine=np.diag([0.8, 0.8, 2.0, 1.0]),
                    labels={"tissue": phantom_label(arrays[name])} if labelled else {},
                    modality="CT",
                ),
                membership=Membership(subject=f"subject-{i:03d}", split="test" if i % 3 == 2 else "train"),
                provenance=Provenance(reader="phantom"),
                layout=layout,
            )
        )
    manifest = Manifest.from_records(records, {"name": "phantoms"})
    manifest.write(store)
    return manifest, arrays
