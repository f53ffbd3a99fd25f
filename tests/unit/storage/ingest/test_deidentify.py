"""Nothing of a DICOM header reaches the store but what is on the list."""

import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence

from storage.errors import ConfigError
from storage.format.manifest import Manifest
from storage.ingest import pipeline as ingest
from storage.ingest.deidentify import CODES, NUMBERS, Pseudonyms, allowed_facts, load_salt
from storage.ingest.policy import IngestPolicy
from storage.ingest.publishing.quarantine import key_file
from tests.kit.scans import disc, phantom, save_dicom, save_nifti, segmentation, slices

SECRETS = [
    "Doe", "Jane", "19610203", "20240517", "MRN-4711", "ACC-0815", "St Elsewhere", "Dr Who", "Baker Street",
    "burnt-in remark", "physician note", "Scanner7Room", "ex patient", "jdoe-home", "1.2.826.0.1.99.1234",
    "Claustrophobic",
]  # fmt: skip


def identified(patient: str, seed: int, **tags: object) -> list[Dataset]:
    """A series with names, dates, free text and private tags wherever DICOM has room for them."""
    datasets = slices(
        phantom((6, 12, 10), seed) + 1000,
        patient=patient,
        KVP=120,
        SliceThickness=2,
        BodyPartExamined="DOE JANE HEAD",
        PatientPosition="HFS",
        PatientName="Doe^Jane",
        PatientBirthDate="19610203",
        StudyDate="20240517",
        AccessionNumber="ACC-0815",
        InstitutionName="St Elsewhere",
        ReferringPhysicianName="Dr Who",
        PatientAddress="Baker Street 221b",
        StudyDescription="ex patient",
        SeriesDescription="Doe follow-up",
        ProtocolName="Doe protocol",
        StationName="Scanner7Room",
        ImageComments="physician note",
        PatientComments="Claustrophobic",
        FrameOfReferenceUID="1.2.826.0.1.99.1234",
        ImageType=["DERIVED", "SECONDARY", "DOE"],
        **tags,
    )
    for ds in datasets:
        block = ds.private_block(0x0099, "Doe Imaging", create=True)
        block.add_new(0x01, "LT", "burnt-in remark about Jane Doe")
        inner = Dataset()
        inner.PatientName = "Doe^Jane"
        ds.RequestAttributesSequence = DicomSequence([inner])
    return datasets


def store_bytes(root: Path) -> bytes:
    """All bytes of a store, and all names in it; parquet and Zarr are opened so that compression hides nothing."""
    out = b""
    for path in sorted(root.rglob("*")):
        out += str(path.relative_to(root)).encode() + b"\n"
        if path.is_file():
            out += path.read_bytes() + b"\n"
    manifest = Manifest.open(root.as_uri())
    out += repr([*manifest.records()]).encode() + repr(manifest.dataset).encode()
    return out


def test_no_identifier_survives_ingest(tmp_path):
    source = tmp_path / "jdoe-home" / "Doe_Jane"
    datasets = identified("MRN-4711", 0)
    save_dicom(source / "20240517", datasets)
    save_dicom(source / "seg", [segmentation(datasets, disc((6, 12, 10)))])
    save_dicom(source / "other", identified("MRN-4712", 1))
    broken = identified("MRN-4713", 2)
    del broken[2]
    save_dicom(source / "Jane broken", broken)
    dst = tmp_path / "store"
    policy = IngestPolicy(split=(0.5, 0.0, 0.5))
    report = ingest.run(str(source), dst.as_uri(), policy, pseudonyms=Pseudonyms(b"a salt of the user's own"))
    assert report.published == 2
    assert [q.source for q in report.quarantined] == ["Jane broken"]
    data = store_bytes(dst).lower()
    uids = [str(ds.get(k)) for ds in datasets for k in ("SeriesInstanceUID", "StudyInstanceUID", "SOPInstanceUID")]
    for secret in [*SECRETS, "mrn-471", *uids, "a salt of"]:
        assert secret.lower().encode() not in data, secret
    assert b"slices missing" in (dst / "quarantine.jsonl").read_bytes()
    records = list(report.manifest.records())
    assert any("KVP=120" in r.notes for r in records)
    assert {len(r.subject) for r in records} == {16}
    assert sum(bool(r.labels) for r in records) == 1


def test_volumes_of_one_patient_stay_together_and_the_salt_decides_the_names(tmp_path):
    for k, patient in enumerate(("A", "A", "B")):
        save_dicom(tmp_path / "src" / f"s{k}", identified(patient, k))
    found = {}
    for salt in (b"0123456789abcdef", b"fedcba9876543210"):
        dst = (tmp_path / salt.decode()).as_uri()
        report = ingest.run(str(tmp_path / "src"), dst, pseudonyms=Pseudonyms(salt))
        subjects = [r.subject for r in report.manifest.records()]
        assert len(set(subjects)) == 2
        assert len({r.split for r in report.manifest.records() if subjects.count(r.subject) == 2}) == 1
        found[salt] = set(subjects)
    assert not set.intersection(*found.values())


def test_file_names_are_hidden_where_the_policy_says_so(tmp_path):
    for name in ("Doe_Jane", "Roe_Richard"):
        save_nifti(tmp_path / "src" / f"{name}.nii.gz", phantom(seed=len(name)))
    (tmp_path / "src" / "Poe_Edgar.nii.gz").write_text("no volume")
    dst = tmp_path / "store"
    policy = IngestPolicy(identifiers="hash", split=(0.5, 0, 0.5))
    ingest.run(str(tmp_path / "src"), dst.as_uri(), policy, pseudonyms=Pseudonyms(b"0123456789abcdef"))
    data = store_bytes(dst)
    for name in (b"Doe", b"Roe", b"Poe", b"Edgar"):
        assert name not in data


def test_reasons_of_refusals_hide_file_names_too(tmp_path):
    src, dst = tmp_path / "src", tmp_path / "store"
    for name in ("Doe_Jane", "Roe_Richard", "Poe_Edgar"):
        save_nifti(src / "Ward" / "images" / f"{name}.nii.gz", phantom(seed=len(name)))
    save_nifti(src / "Ward" / "labels" / "Doe_Jane.nii.gz", disc() + np.float32(0.5))
    save_nifti(src / "Ward" / "labels" / "Roe_Richard.nii.gz", disc((10, 12, 13)))
    (src / "Ward" / "images" / "Moe_Lester.mha").write_text("no volume")
    parts = "data file: LIST\nCoe_1.raw\nCoe_2.raw\n"
    kinds = "NRRD0004\ntype: short\ndimension: 3\nsizes: 4 5 2\nencoding: raw\nendian: little\n"
    (src / "Ward" / "images" / "nobody.nhdr").write_text(f"{kinds}{parts}")
    policy = IngestPolicy(identifiers="hash", split=(1, 0, 0), min_subjects=1, max_failed=1)
    report = ingest.run(str(src), dst.as_uri(), policy, pseudonyms=Pseudonyms(b"0123456789abcdef"))
    assert (report.published, len(report.quarantined)) == (1, 4)
    data = store_bytes(dst)
    for name in (b"Doe", b"Roe", b"Poe", b"Moe", b"Coe", b"Ward", bytes(tmp_path)):
        assert name not in data
    for reason in (b"0.5 among them", b"the image's shape"):
        assert reason in (dst / "quarantine.jsonl").read_bytes()


def test_free_text_never_passes_the_list():
    ds = Dataset()
    for keyword in NUMBERS | set(CODES):
        try:
            setattr(ds, keyword, "JANE DOE")
        except (TypeError, ValueError):
            continue
    assert "DOE" not in repr(allowed_facts(ds)).upper()
    ds = Dataset()
    ds.ScanningSequence = ["SE", "DOE"]
    ds.RepetitionTime = "2000.5"
    assert allowed_facts(ds) == {"ScanningSequence": "SE", "RepetitionTime": "2000.5"}


def test_the_salt_is_the_users(tmp_path):
    key = os.urandom(16).hex()
    assert load_salt("s3://b/x", {"TOMOSCALE_SALT": key}).salt == key.encode()
    (tmp_path / "salt").write_text(key + "\n")
    assert load_salt("s3://b/x", {"TOMOSCALE_SALT_FILE": str(tmp_path / "salt")}).salt == key.encode()
    for env in ({"TOMOSCALE_SALT": "short"}, {"TOMOSCALE_SALT_FILE": str(tmp_path / "none")}):
        with pytest.raises(ConfigError):
            load_salt("s3://b/x", env)
    assert key not in repr(Pseudonyms(key.encode()))


def test_without_a_salt_one_is_made_for_the_store_and_kept_from_others(tmp_path):
    env = {"XDG_STATE_HOME": str(tmp_path)}
    first = load_salt("s3://bucket/data", env)
    assert load_salt("s3://bucket/data/", {**env}).salt == first.salt
    assert load_salt("s3://bucket/other", env).salt != first.salt
    files = [p for p in tmp_path.rglob("*.salt")]
    assert len(files) == 2
    assert all(stat.S_IMODE(p.stat().st_mode) == 0o600 for p in files)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ConfigError, match="TOMOSCALE_SALT"):
        load_salt("s3://b/x", {"XDG_STATE_HOME": str(blocked)})


def test_a_store_is_not_continued_with_another_salt(tmp_path, monkeypatch):
    """By which a patient would be two, one in training and one in test. Another spelling of its URL changes nothing."""
    for name in ("TOMOSCALE_SALT", "TOMOSCALE_SALT_FILE"):
        monkeypatch.delenv(name, raising=False)
    for k, patient in enumerate("AB"):
        save_dicom(tmp_path / "src" / patient, identified(patient, k))
    save_dicom(tmp_path / "more" / "A2", identified("A", 2))
    store, policy = tmp_path / "store", IngestPolicy(split=(0.5, 0, 0.5))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "here"))
    ingest.run(str(tmp_path / "src"), str(store), policy)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "elsewhere"))
    with pytest.raises(ConfigError, match="the salt of the pseudonyms"):
        ingest.run(str(tmp_path / "more"), str(store), policy, append=True)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "here"))
    report = ingest.run(str(tmp_path / "more"), store.as_uri(), policy, append=True)
    assert (report.published, len(set(report.manifest.subjects()))) == (3, 2)


def test_pseudonyms_differ_by_kind_and_value():
    names = Pseudonyms(b"0123456789abcdef")
    assert names.of("subject", "A") == names.of("subject", " A ")
    assert len({names.of("subject", "A"), names.of("study", "A"), names.of("subject", "B")}) == 3


def test_only_the_owner_of_the_data_can_tell_what_was_refused(tmp_path, monkeypatch):
    """The store holds a digest; a file of the user's, in no store, leads from it to the files."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    source, dst = tmp_path / "Doe_Jane", tmp_path / "store"
    for k, name in enumerate(("one", "two", "three", "four")):
        datasets = identified(f"MRN-471{k}", k)
        save_dicom(source / name, datasets[:3] + datasets[4:] if k > 1 else datasets)
    series = datasets[0].SeriesInstanceUID
    salt, policy = Pseudonyms(b"a salt of the user's own"), IngestPolicy(split=(0.5, 0, 0.5), max_failed=1)
    report = ingest.run(str(source), dst.as_uri(), policy, pseudonyms=salt)
    assert (report.published, len(report.quarantined)) == (2, 2)
    keys = key_file(dst.as_uri())
    assert keys.is_relative_to(tmp_path / "state")
    assert stat.S_IMODE(keys.stat().st_mode) == 0o600
    assert stat.S_IMODE(keys.parent.stat().st_mode) == 0o700
    lines = [json.loads(line) for line in keys.read_text().splitlines()]
    stored = [json.loads(line) for line in (dst / "quarantine.jsonl").read_text().splitlines()]
    assert [line["source"] for line in lines] == [line["source"] for line in stored]
    by_path = {line["path"]: line for line in lines}
    line = by_path[str(source / "four" / "IM0000")]
    assert (line["files"], line["series"]) == (5, series)
    data = store_bytes(dst)
    for secret in (b"Doe", b"IM0000", series.encode(), bytes(tmp_path)):
        assert secret not in data
    save_dicom(source / "three", identified("MRN-4712", 2))  # repaired: another series id, as of another export
    for path in (source / "four").iterdir():
        path.unlink()
    ingest.run(str(source), dst.as_uri(), policy, pseudonyms=salt)
    ingest.run(str(source), dst.as_uri(), policy, pseudonyms=salt)
    assert not keys.exists() or "four" not in keys.read_text()


def test_a_key_file_that_cannot_be_written_stops_no_ingest(tmp_path, monkeypatch):
    (tmp_path / "state").write_text("a file where a folder should be")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    datasets = identified("MRN-4711", 0)
    for k in range(3):
        save_dicom(tmp_path / "src" / str(k), identified(f"MRN-{k}", k) if k else [*datasets[:2], *datasets[3:]])
    policy = IngestPolicy(split=(0.5, 0, 0.5))
    report = ingest.run(str(tmp_path / "src"), str(tmp_path / "store"), policy, pseudonyms=Pseudonyms(b"0" * 16))
    assert report.published == 2


def test_names_that_are_not_hidden_need_no_key_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for k in range(2):
        save_nifti(tmp_path / "src" / f"{k}.nii.gz", phantom(seed=k))
    (tmp_path / "src" / "broken.nii.gz").write_text("no volume")
    report = ingest.run(str(tmp_path / "src"), str(tmp_path / "store"), IngestPolicy(split=(0.5, 0, 0.5)))
    assert len(report.quarantined) == 1
    assert not (tmp_path / "state").exists()
