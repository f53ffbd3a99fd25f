"""Names of label values: read from where programs leave them, kept in the manifest, never merged in silence."""

import gzip
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from storage.format.manifest import Manifest
from storage.ingest.deidentify import Pseudonyms
from storage.ingest.label_tables import NO_NAMES
from storage.ingest.mapping import map_serial
from storage.ingest.pipeline import IngestReport, run
from storage.ingest.policy import IngestPolicy
from tests.kit.scans import disc, phantom, save_dicom, save_nifti, segmentation, slices

POLICY = IngestPolicy(split=(0.5, 0.0, 0.5))
NAMES = {"1": "left kidney", "2": "liver"}
SNAP = "# ITK-SnAP Label Description File\n" + "".join(
    f'{value:5} 255 0 0 {1 if value else 0} 1 1 "{name}"\n'
    for value, name in ((0, "Clear Label"), (1, "left kidney"), (2, "liver"), (9, "not in the map"))
)
COLOURS = "# Color table\n0 Background 0 0 0 0\n1 left_kidney 255 0 0 255\n2 liver 0 255 0 255\n"
TSV = "index\tname\tabbreviation\n0\tbackground\tBG\n1\tleft kidney\tLK\n2\tliver\tLI\n"
WORKBENCH = (
    b'<?xml version="1.0"?><CaretExtension><VolumeInformation Index="0"><LabelTable><Label Key="0" Red="0">???</Label>'
    b'<Label Key="1" Red="1">left kidney</Label><Label Key="2" Red="1">liver</Label></LabelTable>'
    b"</VolumeInformation></CaretExtension>"
)
AFNI = (
    b'<?xml version="1.0" ?><AFNI_attributes><AFNI_atr ni_type="String" atr_name="VALUE_LABEL_DTABLE">'
    b'"&lt;VALUE_LABEL_DTABLE ni_type=&quot;2*String&quot; ni_dimen=&quot;2&quot; &gt;\n &quot;1&quot; '
    b'&quot;left kidney&quot;\n &quot;2&quot; &quot;liver&quot;\n&lt;/VALUE_LABEL_DTABLE&gt;"</AFNI_atr>'
    b"</AFNI_attributes>"
)


def scans(src: Path, *names: str, seed: int = 0) -> Path:
    for i, name in enumerate(names):
        save_nifti(src / "images" / f"{name}.nii.gz", phantom(seed=seed + i))
        save_nifti(src / "labels" / f"{name}.nii.gz", disc())
    return src


def extended(path: Path, code: int, content: bytes, kind: Any = nib.Nifti1Image) -> None:
    image = kind(disc().T, np.eye(4))
    image.header.extensions.append(nib.nifti1.Nifti1Extension(code, content))
    nib.save(image, path)


def nrrd(path: Path, fields: str) -> None:
    array = disc()
    header = (
        f"NRRD0005\ntype: unsigned char\ndimension: 3\nspace: right-anterior-superior\n"
        f"sizes: {' '.join(map(str, array.shape[::-1]))}\n"
        "space directions: (1,0,0) (0,1,0) (0,0,1)\nspace origin: (0,0,0)\nencoding: gzip\n" + fields + "\n"
    )
    path.write_bytes(header.encode() + gzip.compress(array.tobytes()))


def ingest(src: Path, dst: str, **options: Any) -> IngestReport:
    return run(str(src), dst, POLICY, mapper=map_serial, **options)


def segments(*layers: int) -> str:
    pairs = ((0, "liver", 2), (1, "left kidney", 1))
    return "".join(
        f"Segment{i}_LabelValue:={value}\nSegment{i}_Layer:={layer}\nSegment{i}_Name:={name}\n"
        for (i, name, value), layer in zip(pairs, layers, strict=True)
    )


@pytest.mark.parametrize("kind", ["workbench", "nifti2", "afni", "aux_file", "slicer", "snap", "colours", "tsv"])
def test_names_of_label_values_are_read_from_where_programs_leave_them(tmp_path, kind):
    src = scans(tmp_path / "src", "p1", "p2")
    for name in ("p1", "p2"):
        label = src / "labels" / f"{name}.nii.gz"
        if kind == "workbench":
            extended(label, 30, WORKBENCH)
        elif kind == "nifti2":
            extended(label, 32, WORKBENCH, nib.Nifti2Image)
        elif kind == "afni":
            extended(label, 4, AFNI)
        elif kind == "aux_file":
            image = nib.Nifti1Image(disc().T, np.eye(4))
            image.header.set_intent("label")
            image.header["aux_file"] = b"names.txt"
            nib.save(image, label)
            (src / "labels" / "names.txt").write_text(SNAP)
        elif kind == "slicer":
            label.unlink()
            nrrd(src / "labels" / f"{name}.nrrd", segments(0, 0))
        else:
            text, end = {"snap": (SNAP, "txt"), "colours": (COLOURS, "ctbl"), "tsv": (TSV, "tsv")}[kind]
            (src / "labels" / f"{name}.{end}").write_text(text)
    report = ingest(src, (tmp_path / "store").as_uri())
    expected = {"1": "left_kidney", "2": "liver"} if kind == "colours" else NAMES
    assert report.manifest.dataset["labels"] == expected
    assert report.warnings == ()


def test_tables_of_bids_name_the_maps_below_them(tmp_path):
    src = tmp_path / "src"
    for sub in ("01", "02"):
        save_nifti(src / f"sub-{sub}" / "anat" / f"sub-{sub}_T1w.nii.gz", phantom(seed=int(sub)))
        save_nifti(src / "derivatives/x" / f"sub-{sub}" / f"sub-{sub}_space-orig_dseg.nii.gz", disc())
    (src / "dseg.tsv").write_text("index\tname\n1\tfar\n2\tfar away\n")
    (src / "derivatives/x/space-orig_dseg.tsv").write_text(TSV)
    (src / "derivatives/x/desc-other_dseg.tsv").write_text("index\tname\n1\tother\n")
    assert ingest(src, (tmp_path / "store").as_uri()).manifest.dataset["labels"] == NAMES


def test_names_on_which_volumes_differ_are_said_and_not_merged(tmp_path):
    src, dst = scans(tmp_path / "src", "p1", "p2", "p3"), (tmp_path / "store").as_uri()
    (src / "labels/p1.tsv").write_text(TSV)
    (src / "labels/p2.tsv").write_text(TSV.replace("liver", "Liver"))
    (src / "labels/p3.tsv").write_text(TSV.replace("liver", "spleen"))
    report = ingest(src, dst)
    assert report.manifest.dataset["labels"] == {"1": "left kidney"}
    (warning,) = report.warnings
    assert "label value 2 is 'liver' in p1, p2, 'spleen' in p3" in warning
    (src / "dataset.json").write_text(json.dumps({"labels": {"2": "liver"}}))
    report = ingest(src, dst)
    assert report.manifest.dataset["labels"] == NAMES
    assert "kept as 'liver'" in report.warnings[0]


def test_names_that_an_append_disputes_are_taken_back_and_said(tmp_path):
    dst = (tmp_path / "store").as_uri()
    (scans(tmp_path / "a", "a1", "a2") / "labels/a1.tsv").write_text(TSV)
    assert ingest(tmp_path / "a", dst).manifest.dataset["labels"] == NAMES
    (scans(tmp_path / "b", "b1", seed=9) / "labels/b1.tsv").write_text(TSV.replace("liver", "spleen"))
    report = ingest(tmp_path / "b", dst, append=True)
    assert report.manifest.dataset["labels"] == {"1": "left kidney"}
    assert any("'spleen' in b1" in warning for warning in report.warnings)


def test_a_description_that_differs_from_the_volumes_is_said(tmp_path):
    src = scans(tmp_path / "src", "p1", "p2")
    (src / "labels/p1.tsv").write_text(TSV)
    (src / "dataset.json").write_text(json.dumps({"labels": {"spleen": 2}}))
    report = ingest(src, (tmp_path / "store").as_uri())
    assert report.manifest.dataset["labels"] == {"1": "left kidney", "2": "spleen"}
    assert "label value 2 is 'spleen' in the description" in report.warnings[0]


def test_tables_of_one_map_that_differ_name_nothing_and_are_noted(tmp_path):
    src = scans(tmp_path / "src", "p1", "p2")
    extended(src / "labels/p1.nii.gz", 30, WORKBENCH.replace(b"liver", b"spleen"))
    (src / "labels/p1.tsv").write_text(TSV)
    report = ingest(src, (tmp_path / "store").as_uri())
    assert report.manifest.dataset["labels"] == {"1": "left kidney"}
    assert any("2 is 'spleen' in p1.nii.gz and 'liver' in p1.tsv" in n for n in report.manifest.record(0).notes)


def test_names_given_later_reach_volumes_that_are_published_already(tmp_path):
    src, dst = scans(tmp_path / "src", "p1", "p2"), (tmp_path / "store").as_uri()
    assert "labels" not in ingest(src, dst).manifest.dataset
    (src / "labels/p1.tsv").write_text(TSV)
    report = ingest(src, dst)
    assert (report.written, report.manifest.dataset["labels"]) == (0, NAMES)
    (src / "labels/p1.tsv").unlink()
    assert "labels" not in ingest(src, dst).manifest.dataset
    assert "labels" not in Manifest.open(dst).dataset


@pytest.mark.parametrize(
    "content", [b"<LabelTable><Label Key='1'>", b'<!DOCTYPE x [<!ENTITY a "b">]><x/>', b"\xff\0", b"", b"<x>" * 99]
)
def test_a_damaged_table_names_nothing_and_stops_nothing(tmp_path, content):
    src = scans(tmp_path / "src", "p1", "p2")
    extended(src / "labels/p1.nii.gz", 30, content)
    (src / "labels/p2.tsv").write_bytes(content)
    report = ingest(src, (tmp_path / "store").as_uri())
    assert (report.published, "labels" in report.manifest.dataset) == (2, False)


def test_segments_in_layers_of_their_own_are_not_named_by_their_values(tmp_path):
    src = scans(tmp_path / "src", "p1", "p2")
    (src / "labels/p1.nii.gz").unlink()
    nrrd(src / "labels/p1.nrrd", segments(0, 1))
    assert "labels" not in ingest(src, (tmp_path / "store").as_uri()).manifest.dataset


def segmented(src: Path, *labels: str) -> IngestReport:
    for patient in ("Doe^Jane", "Roe^Max"):
        datasets = slices(phantom((6, 12, 10), seed=len(patient)) + 1000, patient=patient, PatientName=patient)
        save_dicom(src / patient / "image", datasets)
        save_dicom(src / patient / "seg", [segmentation(datasets, disc((6, 12, 10)), labels)])
    return ingest(src, (src.parent / "store").as_uri(), pseudonyms=Pseudonyms(b"a salt of the user's own"))


def test_labels_of_dicom_segments_are_names_of_classes(tmp_path):
    report = segmented(tmp_path / "src", "left kidney", "liver")
    assert report.manifest.dataset["labels"] == NAMES
    again = ingest(tmp_path / "src", (tmp_path / "store").as_uri(), pseudonyms=Pseudonyms(b"a salt of the user's own"))
    assert (again.skipped, again.manifest.dataset["labels"]) == (2, NAMES)


@pytest.mark.parametrize("label", ["lesion of Jane", "Jane2 tumour", "lesion 20240517", "cyst 2024-05-17"])
def test_a_segment_label_that_may_identify_a_person_is_left_out_and_said(tmp_path, label):
    report = segmented(tmp_path / "src", label, "liver")
    jane = [r for r in report.manifest.records() if any(NO_NAMES in note for note in r.notes)]
    assert jane
    assert all(label not in note for record in jane for note in record.notes)
    assert all("1, whose segment's label may identify a person" in " ".join(record.notes) for record in jane)
