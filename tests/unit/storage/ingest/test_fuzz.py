"""Every reader against damaged files: they are read or refused, in bounded time and memory."""

import gzip
import itertools
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from storage.errors import RefusedInput
from storage.ingest.discover import discover
from storage.ingest.items import IngestItem
from storage.ingest.policy import IngestPolicy
from storage.ingest.prepare import LIBRARY_FAULTS, prepare, unreadable
from storage.ingest.readers.raw import ReadPolicy, VolumeHeader
from storage.ingest.readers.read import read_item_header
from storage.ingest.readers.registry import FORMATS
from storage.ingest.source_digest import source_digest, source_state
from tests.kit import fuzz as limits
from tests.kit.formats import (
    save_big_endian,
    save_itk,
    save_mgz,
    save_mosaic,
    save_nifti2,
    save_ome_zarr,
    save_pair,
    save_series,
    save_zarr,
)
from tests.kit.fuzz import DAMAGE, damaged, fuzz, within_limits
from tests.kit.scans import phantom, save_nifti

AFFINE = np.array([[-1.5, 0, 0, 30], [0, 0, 2.0, -10], [0, 1.25, 0, 5], [0, 0, 0, 1.0]])
POLICY = IngestPolicy(read=ReadPolicy(max_voxels=100_000, four_d="channels", nonfinite="lowest", shear="correct"))

FUZZED = {
    "a.nii": (save_nifti, "a.nii"),
    "a2.nii": (save_nifti2, "a2.nii"),
    "big.nii": (save_big_endian, "big.nii"),
    "a.nii.gz": (save_nifti, "a.nii.gz"),
    "a.hdr": (save_pair, "a.hdr"),
    "a.mha": (save_itk, "a.mha"),
    "a.mhd": (save_itk, "a.mhd"),
    "a.nrrd": (save_itk, "a.nrrd"),
    "a.nhdr": (save_itk, "a.nhdr"),
    "a.mgz": (save_mgz, "a.mgz"),
    "bare.zarr": (save_zarr, "bare.zarr/zarr.json"),
    "a.zarr": (save_ome_zarr, "a.zarr/zarr.json"),
    "a-array.zarr": (save_ome_zarr, "a-array.zarr/0/zarr.json"),
    "dicom": (save_series, "dicom/*"),
    "dicom-mosaic": (save_mosaic, "dicom-mosaic/*"),
    "dicom-seg": (save_series, "dicom-seg/seg/*"),
}
"""Format: what writes it, and the file whose header is damaged."""


def read_item_header_or_refusal(item: IngestItem) -> VolumeHeader | RefusedInput:
    try:
        return read_item_header(item, POLICY.read)
    except (RefusedInput, *LIBRARY_FAULTS) as error:
        return error if isinstance(error, RefusedInput) else unreadable(item, error)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("name", sorted(FUZZED))
def test_damaged_files_are_read_or_refused_and_nothing_else(tmp_path: Path, name: str) -> None:
    save, part = FUZZED[name]
    path = save(tmp_path / name, phantom((4, 5, 6)), AFFINE)
    file = next(p for p in sorted(tmp_path.glob(part)) if p.is_file())
    packed = file.suffix in (".gz", ".mgz")
    whole = gzip.decompress(file.read_bytes()) if packed else file.read_bytes()

    def target(changes: list[tuple[str, int, int]]) -> None:
        data = damaged(whole, changes)
        file.write_bytes(gzip.compress(data, 1) if packed else data)
        with within_limits(), suppress(RefusedInput):  # any other error fails the test
            for item in discover(path).items:
                assert source_digest(item)
                assert source_state(item) == source_state(item)
                foreseen = read_item_header_or_refusal(item)
                ready = prepare(item, POLICY)
                assert not isinstance(foreseen, RefusedInput), f"ingest takes what `data check` refuses: {foreseen}"
                assert np.isfinite(ready.affine).all()
                assert ready.stored_CDHW.dtype in (np.int16, np.float32)
                assert np.isfinite(ready.stored_CDHW).all()

    fuzz(target, DAMAGE, 20, 0.8 / len(FUZZED))


def test_every_format_is_fuzzed(tmp_path: Path) -> None:
    suffixes = {suffix for form in FORMATS for suffix in form.suffixes} - {".mgh"}
    assert suffixes <= {name[name.index(".") :] for name in FUZZED if "." in name}


def test_the_limits_of_a_fuzzed_file_are_noticed() -> None:
    with pytest.raises(AssertionError, match="MiB"), within_limits():
        np.ones(300 << 17).sum()


def test_a_file_that_never_ends_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MOST_SECONDS", 0.2)
    with pytest.raises(AssertionError, match="more than"), within_limits():
        all(True for _ in itertools.count())
