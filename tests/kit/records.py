"""One row of a manifest, every field filled."""

from dataclasses import replace

from storage.format.records import LabelRecord, VolumeRecord


def record(i: int = 0, **change: object) -> VolumeRecord:
    base = VolumeRecord(
        volume_id=f"v{i:05d}",
        subject=f"s{i // 2}",
        study="study",
        split=("train", "val", "test")[i % 3],
        modality="MR",
        shape_DHW=(35, 50, 36),
        channels=1,
        spacing_mm=(1.0, 0.1 + 0.2, 1.5),
        affine=tuple(float(x) for x in range(16)),
        orientation="LAS",
        dtype="int16",
        scale=0.1,
        offset=-1024.0,
        foreground_lo=(0, 1, 2),
        foreground_hi=(30, 40, 36),
        stats=({"min": 0.5, "max": 99.0, "mean": 1 / 3, "std": 1.0, "p0_5": 0.6, "p99_5": 98.0},),
        labels=(
            LabelRecord(
                "organ",
                (1, 4),
                (10, 1),
                (((0, 0, 0), (2, 2, 3)), ((5, 5, 5), (6, 6, 6))),
                (((0, 0, 0), (1, 1, 2)), ((5, 5, 5),)),
                "uint8",
            ),
        )
        if i % 2
        else (),
        source=f"images/é {i}.nii.gz",
        source_sha256="ab" * 32,
        content_sha256="cd" * 32,
        reader="nibabel 5",
        policy="native/1",
        notes=("shifted", "second") if i % 5 == 0 else (),
        chunk_DHW=(35, 25, 36),
        shard_DHW=(35, 50, 36),
        codecs="default",
    )
    return replace(base, **change)  # type: ignore[arg-type]
