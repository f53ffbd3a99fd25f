"""Whose a scan is: one person is in one split whatever tells the scans apart, and two people stay two."""

import re
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.ingest.names.subjects import subjects_by_name
from storage.ingest.publishing.splits import assign

PEOPLE = [
    lambda n: f"patient{n:03d}",
    lambda n: f"P{n:02d}",
    lambda n: f"{1000 + n}",
    lambda n: f"sub-{n:02d}",
    lambda n: f"case_{n:05d}",
    lambda n: f"amos_{n:04d}",
    lambda n: f"IXI{n:03d}-Guys-{800 + 7 * n:04d}",
    lambda n: f"BraTS2021_{n:05d}",
    lambda n: f"lung{n}",
    lambda n: ("anna", "bob", "carla", "dora", "emil", "fred", "greta", "hans", "ines", "john", "karl", "lena")[n % 12],
]
SCANS = [
    [f"frame{i:02d}" for i in range(1, 13)],
    ["visit1", "visit2", "baseline", "followup"],
    ["ses-01", "ses-02", "tp1", "tp2", "m06", "m12"],
    ["left", "right", "L", "R", "lh"],
    ["T1", "T2w", "flair", "ct", "dwi", "adc"],
    ["ED", "ES", "run-1", "run-2", "pre", "post"],
    ["20190304", "2021-05-06", "scan_1", "scan_2"],
]


def subjects(*names: str) -> dict[str, str]:
    return subjects_by_name(names, "top").of


def groups(*names: str) -> list[list[str]]:
    out = defaultdict(list)
    for name, subject in subjects(*names).items():
        out[subject].append(name)
    return sorted(sorted(group) for group in out.values())


@pytest.mark.parametrize(
    "names",
    [
        ("followup_1009", "followup_1010", "visit1_1009", "visit1_1010", "baseline_1010"),
        ("followup-09", "visit1-09", "followup-10", "visit1-10"),
        ("study/session_07", "study/T1_07", "study/session_08", "study/T1_08"),
        ("visit_1009", "visit_1010"),
    ],
)
def test_a_number_behind_a_visit_may_be_a_persons(names):
    people = {re.search(r"\d+$", name)[0] for name in names}
    assert groups(*names) == sorted(sorted(n for n in names if n.endswith(person)) for person in people)


@pytest.mark.parametrize(
    "names", [("P01/visit_101", "P01/visit_102"), ("ann_visit_1", "ann_visit_2"), ("visit_1", "visit_2")]
)
def test_a_number_of_a_visit_is_no_person(names):
    assert groups(*names) == [sorted(names)]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(PEOPLE),
    st.lists(st.sampled_from(SCANS), min_size=1, max_size=2, unique_by=lambda kind: kind[0]),
    st.integers(2, 12),
    st.sampled_from(["_", "-", "."]),
    st.sampled_from(["behind", "before", "folder", "above"]),
    st.data(),
)
def test_scans_that_differ_in_visit_side_or_series_are_never_split(person, kinds, people, between, where, data):
    owner = {}
    for n in range(people):
        for _ in range(data.draw(st.integers(1, 4))):
            words = between.join(data.draw(st.sampled_from(kind)) for kind in kinds)
            name = {
                "behind": f"{person(n)}{between}{words}",
                "before": f"{words}{between}{person(n)}",
                "folder": f"{person(n)}/{words}",
                "above": f"{words}/{person(n)}",
            }[where]
            owner[name] = n
    found = subjects(*owner)
    split = assign([(subject, name) for name, subject in found.items()], (0.5, 0.2, 0.3), 0)
    of: dict[int, set[str]] = defaultdict(set)
    splits: dict[int, set[str]] = defaultdict(set)
    for name, n in owner.items():
        of[n].add(found[name])
        splits[n].add(split[found[name]])
    assert all(len(names) == 1 for names in of.values()), of
    assert all(len(names) == 1 for names in splits.values())
    assert len(set(found.values())) == len(set(owner.values())), found


@pytest.mark.parametrize(
    "names",
    [
        ("amos_0001", "amos_0002", "hippocampus_001", "hippocampus_003", "chaos_21", "lung1", "lung2"),
        ("brain1", "breast1", "prostate_phantom_subvolume", "lung"),
        ("Tr/case_1", "Ts/case_1", "train/001", "train/002", "test/001"),
        tuple(f"{a}{b}{c}" for a in "RL" for b in "AP" for c in "IS"),
        tuple(f"site{site}_{n:03d}" for site in (1, 2) for n in range(1, 6)),
        ("scan_01", "scan_02", "volume-0", "volume-1", "img0001", "img0002", "pet0", "pet1", "i32", "u8"),
        ("1.3.6.1.4.1.14519.5.2.1.6279.6001.1", "1.3.6.1.4.1.14519.5.2.1.6279.6001.2"),
        ("siteA/001", "siteA/002", "siteB/001"),
        ("scan_1_abdomen", "scan_2_abdomen", "scan_3_abdomen"),
        ("chaos/p0", "chaos/p1", "kits/p0", "kits/p1"),
        ("002_S_0295", "002_S_0413", "003_S_0901"),
    ],
)
def test_unrelated_patients_stay_different_subjects(names):
    assert subjects(*names) == {name: name for name in names}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("patient001/patient001_frame01", "patient001/patient001_4d", "patient002/patient002_frame01"), [2, 1]),
        (("1000_SS", "1000_tissues", "1001_SS"), [2, 1]),
        (("P001_1", "P001_2", "P002_1"), [2, 1]),
        (("training01_01_flair", "training01_02_flair", "training02_01_flair"), [2, 1]),
        (("BraTS-GLI-00000-000", "BraTS-GLI-00000-001", "BraTS-GLI-00002-000"), [2, 1]),
        (("OAS30001_MR_d0129", "OAS30001_MR_d0757", "OAS30002_MR_d0001"), [2, 1]),
        (("P0/scan_0", "P0/scan_3", "P1/scan_1"), [2, 1]),
        (("anna/x", "anna/y", "bob/x", "bob/y"), [2, 2]),
        (("P01L", "P01R", "P02L"), [2, 1]),
        (("copd1_iBHCT", "copd1_eBHCT", "copd2_iBHCT"), [2, 1]),
        (("patient001_visit1/T1", "patient001_visit2/T1", "patient002_visit1/T1"), [2, 1]),
        (("P01_left_T1", "left_P01", "P01-frame01", "p01_V2", "P02"), [4, 1]),
        (("frame01", "frame02", "frame03"), [3]),
    ],
)
def test_scans_of_one_person_are_one_subject(names, expected):
    assert sorted(map(len, groups(*names)), reverse=True) == expected


def test_doubtful_names_are_said_with_a_pattern_that_decides():
    for names in (
        ("001_1", "001_2", "002_1"),  # put together
        ("smith_1", "smith_2", "jones_1", "jones_2"),  # kept apart
        ("anna/x", "anna/y", "bob/x", "bob/y"),
        ("red/a", "red/b", "blue/c", "blue/d"),
        ("red/scan_1", "red/scan_2", "blue/scan_1"),
    ):
        (note,) = subjects_by_name(names, "top").notes
        assert "subject_pattern='" in note
        assert "subject_table" in note
    assert subjects_by_name([f"hippocampus_{i:03d}" for i in range(9)], "top").notes == ()


def test_names_that_only_grow_keep_their_subject():
    """An append sees other names than the first ingest did."""
    first = subjects("P001_1", "P002_1", "amos_0001", "c_T1")
    assert subjects("P001_2", "P002_2", "amos_0002", "c_T2")["P001_2"] == first["P001_1"] == "P001"
    assert first["c_T1"] == subjects("c_T2", "d_T2")["c_T2"] == "c"
