"""Small made-up volumes for tests that need a store but no anatomy."""

import numpy as np

from storage.format.manifest import Manifest
from storage.format.volume import Membership, Provenance, Volume
from storage.format.volume_writer import write_volume
from storage.objects import open_store


def write_phantoms(
    url: str, count: int, *, shape: tuple[int, int, int] = (20, 24, 22), seed: int = 0, label: str = "labels"
) -> Manifest:
    """Publish volumes of smooth noise with a bright ball, which is label 1; every fourth one is in the test split."""
    store = open_store(url)
    records = []
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"))
    for i in range(count):
        random = np.random.default_rng([seed, i])
        centre = np.array(shape) / 2 + random.uniform(-2, 2, 3)
        ball = ((grid - centre[:, None, None, None]) ** 2).sum(0) < random.uniform(4, 6) ** 2
        values = random.normal(100, 15, shape) + 80 * ball
        records.append(
            write_volume(
                store,
                f"phantom-{i:03d}",
                Volume(
                    values.astype(np.int16)[None],
                    spacing_mm=(1.0, 1.0, 1.0),
                    affine=np.eye(4),
                    labels={label: ball.astype(np.uint8)},
                    modality="MR",
                ),
                membership=Membership(subject=f"subject-{i:03d}", split="test" if i % 4 == 3 else "train"),
                provenance=Provenance(source=f"phantom-{i:03d}"),
            )
        )
    manifest = Manifest.from_records(records, {"name": "phantoms"})
    manifest.write(store)
    return manifest
