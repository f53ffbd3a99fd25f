"""Refused volumes are listed by reason, and the rest goes on unless they are too many."""

import json
import shutil
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from storage.errors import NotFound, RefusedInput
from storage.format.manifest import Manifest
from storage.ingest.pipeline import run
from storage.ingest.publishing.quarantine import Quarantined
from tests.kit.ingests import HALVES, dst, on_disk, src
from tests.kit.scans import disc, phantom, save_nifti

__all__ = ["dst", "src"]  # fixtures


def test_refused_volumes_are_listed_and_the_rest_goes_on(src, dst):
    (src / "images" / "case_01.nii.gz").write_text("no volume at all")
    save_nifti(src / "labels" / "case_02.nii.gz", disc((10, 12, 13)))
    report = run(str(src), dst, HALVES)
    assert report.published == 2
    lines = [json.loads(line) for line in on_disk(dst)["quarantine.jsonl"].decode().splitlines()]
    assert [line["source"] for line in lines] == ["images/case_01.nii.gz", "images/case_02.nii.gz"]
    assert "a text file" in lines[0]["reason"]
    assert "shape" in lines[1]["reason"]
    assert str(src) not in json.dumps(lines)
    assert not any("case_02" in p for p in on_disk(dst) if p.startswith("volumes"))
    save_nifti(src / "images" / "case_01.nii.gz", phantom(seed=1))
    save_nifti(src / "labels" / "case_02.nii.gz", disc())
    again = run(str(src), dst, HALVES)
    assert (again.written, again.skipped) == (2, 2)
    assert "quarantine.jsonl" not in on_disk(dst)


def test_too_many_refused_fail_the_job_and_publish_nothing(src, dst):
    for i in range(3):
        (src / "images" / f"case_{i:02d}.nii.gz").write_bytes(b"")
    with pytest.raises(RefusedInput, match=r"found 3 of 4.*max_failed"):
        run(str(src), dst, HALVES)
    with pytest.raises(NotFound):
        Manifest.open(dst)
    assert run(str(src), dst, HALVES.model_copy(update={"max_failed": 0.75, "min_subjects": 1})).published == 1


def test_refusals_are_listed_by_reason_however_the_run_ends(src, dst):
    for i in range(3):
        (src / "images" / f"case_{i:02d}.nii.gz").write_text("no volume at all")
    shutil.copy(src / "images" / "case_03.nii.gz", src / "images" / "case_03.nii")
    heard: list[Quarantined] = []
    with pytest.raises(RefusedInput) as refused:
        run(str(src), dst, HALVES, refusals=heard.extend)
    assert "a text file" in str(refused.value)
    save_nifti(src / "images" / "case_04.nii.gz", phantom())
    loose = HALVES.model_copy(update={"max_failed": 1.0})
    for policy in (loose, HALVES):
        heard.clear()
        with pytest.raises(RefusedInput) as refused:
            run(str(src), dst, policy, refusals=heard.extend)
        message = str(refused.value)
        assert "3 (images/case_00.nii.gz, images/case_01.nii.gz, images/case_02.nii.gz)" in message
        assert "a text file" in message
        assert "2 (images/case_03.nii, images/case_03.nii.gz)" in message
        assert "add subjects" not in message
        assert len(heard) == 5
    alone = run(str(src), dst, loose.model_copy(update={"min_subjects": 1}))
    assert (alone.published, len(alone.quarantined)) == (1, 5)
    lines = on_disk(dst)["quarantine.jsonl"].decode().splitlines()
    assert [json.loads(line)["source"] for line in lines] == [q.source for q in alone.quarantined]
    (src / "images" / "case_04.nii.gz").unlink()
    with pytest.raises(RefusedInput, match=r"found 0; refused: 3 .*a text file"):
        run(
            str(src), (Path(urlsplit(dst).path).parent / "other").as_uri(), loose.model_copy(update={"min_subjects": 1})
        )
