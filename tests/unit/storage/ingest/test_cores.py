"""What an ingest writes follows from the scans and its policy, and not from the machine."""

from pathlib import Path

import nibabel as nib
import numpy as np
from threadpoolctl import threadpool_info, threadpool_limits

from storage.ingest.mapping import map_threads
from storage.ingest.pipeline import run
from storage.ingest.policy import IngestPolicy
from storage.intensity_stats import foreground_stats


def blas_threads() -> set[int]:
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


def test_a_store_is_the_same_whatever_the_number_of_cores(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    (tmp_path / "scans").mkdir()
    for number in range(4):
        values = random.normal(100, 20, (70, 90 + number, 60)).astype(np.float32)
        nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "scans" / f"case{number}.nii")
    stores = []
    for threads in (1, 4):
        folder = tmp_path / f"of {threads}" / "store"
        with threadpool_limits(threads, "blas"):
            run(str(tmp_path / "scans"), folder.as_uri(), IngestPolicy(), mapper=map_threads)
            assert blas_threads() == {threads}
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        stores.append({str(path.relative_to(folder)): path.read_bytes() for path in files})
    assert stores[0] == stores[1]


def test_statistics_are_the_same_whatever_the_number_of_cores() -> None:
    random = np.random.default_rng(1)
    for kind in ("float32", "int16"):
        values = random.normal(0, 9000, (50, 100, 60)).astype(kind)
        found = []
        for threads in (1, 2, 4):
            with threadpool_limits(threads, "blas"):
                found.append(foreground_stats(values))
        assert found[0] == found[1] == found[2]
