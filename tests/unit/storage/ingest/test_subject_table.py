"""A table says that one person has two names; what it says wrongly is refused."""

from pathlib import Path

import pytest

from storage.errors import ConfigError
from storage.format.manifest import Manifest
from storage.ingest.discover import discover
from storage.ingest.pipeline import run
from storage.ingest.policy import IngestPolicy
from tests.kit.scans import phantom, save_nifti

HALVES = IngestPolicy(split=(0.5, 0.0, 0.5))


def people(root: Path, *names: str) -> Path:
    for at, name in enumerate(names):
        save_nifti(root / f"{name}.nii.gz", phantom(seed=at))
    return root


def subjects(root: Path, table: str, name: str = "people.csv") -> dict[str, str]:
    (root / name).write_text(table, encoding="utf-8")
    return {item.name: item.subject for item in discover(root, subject_table=name).items}


def test_one_person_under_two_names_is_in_one_split(tmp_path):
    src = people(tmp_path / "src", *(f"{kind}_{i:03d}" for kind in ("old", "new") for i in range(8)))
    rows = "".join(f"{kind}_{i:03d}.nii.gz,person {i},{20 + i}\n" for kind in ("old", "new") for i in range(8))
    (src / "people.csv").write_text(f"file,person,age\n{rows}")
    dst = (tmp_path / "store").as_uri()
    policy = HALVES.model_copy(update={"subject_table": "people.csv"})
    report = run(str(src), dst, policy)
    splits = {(r.source[4:7], r.split) for r in report.manifest.records()}
    assert len(splits) == 8
    record = report.manifest.record(0)
    assert record.subject == "person 0"
    assert "subject table: age=20" in record.notes
    (src / "people.csv").write_text(f"file,person,weight\n{rows}")
    again = run(str(src), dst, policy)
    assert again.skipped == 16
    assert [n for n in Manifest.open(dst).record(0).notes if n.startswith("subject")] == ["subject table: weight=20"]


def test_a_table_names_files_by_path_name_or_stem_and_subjects(tmp_path):
    src = people(tmp_path, "a/patient1_T1", "a/patient1_T2", "b/x", "c/patient2_T1", "patient3_T1", "patient4_T1")
    table = "name;person\na/patient1_T1.nii.gz;Z\nx;Z\nc/patient2_T1;Y\npatient3;Y\n"
    assert subjects(src, table) == {
        "a/patient1_T1": "Z",
        "a/patient1_T2": "Z",  # by its name it is of the same person as the first
        "b/x": "Z",
        "c/patient2_T1": "Y",
        "patient3_T1": "Y",
        "patient4_T1": "patient4",
    }
    notes = discover(src, subject_table="people.csv").notes
    assert any("1 volumes are not in subject_table" in note for note in notes)


def test_participants_of_bids_are_people_and_their_columns_are_kept(tmp_path):
    src = people(tmp_path, "sub-01/ses-1/anat/sub-01_ses-1_T1w", "sub-02/anat/sub-02_T1w")
    text = "participant_id\tsex\tage\nsub-01\tF\tn/a\nsub-02\tM\t40\nsub-03\tF\t50\n"
    assert set(subjects(src, text, "participants.tsv").values()) == {"sub-01", "sub-02"}
    found = discover(src, subject_table="participants.tsv")
    assert [item.columns for item in found.items] == [(("sex", "F"),), (("sex", "M"), ("age", "40"))]
    assert [item.study for item in found.items] == ["sub-01/ses-1", ""]
    assert any("1 rows of subject_table name nothing here: sub-03" in note for note in found.notes)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("", "a column `person`"),
        ("file,age\na,3\n", "a column `person`"),
        ("file,person\na,P\na,Q\n", "one person for a"),
        ("file,person\na,P\na2\n", "2 columns"),
        ("file,person\na,\n", "in every row"),
        ("file,person\nq,P\n", "none, the first is q"),
        ("file,person\nt,P\n", "one file called t"),
    ],
)
def test_a_table_that_cannot_be_followed_is_refused(tmp_path, table, message):
    src = people(tmp_path, "a", "x1/t", "x2/t")
    with pytest.raises(ConfigError, match=message):
        subjects(src, table)
    with pytest.raises(ConfigError, match="No such file"):
        discover(src, subject_table="absent.csv")


def test_columns_are_not_stored_where_names_are_hidden(tmp_path):
    src = people(tmp_path / "src", "a", "b")
    (src / "t.csv").write_text("file,person,nick\na,Anna,Nan\nb,Bert,Bo\n")
    policy = HALVES.model_copy(update={"subject_table": "t.csv", "identifiers": "hash"})
    run(str(src), (tmp_path / "store").as_uri(), policy)
    data = b"".join(path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file())
    assert not any(word in data for word in (b"Anna", b"Nan", b"nick"))


def test_a_person_spelt_in_two_ways_is_one(tmp_path):
    src = people(tmp_path, "a", "b", "c", "d", "e", "f", "g")
    table = "File,Patient ID\na,P1\nb,p1\nc,1001.0\nd,1001\ne,Mu\u0308ller\nf,M\u00fcller\ng,P2\n"
    of = subjects(src, table)
    assert (of["a"], of["c"], of["e"]) == (of["b"], of["d"], of["f"])
    assert len(set(of.values())) == 4


def test_columns_that_rows_of_one_name_dispute_are_left_out_and_said(tmp_path):
    src = people(tmp_path, "sub-1/ses-1/sub-1_ses-1_T1w", "sub-1/ses-2/sub-1_ses-2_T1w", "sub-2/ses-1/sub-2_ses-1_T1w")
    table = "participant_id\tage\tsex\nsub-1\t30\tF\nsub-1\t31\tF\nsub-1\t30\tF\nsub-2\t40\tM\n"
    (src / "people.tsv").write_text(table)
    result = discover(src, subject_table="people.tsv")
    assert [dict(item.columns) for item in result.items] == [{"sex": "F"}, {"sex": "F"}, {"age": "40", "sex": "M"}]
    assert any("under age" in note and "sub-1" in note for note in result.notes)


def test_two_columns_that_may_name_people_are_asked_about(tmp_path):
    src = people(tmp_path, "a", "b")
    with pytest.raises(ConfigError, match="one column that says whose a scan is") as refused:
        subjects(src, "file,subject,patient\na,s1,P1\nb,s2,P1\n")
    assert "`person`" in refused.value.remedy
    assert set(subjects(src, "file,subject,person\na,s1,P1\nb,s2,P1\n").values()) == {"P1"}
    (src / "people.csv").write_text("file\tperson\na\tP1\n", encoding="utf-16")
    with pytest.raises(ConfigError, match="save it as UTF-8"):
        discover(src, subject_table="people.csv")
