"""What ingest assumed, chose or changed reaches who runs it, and who looks at the store later."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from jobs.cli import main as cli
from tests.kit.scans import folder, phantom

pytestmark = pytest.mark.usefixtures("nothing_configured")


def test_notes_are_printed_by_ingest_show_and_verify_with_counts_and_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They used to lie in the manifest only."""
    source, store = folder(tmp_path / "scans", 4), f"file://{tmp_path}/store"
    for i in range(2):
        image = nib.Nifti1Image(phantom(seed=i).T, np.diag([500.0, 500, 500, 1]))
        image.header.set_xyzt_units("micron")
        image.set_sform(image.affine, 1)
        image.set_qform(np.diag([500.0, 500, 500 * (i + 2), 1]), 1)
        image.header["pixdim"][1:4] = 500
        nib.save(image, source / "images" / f"case_1{i}.nii.gz")
    assert cli.main(["data", "ingest", str(source), store, "--local"]) == 0
    lines = {"ingest": capsys.readouterr().out}
    for verb in ("show", "verify"):
        assert cli.main(["data", verb, store]) == 0
        lines[verb] = capsys.readouterr().out
        assert cli.main(["data", verb, store, "--json"]) == 0
        notes = json.loads(capsys.readouterr().out)["notes"]
        assert {"lengths converted from microns to mm": 2}.items() <= {n["note"]: n["volumes"] for n in notes}.items()
        assert "case_10" in json.dumps(notes)
    for text in lines.values():
        assert "note: 2 x lengths converted from microns to mm: case_10, case_11" in text
    assert cli.main(["data", "show", store, "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "lengths converted from microns to mm" in page
    assert "case_10" in page
