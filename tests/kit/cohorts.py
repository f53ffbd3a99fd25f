"""Small volumes whose class and number are in the image: what a head can learn, and a test can hold it to."""

import numpy as np

from storage.format.columns import COLUMN_NOTE
from storage.format.manifest import Manifest
from storage.format.volume import Membership, Provenance, Volume
from storage.format.volume_writer import write_volume
from storage.objects import open_store

SHAPE = (20, 18, 22)


def image(size: float, seed: int) -> np.ndarray:
    """Smooth noise with a bright ball of a radius, anywhere near the middle."""
    random = np.random.default_rng([7, seed])
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"))
    centre = np.array(SHAPE) / 2 + random.uniform(-1.5, 1.5, 3)
    ball = ((grid - centre[:, None, None, None]) ** 2).sum(0) < size**2
    return np.asarray(random.normal(300, 15, SHAPE) + 300 * ball, np.int16)


def write_cohort(url: str, count: int, columns: dict[int, dict[str, str]] | None = None) -> Manifest:
    """Publish volumes with columns `large` (no, yes) and `size` (mm); every third one is in the test split.

    Args:
        url: Of the store.
        count: Volumes, each of a subject of its own.
        columns: Columns of some volumes, in place of theirs.
    """
    store, records = open_store(url), []
    for i in range(count):
        size = (3.0 if i // 3 % 2 else 6.0) + 0.1 * (i % 5)
        own = {"large": "yes" if size > 5 else "no", "size": f"{size:.1f}"} | (columns or {}).get(i, {})
        records.append(
            write_volume(
                store,
                f"v{i:03d}",
                Volume(image(size, i)[None], spacing_mm=(1.0, 1.0, 1.0), affine=np.eye(4), modality="MR"),
                membership=Membership(subject=f"s{i:03d}", split="test" if i % 3 == 2 else "train"),
                provenance=Provenance(
                    source=f"v{i:03d}",
                    notes=tuple(f"{COLUMN_NOTE}{name}={value}" for name, value in own.items() if value),
                ),
            )
        )
    manifest = Manifest.from_records(records, {"name": "cohort"})
    manifest.write(store)
    return manifest
