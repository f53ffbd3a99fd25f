"""Scans that take turns along one series, told by stacks, private elements, or the order of numbers and times alone."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from tests.kit.dicom_files import framed, read, refusal
from tests.kit.scans import phantom, slices

COUNT = 8
TRUTH = phantom((COUNT, 8, 10))


def of(**changes: Any) -> list[Dataset]:
    """A series of eight slices; each change is a function of the slice."""
    datasets = slices(TRUTH, intercept=0, modality=changes.pop("modality", "MR"))
    for k, ds in enumerate(datasets):
        for keyword, value in changes.items():
            setattr(ds, keyword, value(k))
    return datasets


def hour(k: int, turn: int) -> str:
    return f"{10 + turn:02d}0000.{k:03d}"


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"InstanceNumber": lambda k: k // 2 + 1 + COUNT // 2 * (k % 2)}, "InstanceNumber"),
        ({"InstanceNumber": lambda k: 100 - (k // 2 + COUNT // 2 * (k % 2))}, "InstanceNumber"),
        ({"InstanceNumber": lambda k: k // 2 + 1}, "InstanceNumber"),
        ({"InstanceNumber": lambda k: k % 4 + 1}, "InstanceNumber"),  # block beside block
        ({"AcquisitionTime": lambda k: hour(k, k % 2)}, "AcquisitionTime"),
        ({"AcquisitionTime": lambda k: hour(0, k % 2), "modality": "CT"}, "AcquisitionTime"),
        ({"AcquisitionDateTime": lambda k: f"2020010{1 + k % 2}{hour(k, 0)}"}, "AcquisitionDateTime"),
        ({"ContentTime": lambda k: hour(k, k % 2)}, "ContentTime"),
    ],
)
def test_scans_that_only_their_order_tells_apart_are_not_joined(tmp_path, changes, name):
    refused = refusal(tmp_path, of(**changes))
    assert "several that take turns" in refused.found
    assert name in refused.found
    assert "2020" not in str(refused)


def test_a_scan_in_two_passes_is_read_with_a_note(tmp_path):
    """2-D MR measures every second slice first; its images are numbered along it."""
    raw = read(tmp_path, of(AcquisitionTime=lambda k: f"10{4 * (k % 2):02d}00.{k:03d}"))
    np.testing.assert_array_equal(raw.array_CDHW[0], TRUTH)
    assert any("AcquisitionTime of slices goes through them 2 times: passes of one scan" in n for n in raw.notes)


@pytest.mark.parametrize(
    "changes",
    [
        {"InstanceNumber": lambda k: 40 - 3 * k},
        {"InstanceNumber": lambda _k: 1},
        {"InstanceNumber": lambda k: k + 1, "AcquisitionTime": lambda k: hour(k, 0), "modality": "CT"},
        {"InstanceNumber": lambda k: [5, 3, 8, 1, 7, 2, 6, 4][k]},
        {"InstanceNumber": lambda k: k // 2 + 4 * (k % 2), "AcquisitionTime": lambda k: hour(k, 0)},  # renumbered
        {"AcquisitionTime": lambda k: hour(0, k // 4)},  # station after station
        {"ContentTime": lambda k: hour([1, 0, 3, 2, 5, 4, 7, 6][k], 0), "modality": "CT"},
    ],
)
def test_orders_of_one_scan_are_taken(tmp_path, changes):
    raw = read(tmp_path, of(**changes))
    np.testing.assert_array_equal(raw.array_CDHW[0], TRUTH)
    assert not any("passes" in note for note in raw.notes)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_scans_that_interleave_in_any_pattern_are_not_joined(tmp_path_factory, data):
    """Every slice of two or three scans belongs to a random one; numbers count through one scan after the other."""
    scans = data.draw(st.integers(2, 3))
    owner = data.draw(st.permutations([x for x in range(scans) for _ in range(4)]))
    spans = [(owner.index(x), len(owner) - 1 - owner[::-1].index(x)) for x in range(scans)]
    if any(max(a[0], b[0]) > min(a[1], b[1]) for a, b in itertools.pairwise(spans)):
        return
    datasets = slices(phantom((len(owner), 8, 10)), intercept=0)
    for number, k in enumerate(sorted(range(len(owner)), key=lambda k: (owner[k], k))):
        datasets[k].InstanceNumber = number + 1
    assert "InstanceNumber" in refusal(tmp_path_factory.mktemp("any"), datasets).found


@pytest.mark.parametrize("how", ["interleaved", "adjoining"])
@pytest.mark.parametrize("by", ["StackID", "index"])
def test_two_stacks_of_one_multi_frame_object_are_not_joined(tmp_path, how, by):
    def content(one: Dataset) -> Dataset:
        frame, inner = Dataset(), Dataset()
        k = round(float(one.ImagePositionPatient[2]) / 2)
        stack = k % 2 if how == "interleaved" else k // 4
        if by == "StackID":
            inner.StackID = str(stack + 1)
        else:
            inner.DimensionIndexValues = [stack + 1, k + 1]
        frame.FrameContentSequence = [inner]
        return frame

    pointers = ["EffectiveEchoTime", "InStackPositionNumber"] if by == "index" else []
    refused = refusal(tmp_path, [framed(of(), content, pointers)])
    assert ("StackID" if by == "StackID" else "dimension index of EffectiveEchoTime") in refused.found


@pytest.mark.parametrize(
    ("group", "element", "creator", "vr", "values"),
    [
        (0x0043, 0x2F, "GEMS_PARM_01", "SS", (0, 1)),
        (0x0043, 0x2F, "GEMS_PARM_01", "SS", (9, 10)),
        (0x2005, 0x11, "Philips MR Imaging DD 001", "CS", ("W", "F")),
    ],
)
def test_phases_that_vendors_write_privately_tell_images_apart(tmp_path, group, element, creator, vr, values):
    datasets = of()
    for k, ds in enumerate(datasets):
        ds.private_block(group, creator, create=True).add_new(element, vr, values[k % 2])
    assert "ComplexImageComponent" in refusal(tmp_path / "in turn", datasets).found
    twice = of() + of()
    for k, ds in enumerate(twice):
        ds.SeriesInstanceUID = ds.StudyInstanceUID = "1.2.3"
        ds.private_block(group, creator, create=True).add_new(element, vr, values[k // COUNT])
        if k >= COUNT:
            ds.PixelData = (TRUTH[k % COUNT] + np.int16(7)).tobytes()
    refused = refusal(tmp_path / "at one position", twice)
    assert "ComplexImageComponent" in refused.found
    assert "read.four_d" in refused.remedy
