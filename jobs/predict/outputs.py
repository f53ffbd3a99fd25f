"""What is written of a predicted scan: each file whole or not at all, the mask last."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from jobs.predict import dicom_seg
from jobs.predict.scans import DICOM, Scan, Volume
from ssl_core.portable import Predictor
from ssl_core.portable.geometry import Frame, to_canonical
from ssl_core.portable.inference.slabs import Slabs
from ssl_core.portable.nifti import write_nifti
from storage.errors import ConfigError, StackError

ENDINGS = (".nii.gz", ".nii", ".dcm", ".npz")


@dataclass(frozen=True)
class Choice:
    """What is written.

    Attributes:
        probabilities: `NAME-probabilities.nii.gz`, (I, J, K, classes) float32.
        features: `NAME-features.npz`, of an encoder `NAME.npz`.
        overlay: `NAME-overlay.png`.
        nifti: Masks of DICOM series as NIfTI too, not as DICOM segmentations.
        force: Predict what is far from all that the model learned from.
    """

    probabilities: bool = False
    features: bool = False
    overlay: bool = False
    nifti: bool = False
    force: bool = False


def ending_of(scan: Scan, predictor: Predictor, choice: Choice) -> str:
    """Ending of the file that a scan becomes in a folder."""
    if predictor.kind == "encoder":
        return ".npz"
    return ".dcm" if scan.kind == DICOM and not choice.nifti else ".nii.gz"


def split_ending(name: str) -> tuple[str, str]:
    """Stem and known ending of a file name; the ending is empty where there is none."""
    ending = next((end for end in ENDINGS if name.lower().endswith(end) and len(name) > len(end)), "")
    return (name[: -len(ending)], ending) if ending else (name, "")


def check_model(predictor: Predictor, model: str, choice: Choice) -> None:
    """Refuse what the model does not have, before any scan is read.

    Raises:
        ConfigError: masks of an encoder.
    """
    if predictor.kind == "segmenter":
        return
    if not choice.features or choice.probabilities or choice.overlay:
        raise ConfigError(
            f"model {model}",
            expected="a segmenter",
            found=f"an {predictor.kind}",
            remedy="fine-tune it first (`tomoscale finetune`), or take its features: `--features`, without others",
        )


def write_scan(
    predictor: Predictor,
    scan: Scan,
    target: Path,
    choice: Choice,
    say: Callable[[str], None],
    on_slab: Callable[[int, int], None] = lambda _done, _of: None,
) -> dict[str, int]:
    """Read and predict a scan and write what is asked for; returns the voxels of each label.

    Args:
        predictor: The model.
        scan: The scan.
        target: The mask, or the features of an encoder; other files stand beside it.
        choice: What is written.
        say: Hears what its reader assumed.
        on_slab: Hears how many slices are done, of how many.

    Raises:
        RefusedInput: it cannot be read, is not what the model takes, or its segmentation cannot be written.
        StackError: the disk does not take the files.
    """
    volume = scan.read()
    for note in volume.notes:
        say(f"{scan.source}: {note}")
    stem, ending = split_ending(target.name)
    if predictor.kind == "encoder":
        with _written(target) as folder:
            _features(folder / target.name, predictor, scan, volume, choice)
        return {}
    frame, slabs = volume.admitted(predictor, scan.source)
    mask_DHW, probabilities_KDHW = predictor.segmented(
        slabs,
        frame.affine,
        volume.stats,
        name=scan.source,
        modality=volume.modality,
        force=choice.force,
        probabilities=choice.probabilities,
        on_slab=on_slab,
    )
    mask = frame.to_file(mask_DHW)
    labels = dict(predictor.plan.labels)
    with _written(target) as folder:
        if probabilities_KDHW is not None:
            maps = np.stack([frame.to_file(channel) for channel in probabilities_KDHW], axis=-1)
            nibabel.save(nibabel.Nifti1Image(maps, volume.affine), folder / f"{stem}-probabilities.nii.gz")
        if choice.features:
            _features(folder / f"{stem}-features.npz", predictor, scan, volume, choice)
        if choice.overlay:
            (folder / f"{stem}-overlay.png").write_bytes(_overlay(slabs, frame, mask_DHW, labels))
        if ending == ".dcm":
            dicom_seg.write_segmentation(
                folder / target.name,
                mask.transpose(2, 1, 0),
                volume.affine,
                () if scan.item is None else scan.item.images,
                dicom_seg.names_of(labels),
                model=str(predictor.card["name"]),
            )
        else:
            write_nifti(folder / target.name, mask, volume.affine, like=volume.like)
    return {name: int((mask == value).sum()) for value, name in predictor.plan.labels}


def _features(path: Path, predictor: Predictor, scan: Scan, volume: Volume, choice: Choice) -> None:
    """Features of the deepest level, with the voxels between them and the frame that they lie in."""
    array = volume.whole()
    frame = to_canonical(scan.source, array, volume.affine)
    features_EDHW = predictor.features(array, volume.affine, force=choice.force)
    target_mm = predictor.plan.target_spacing(frame.spacing_mm)
    np.savez_compressed(
        path,
        features_EDHW=features_EDHW,
        stride_DHW=np.array(predictor.architecture["levels"][-1]["stride"]),
        spacing_mm=np.array(target_mm or frame.spacing_mm),
        affine=frame.affine,
    )


def _overlay(slabs: Slabs, frame: Frame, mask_DHW: NDArray[Any], labels: dict[int, str]) -> bytes:
    from jobs.pages.pictures import overlay_picture

    return overlay_picture(slabs.whole()[0], None, mask_DHW, spacing_mm=frame.spacing_mm, labels=labels)


@contextmanager
def _written(target: Path) -> Iterator[Path]:
    """A hidden folder beside the target, whose files take their places when all are written, the target last.

    A mask that is there is therefore whole, and so is what stands beside it.

    Raises:
        StackError: the disk does not take them.
    """
    try:
        folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        try:
            yield folder
            for path in sorted(folder.iterdir(), key=lambda path: path.name == target.name):
                path.chmod(0o666 & ~_umask())
                os.replace(path, target.parent / path.name)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise StackError(
            str(target),
            expected="a file written to a disk with room, by a user with the right to",
            found=error.strerror or str(error),
            remedy="free space, change the owner of the folder, or give another place",
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
