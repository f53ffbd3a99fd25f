"""A prediction that is ended while it writes: no half mask, nothing of the input touched, and the next run finishes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ssl_core.portable.nifti import read_nifti, write_nifti
from tests.kit import ROOT

ENDED = """
import os, sys
from pathlib import Path
from jobs.cli import interrupts
from tests.unit.ssl_core.portable.test_ended_prediction import masks_of

interrupts.watch()
stock = getattr(os, sys.argv[2])

def ended(*words):
    os.kill(os.getpid(), int(sys.argv[3]))
    return stock(*words)

setattr(os, sys.argv[2], ended)
masks_of(Path(sys.argv[1]))
"""


def masks_of(folder: Path) -> None:
    """What is left to do of a folder, as `jobs.predict` goes through it."""
    for scan in sorted((folder / "scans").iterdir()):
        target = folder / "masks" / scan.name
        if not target.exists():
            image = read_nifti(scan)
            write_nifti(target, (image.array > 3).astype(np.uint8), image.affine, like=image)


def volumes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name.endswith((".nii", ".gz"))}


@pytest.mark.parametrize(("number", "point"), [(signal.SIGKILL, "replace"), (signal.SIGTERM, "fsync")])
def test_a_prediction_that_is_ended_leaves_no_half_mask_and_runs_again(
    number: signal.Signals, point: str, tmp_path: Path
) -> None:
    scans, masks = tmp_path / "scans", tmp_path / "masks"
    for folder in (scans, masks):
        folder.mkdir()
    for name in ("a.nii.gz", "b.nii.gz"):
        write_nifti(scans / name, np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.eye(4))
    write_nifti(masks / "a.nii.gz", np.zeros((2, 3, 4), np.uint8), np.eye(4))  # of the run before
    before, done = volumes(scans), volumes(masks)

    words = [sys.executable, "-c", ENDED, str(tmp_path), point, str(int(number))]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode < 0, ended.stderr
    assert volumes(scans) == before
    assert volumes(masks) == done, "neither half a mask, nor another one in place of what was done"
    if number == signal.SIGTERM:
        assert "KeyboardInterrupt" in ended.stderr
        assert [path.name for path in masks.iterdir()] == ["a.nii.gz"]

    masks_of(tmp_path)
    assert volumes(scans) == before
    assert volumes(masks)["a.nii.gz"] == done["a.nii.gz"]
    assert read_nifti(masks / "b.nii.gz").array.sum() == 20


def test_a_mask_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    sync, name = os.fsync, os.replace

    def synced(handle: int) -> None:
        order.append("disk")
        sync(handle)

    def named(old: str, new: Path) -> None:
        order.append("name")
        name(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", named)
    write_nifti(tmp_path / "mask.nii.gz", np.zeros((2, 3, 4), np.uint8), np.eye(4))
    assert order == ["disk", "name"]
