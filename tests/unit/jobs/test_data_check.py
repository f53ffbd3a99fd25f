"""`data check` says in words and in JSON what an ingest would make of a folder."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.cli import main as cli
from tests.kit import ROOT
from tests.kit.scans import folder, phantom, save_dicom, save_nifti, slices


def check(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    assert cli.main(["data", "check", *arguments]) == code
    return capsys.readouterr().out


def test_a_good_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = str(folder(tmp_path / "src", 10))
    text = check(capsys, 0, src, "spacing_mm=2.0")
    assert "10 volumes of 10 subjects, 10 with a label map" in text
    assert "2..2 (median 2)" in text
    assert "headers speak against 0 of 10 volumes" in text
    values = json.loads(check(capsys, 0, src, "spacing_mm=2.0", "--json"))
    assert values["volumes"] == values["labelled"] == 10
    assert sum(values["splits"].values()) == 10
    assert values["bytes of files"] == sum(path.stat().st_size for path in (tmp_path / "src").rglob("*.nii.gz"))


def test_refusals_come_before_hours_of_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = folder(tmp_path / "src", 4, labelled=False)
    for number in range(3):
        save_nifti(next(src.rglob("case_00*")).with_name(f"flat{number}.nii.gz"), phantom((1, 12, 14)))
    text = check(capsys, 0, str(src))
    assert "would be refused: 3 (" in text
    assert "a slice is no volume" in text
    assert "nothing would be published" in check(capsys, 3, str(src), "max_failed=0.1")


def test_a_patients_number_is_not_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        series = slices(phantom(seed=number), patient="Doe^Jane")
        save_dicom(tmp_path / "src" / f"s{number}", series[:: number + 1])
    text = check(capsys, 3, str(tmp_path / "src"))
    assert "Doe" not in text + check(capsys, 3, str(tmp_path / "src"), "--json")
    assert "drawn by the pseudonyms of the store" in text


def test_a_wrong_setting_is_named_as_it_was_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "check", str(tmp_path), "spacing=1"]) == 2
    assert "config: spacing; expected a known key" in capsys.readouterr().err


def test_no_cluster_is_imported() -> None:
    code = "import sys, jobs.data_check; print(sorted({'ray', 'torch', 'mlflow', 'monai'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_ingest_starts_without_what_few_volumes_need() -> None:
    """Each of these costs a start a tenth of a second or more; those that are needed are imported then."""
    heavy = {"ray", "torch", "mlflow", "monai", "numba", "scipy", "pandas", "nibabel", "pydicom", "SimpleITK"}
    code = f"import sys, jobs.ingestion; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
