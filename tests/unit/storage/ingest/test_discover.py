"""Pairing by name, never by position; orphans by name."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MediaStorageDirectoryStorage, generate_uid

from storage.errors import ConfigError, RefusedInput
from storage.ingest.discover import discover
from storage.ingest.readers.dicom.series import header
from storage.ingest.readers.raw import ReadPolicy
from storage.ingest.readers.read import read_item, read_label
from storage.ingest.readers.registry import split_name
from tests.kit.scans import disc, phantom, save_dicom, save_nifti, segmentation, slices


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return root


def pairs(root: Path) -> dict[str, str | None]:
    found = discover(root)
    return {i.name: None if i.label is None else Path(i.label).relative_to(root).as_posix() for i in found.items}


@pytest.mark.parametrize(("image", "label"), [("images", "labels"), ("imagesTr", "labelsTr"), ("img", "masks")])
def test_folders_are_paired_by_name(tmp_path, image, label):
    touch(tmp_path, f"{image}/b.nii.gz", f"{image}/a.nii.gz", f"{label}/a.nii.gz", f"{label}/b.nii")
    assert pairs(tmp_path) == {"a": f"{label}/a.nii.gz", "b": f"{label}/b.nii"}


def test_orphans_are_named_and_the_unlabelled_image_is_kept(tmp_path):
    touch(tmp_path, "images/a.nii.gz", "images/b.nii.gz", "labels/b.nii.gz", "labels/c.nii.gz")
    found = discover(tmp_path)
    assert [i.name for i in found.items] == ["a", "b"]
    assert [o.source for o in found.orphans] == ["images/a.nii.gz", "labels/c.nii.gz"]
    assert "unlabelled" in str(found.orphans[0])
    assert "without an image" in str(found.orphans[1])


def test_images_alone_are_no_orphans(tmp_path):
    touch(tmp_path, "x/one.nii.gz", "x/two.nrrd", "three.mha")
    found = discover(tmp_path)
    assert [i.name for i in found.items] == ["three", "x/one", "x/two"]
    assert found.orphans == ()


def test_flat_folders_pair_by_suffix(tmp_path):
    touch(tmp_path, "p1_image.nrrd", "p1_label.nrrd", "p2.nii.gz", "p2-seg.nii.gz", "p3_mask.nii.gz")
    assert pairs(tmp_path) == {"p1": "p1_label.nrrd", "p2": "p2-seg.nii.gz"}
    assert [o.source for o in discover(tmp_path).orphans] == ["p3_mask.nii.gz"]


def test_tr_and_ts_folders_do_not_mix(tmp_path):
    touch(tmp_path, "imagesTr/a.nii.gz", "imagesTs/a.nii.gz", "labelsTr/a.nii.gz")
    assert pairs(tmp_path) == {"Tr/a": "labelsTr/a.nii.gz", "Ts/a": None}
    assert discover(tmp_path).orphans == ()


def test_channel_suffixes_are_one_volume(tmp_path):
    touch(tmp_path, "imagesTr/c_0001.nii.gz", "imagesTr/c_0000.nii.gz", "labelsTr/c.nii.gz", "imagesTr/d_0000.nii.gz")
    items = {i.name: i for i in discover(tmp_path).items}
    assert [Path(p).name for p in items["c"].images] == ["c_0000.nii.gz", "c_0001.nii.gz"]
    assert items["c"].label is not None
    assert len(items["d"].images) == 1


def test_channels_are_one_volume_where_their_folder_itself_is_ingested(tmp_path):
    """Else the channels of a patient would be subjects of their own, in training and test."""
    touch(tmp_path / "imagesTr", "a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii.gz", "b_0001.nii.gz")
    found = discover(tmp_path / "imagesTr").items
    assert [(item.name, item.subject, len(item.images)) for item in found] == [("a", "a", 2), ("b", "b", 2)]
    assert sorted(discover(tmp_path / "imagesTr" / "a_0001.nii.gz").items[0].channels) == ["0000"]
    touch(tmp_path / "images", *(f"amos_000{i}{end}.nii.gz" for i in range(3) for end in ("", "_seg")))
    assert pairs(tmp_path / "images") == {f"amos_000{i}": f"amos_000{i}_seg.nii.gz" for i in range(3)}


def test_patients_with_four_digits_are_not_channels_of_one(tmp_path):
    """As in AMOS: were they stacked, many patients would be one volume, and no label would have an image."""
    touch(tmp_path, *(f"{kind}Tr/amos_000{i}.nii.gz" for kind in ("images", "labels") for i in range(3)))
    touch(tmp_path, "imagesTs/amos_0000.nii.gz", "imagesTs/amos_0007.nii.gz", "plain/images/p_0001.nii.gz")
    found = pairs(tmp_path)
    assert found["Tr/amos_0000"] == "labelsTr/amos_0000.nii.gz"
    assert {name: label for name, label in found.items() if label is None} == {
        "Ts/amos_0000": None,
        "amos_0007": None,
        "plain/p_0001": None,
    }
    assert len(found) == 6
    assert discover(tmp_path).orphans == ()


def test_a_missing_channel_is_not_stood_in_for_by_the_next(tmp_path):
    for name in ("a_0000", "a_0001", "b_0000", "b_0002", "c_0001"):
        save_nifti(tmp_path / "images" / f"{name}.nii.gz", phantom(seed=len(name)))
    items = {item.name: item for item in discover(tmp_path).items}
    assert len(read_item(items["a"], ReadPolicy()).array_CDHW) == 2
    for name, found in (("b", "0000, 0002"), ("c", "0001")):
        with pytest.raises(RefusedInput, match=found):
            read_item(items[name], ReadPolicy())


def test_links_in_a_circle_are_followed_once(tmp_path):
    touch(tmp_path, "a/one.nii.gz", "b/two.nii.gz")
    (tmp_path / "a" / "up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "a" / "beside").symlink_to(tmp_path / "b", target_is_directory=True)
    (tmp_path / "b" / "back").symlink_to(tmp_path / "a", target_is_directory=True)
    assert sorted(pairs(tmp_path)) == ["a/beside/two", "a/one", "b/back/one", "b/two"]


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch):
    touch(tmp_path, "a/one.nii.gz", "b/two.nii.gz")
    real = os.scandir

    def closed(path: str) -> object:
        if str(path).endswith("/b"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(RefusedInput, match="/b; expected a readable folder; found Permission denied"):
        discover(tmp_path)


def test_names_that_are_no_utf_8_are_spelt_out(tmp_path):
    save_nifti(tmp_path / "a.nii.gz", phantom())
    os.rename(tmp_path / "a.nii.gz", os.fsencode(tmp_path) + b"/M\xfcller.nii.gz")
    touch(tmp_path, "b.nii.gz")
    item = discover(tmp_path).items[0]
    assert (item.name, item.subject, item.source) == ("M\\xfcller", "M\\xfcller", "M\\xfcller.nii.gz")
    np.testing.assert_array_equal(read_item(item, ReadPolicy()).array_CDHW[0], phantom())


def test_two_files_for_one_name_are_refused_each_and_the_rest_goes_on(tmp_path):
    touch(tmp_path, "images/a.nii.gz", "images/a.nrrd", "images/b.nii.gz", "labels/a.nii.gz", "labels/b.nii.gz")
    touch(tmp_path, "images/c.nii.gz", "labels/c.nii.gz", "labels/c.mha", "images/d_0000.nii", "images/d_0001.nii")
    touch(tmp_path, "images/d_0001.mha")
    found = discover(tmp_path)
    assert [(item.name, item.label is not None) for item in found.items] == [("b", True), ("c", False)]
    assert [refused.source for refused in found.refused] == [
        "images/a.nii.gz",
        "images/a.nrrd",
        "images/d_0000.nii",
        "images/d_0001.mha",
        "images/d_0001.nii",
        "labels/c.mha",
        "labels/c.nii.gz",
    ]
    assert "found a.nrrd as well" in str(found.refused[0])
    assert "labels/a.nii.gz" in [orphan.source for orphan in found.orphans]
    touch(tmp_path / "alone", "a.nii.gz", "a.nrrd")
    with pytest.raises(RefusedInput, match=r"an image volume that can be used: a.nii.gz: .*a.nrrd as well"):
        discover(tmp_path / "alone")


LAYOUTS = {
    "lits": ("volume-{}.nii", "segmentation-{}.nii"),
    "kits": ("case_0000{}/imaging.nii.gz", "case_0000{}/segmentation.nii.gz"),
    "one folder a patient": ("p{}/image.nii.gz", "p{}/label.nii.gz"),
    "any scan beside a mask": ("p{}/T1.nii.gz", "p{}/mask.nii.gz"),
    "prefix": ("p{}.nii.gz", "mask_p{}.nii.gz"),
    "acdc": ("patient00{0}/patient00{0}_frame01.nii.gz", "patient00{0}/patient00{0}_frame01_gt.nii.gz"),
    "chaos": ("images/p{}.nii.gz", "ground/p{}.nii.gz"),
    "ground truth": ("images/p{}.nii.gz", "Ground_Truth/p{}.nii.gz"),
    "btcv": ("img/img000{}.nii.gz", "label/label000{}.nii.gz"),
    "btcv in one folder": ("img000{}.nii.gz", "label000{}.nii.gz"),
    "msd": ("imagesTr/liver_00{}.nii.gz", "labelsTr/liver_00{}.nii.gz"),
    "nnunet": ("imagesTr/liver_00{}_0000.nii.gz", "labelsTr/liver_00{}.nii.gz"),
    "tissues": ("100{}_SS.nii.gz", "100{}_tissues.nii.gz"),
    "manual": ("p{}_T1.nii.gz", "p{}_manual.nii.gz"),
    "lesion": ("p{}.nii.gz", "p{}_lesion.nii.gz"),
    "truth": ("scan{}.nii.gz", "scan{}_truth.nii.gz"),
    "camel": ("p{}.nrrd", "p{}Mask.nrrd"),
    "side behind": ("p{}_left.nii.gz", "p{}_mask_left.nii.gz"),
    "scans beside masks": ("scans/p{}.nii.gz", "masks/p{}.nii.gz"),
    "labels say so again": ("images/p{}.nii.gz", "labels/p{}_seg.nii.gz"),
    "labels among images": ("images/p{}.nii.gz", "images/p{}_seg.nii.gz"),
    "bids": ("sub-0{0}/anat/sub-0{0}_T2w.nii.gz", "derivatives/labels/sub-0{0}/anat/sub-0{0}_T2w_label-SC_mask.nii.gz"),
    "bids, sessions": (
        "sub-0{0}/ses-1/anat/sub-0{0}_ses-1_T1w.nii.gz",
        "derivatives/manual/sub-0{0}/ses-1/anat/sub-0{0}_ses-1_T1w_seg-manual.nii.gz",
    ),
    "bids, no suffix": ("sub-0{0}/anat/sub-0{0}_T1w.nii.gz", "derivatives/seg/sub-0{0}/sub-0{0}_dseg.nii.gz"),
    "bids, beside": ("sub-0{0}/anat/sub-0{0}_T1w.nii.gz", "sub-0{0}/anat/sub-0{0}_T1w_desc-x_mask.nii.gz"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_label_maps_of_public_layouts_are_no_scans(tmp_path, layout):
    image, label = LAYOUTS[layout]
    touch(tmp_path, *(name.format(i) for i in (1, 2, 3) for name in (image, label)))
    found = discover(tmp_path)
    by_source = {i.source: i.label and Path(i.label).relative_to(tmp_path).as_posix() for i in found.items}
    assert by_source == {image.format(i): label.format(i) for i in (1, 2, 3)}
    assert found.orphans == ()


def test_a_label_map_that_may_be_of_several_images_is_an_orphan(tmp_path):
    touch(
        tmp_path,
        "b/p1_flair.nii.gz",
        "b/p1_t1.nii.gz",
        "b/p1_seg.nii.gz",
        "c/T1.nii.gz",
        "c/T2.nii.gz",
        "c/mask.nii.gz",
    )
    touch(tmp_path, "sub-1/anat/sub-1_T1w.nii.gz", "sub-1/anat/sub-1_T2w.nii.gz")
    for name in ("dseg", "T1w_label-GM_probseg", "space-MNI_T1w_desc-brain_mask"):
        touch(tmp_path, f"derivatives/x/sub-1/sub-1_{name}.nii.gz")
    touch(tmp_path, "sub-2/anat/sub-2_T1w.nii.gz")
    touch(tmp_path, *(f"derivatives/x/sub-2/sub-2_T1w_label-{name}_mask.nii.gz" for name in ("a", "b")))
    touch(tmp_path, "d/q.nii.gz", "d/q_mask.nii.gz", "d/q_seg.nii.gz")
    found = discover(tmp_path)
    assert all(item.label is None for item in found.items)
    assert len(found.items) == 8
    labels = [orphan.source for orphan in found.orphans if "label" in orphan.what and "unlabelled" not in orphan.what]
    assert len(labels) == 9
    assert sum("2 are, and none of them is used" in orphan.what for orphan in found.orphans) == 4
    assert found.refused == ()


def test_hidden_files_and_pixel_halves_are_not_volumes(tmp_path):
    touch(tmp_path, "a.hdr", "a.img", "b.mhd", "b.raw", "._a.nii.gz", ".git/c.nii.gz", "notes.txt", "junk")
    found = discover(tmp_path)
    assert [i.name for i in found.items] == ["a", "b"]
    assert found.ignored == ("junk", "notes.txt")


def test_empty_and_missing_folders_say_what_to_do(tmp_path):
    with pytest.raises(RefusedInput, match="an empty folder") as refused:
        discover(tmp_path)
    assert "images/" in refused.value.remedy
    with pytest.raises(ConfigError, match="no such file or folder"):
        discover(tmp_path / "nowhere")
    touch(tmp_path, "readme.md")
    with pytest.raises(RefusedInput, match="none of them an image"):
        discover(tmp_path)


def test_subjects_come_from_the_pattern_from_bids_or_from_the_name(tmp_path):
    touch(tmp_path, "sub-07/ses-1/t1.nii.gz", "sub-07/ses-2/t1.nii.gz", "other.nii.gz")
    assert sorted(i.subject for i in discover(tmp_path).items) == ["other", "sub-07", "sub-07"]
    by_folder = discover(tmp_path, r"^([a-z]+)")
    assert {i.subject for i in by_folder.items} == {"sub", "other"}
    with pytest.raises(ConfigError, match="no match"):
        discover(tmp_path, r"patient(\d+)")
    with pytest.raises(ConfigError, match="regular expression"):
        discover(tmp_path, "(")


def test_one_file_is_a_source_too(tmp_path):
    touch(tmp_path, "images/a.nii.gz")
    found = discover(tmp_path / "images" / "a.nii.gz")
    assert [i.name for i in found.items] == ["a"]


def test_zarr_folders_are_items(tmp_path):
    touch(tmp_path, "scan.ome.zarr/zarr.json", "scan.ome.zarr/0/c/0")
    assert [(i.name, i.kind) for i in discover(tmp_path).items] == [("scan.ome", "zarr")]


def test_mixed_dicom_series_are_told_apart_by_uid_not_by_folder(tmp_path):
    one, two = slices(phantom((4, 6, 5))), slices(phantom((3, 6, 5)), patient="P2")
    save_dicom(tmp_path / "exam", [*one, *two[:2]], [f"f{i}" for i in (3, 1, 0, 2, 5, 4)])
    save_dicom(tmp_path / "moved", two[2:])
    save_dicom(tmp_path / "seg", [segmentation(one, disc((4, 6, 5)))])
    (tmp_path / "exam" / "notes.txt").write_text("not dicom")
    index = Dataset()
    index.file_meta = FileMetaDataset()
    index.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    index.file_meta.MediaStorageSOPClassUID = MediaStorageDirectoryStorage
    index.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    index.FileSetID = "EXAM"
    index.save_as(tmp_path / "exam" / "DICOMDIR", enforce_file_format=True)
    found = discover(tmp_path)
    assert sorted(len(i.images) for i in found.items) == [3, 4]
    by_patient = {i.subject: i for i in found.items}
    assert by_patient["P1"].label is not None
    assert by_patient["P2"].label is None
    assert found.ignored == ("exam/notes.txt",)


def test_a_dicom_file_with_a_damaged_header_is_named(tmp_path):
    """Without its first slice a series looks whole, so that nothing else would say that it is not."""
    save_dicom(tmp_path, slices(phantom((8, 6, 6))))
    first = sorted(tmp_path.iterdir())[0]
    data = bytearray(first.read_bytes())
    data[136:138] = b"\x00\x00"
    first.write_bytes(bytes(data))
    (tmp_path / "notes.txt").write_text("none of DICOM")
    found = discover(tmp_path)
    assert [len(item.images) for item in found.items] == [7]
    assert [(o.source, "damaged" in o.what) for o in found.orphans] == [(first.name, True)]
    assert found.ignored == tuple(sorted([first.name, "notes.txt"]))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_dicom_file_cut_anywhere_in_its_header_is_no_error(tmp_path):
    """One raised would end the ingest of all the others."""
    save_dicom(tmp_path, slices(phantom((1, 2, 2))))
    path = tmp_path / "IM0000"
    whole = path.read_bytes()
    assert header(path) is not None
    for length in range(132, 480):
        path.write_bytes(whole[:length])
        found = header(path)
        assert found is None or "PixelData" not in found


def test_a_slice_cut_within_its_header_has_its_series_refused(tmp_path):
    datasets = slices(phantom((8, 6, 6)))
    del datasets[7].Rows, datasets[7].Columns, datasets[7].PixelData
    save_dicom(tmp_path, datasets)
    (item,) = discover(tmp_path).items
    with pytest.raises(RefusedInput, match="file 8 of the series"):
        read_item(item, ReadPolicy())


def test_an_empty_slice_is_named(tmp_path):
    """A copy that stopped leaves one, and a series without its last slice looks whole."""
    save_dicom(tmp_path / "a", slices(phantom((8, 6, 6))))
    save_dicom(tmp_path / "b", slices(phantom((8, 6, 6))), [f"{k}.dcm" for k in range(8)])
    touch(tmp_path / "a", "readme")
    for path in (tmp_path / "a" / "IM0007", tmp_path / "b" / "7.dcm"):
        path.write_bytes(b"")
    found = discover(tmp_path)
    assert [len(item.images) for item in found.items] == [7, 7]
    assert [o.source for o in found.orphans] == ["a/IM0007", "b/7.dcm"]


def test_series_without_a_patient_belong_to_the_subject_of_their_study(tmp_path):
    """Else two sequences of one examination could be split."""
    one, two = slices(phantom((4, 6, 5)), patient=""), slices(phantom((4, 6, 5), 1), patient="")
    for ds in two:
        ds.StudyInstanceUID = one[0].StudyInstanceUID
    save_dicom(tmp_path / "t1", one)
    save_dicom(tmp_path / "t2", two)
    save_dicom(tmp_path / "other", slices(phantom((4, 6, 5), 2), patient=""))
    subjects = [item.subject for item in discover(tmp_path).items]
    assert subjects.count(str(one[0].StudyInstanceUID)) == 2
    assert len(set(subjects)) == 2


@pytest.mark.parametrize("kind", ["LABELMAP", "FRACTIONAL"])
@pytest.mark.parametrize("beside", [False, True])
def test_a_segmentation_that_cannot_be_read_sinks_no_image_and_displaces_no_other(tmp_path, kind, beside):
    one = slices(phantom((4, 6, 5)))
    save_dicom(tmp_path / "ct", one)
    label = segmentation(one, disc((4, 6, 5)))
    if kind == "LABELMAP":
        label.SOPClassUID = label.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.66.7"
    label.SegmentationType = kind
    save_dicom(tmp_path / "a_seg", [label])
    if beside:
        save_dicom(tmp_path / "z_seg", [segmentation(one, disc((4, 6, 5)))])
    result = discover(tmp_path)
    (item,) = result.items
    assert [o.source for o in result.orphans] == ["a_seg/IM0000"]
    assert "cannot be read" in result.orphans[0].what
    image = read_item(item, ReadPolicy())
    read = read_label(item, ReadPolicy(), image)
    assert (read is not None) == beside


def test_studies_without_a_patient_are_said_and_a_pattern_decides(tmp_path):
    for at, folder in enumerate(("P1/v1", "P1/v2", "P2/v1")):
        save_dicom(tmp_path / folder, slices(phantom((4, 6, 5), at), patient=""))
    (note,) = discover(tmp_path).notes
    assert "series of 3 studies have no patient id" in note
    pattern = note.split("'")[1]
    assert [item.subject for item in discover(tmp_path, pattern).items] == ["P1", "P1", "P2"]


def test_patient_ids_that_differ_in_case_are_one_subject(tmp_path):
    for at, patient in enumerate(("MR7", "mr7", "MR8")):
        save_dicom(tmp_path / str(at), slices(phantom((4, 6, 5), at), patient=patient))
    assert [item.subject for item in discover(tmp_path).items] == ["MR7", "MR7", "MR8"]


def test_a_segmentation_without_its_series_is_an_orphan(tmp_path):
    one = slices(phantom((4, 6, 5)))
    save_dicom(tmp_path / "seg", [segmentation(one, disc((4, 6, 5)))])
    save_nifti(tmp_path / "a.nii.gz", phantom())
    assert [o.what for o in discover(tmp_path).orphans] == ["segmentation of a series that is not here"]


def test_split_name():
    assert split_name("A.NII.GZ") == ("A", ".nii.gz")
    assert split_name("a.b.mha") == ("a.b", ".mha")
    assert split_name("IM0001") == ("IM0001", "")
    assert split_name(".nii") == (".nii", "")
