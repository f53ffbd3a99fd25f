"""Whose the scans of public data sets are, and which files are their label maps, in the layouts they come in."""

from collections import defaultdict
from pathlib import Path

import pytest

from storage.ingest.discover import discover
from storage.ingest.items import Discovery
from storage.ingest.names.subjects import subjects_by_name


def laid_out(root: Path, *files: str) -> Discovery:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return discover(root)


def groups(*names: str) -> list[int]:
    out = defaultdict(list)
    for name, subject in subjects_by_name(names, "top").of.items():
        out[subject].append(name)
    return sorted(map(len, out.values()), reverse=True)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        # BraTS 2023, UPenn: the folder and the file both bear the visit
        (
            ("BraTS-GLI-00000-000/BraTS-GLI-00000-000-t1c", "BraTS-GLI-00000-001/BraTS-GLI-00000-001-t1c"),
            [2],
        ),
        (("s/UPENN-GBM-00001_11/UPENN-GBM-00001_11_T1", "s/UPENN-GBM-00001_21/UPENN-GBM-00001_21_T1"), [2]),
        (("run/lung_07_1/lung_07_1-t1", "run/lung_07_2/lung_07_2-t1", "run/lung_08_1/lung_08_1-t1"), [2, 1]),
        # ADNI: a folder a visit, and a number of the image below it
        (
            (
                "ADNI/002_S_0295/MPR/2006-04-18_08_20_30.0/I118671/ADNI_002_S_0295_MR_S118671_I118671",
                "ADNI/002_S_0295/MPR/2007-05-01_09_20_30.0/I118999/ADNI_002_S_0295_MR_S118999_I118999",
                "ADNI/003_S_0295/MPR/2006-04-18_08_20_30.0/I118672/ADNI_003_S_0295_MR_S118672_I118672",
            ),
            [2, 1],
        ),
        # AutoPET and TCIA: a folder of a visit begins with a date, month first
        (("PETCT_01140d52d8/08-13-2005-NA-PET-CT-56839/CT", "PETCT_01140d52d8/09-13-2006-NA-PET-CT-11111/CT"), [2]),
        (("fdg_4a1f8c90ec_05-30-2004-NA-PET-CT Whole", "fdg_4a1f8c90ec_06-30-2005-NA-PET-CT"), [2]),
        (
            (
                "A-0001/01-01-2000-NA-NA-30178/3000566.000000-NA-03192/scan",
                "A-0001/01-01-2001-NA-NA-30179/3000567.000000-NA-03193/scan",
                "A-0002/01-01-2000-NA-NA-30180/3000568.000000-NA-03194/scan",
            ),
            [2, 1],
        ),
        # PI-CAI: patient, then study
        (("10000/10000_1000000_t2w", "10000/10000_1000001_t2w", "10001/10001_1000002_t2w"), [2, 1]),
        # UK Biobank: person, field, visit, array
        (("1000012_20209_2_0", "1000012_20252_3_0/T1/T1", "1000025_20209_2_0"), [2, 1]),
        (("1001_2_1", "1001_3_1", "1002_2_1"), [2, 1]),
        # HCP, OASIS, CHAOS: series of a person in folders of their own
        (
            ("100307/MNINonLinear/T1w", "100307/T1w/T1w", "100408/MNINonLinear/T1w", "100408/T1w/T1w"),
            [2, 2],
        ),
        (
            ("OAS1_0061_MR1/mri/brain", "OAS1_0061_MR2/mri/T88_111/t88_gfc", "OAS1_0062_MR1/mri/brain"),
            [2, 1],
        ),
        (("1/T1DUAL/InPhase", "1/T2SPIR/image", "2/T1DUAL/InPhase", "2/T2SPIR/image"), [2, 2]),
        # Learn2Reg, PANORAMA: four and five digits count the scans of a person
        (("LungCT_0001_0000", "LungCT_0001_0001", "LungCT_0002_0000", "LungCT_0002_0001"), [2, 2]),
        (("100001_00001", "100002_00001", "100002_00002", "100003_00001"), [2, 1, 1]),
        (("ProstateX-0000/ADC", "ProstateX-0000_Finding1-t2_tse_tra0", "ProstateX-0001/ADC"), [2, 1]),
    ],
)
def test_a_person_of_a_public_layout_is_one_subject(names, expected):
    assert groups(*names) == expected


@pytest.mark.parametrize(
    "names",
    [
        ("BraTS2020/BraTS2020_00001", "BraTS2020/BraTS2020_00002", "BraTS2021/BraTS2021_00001"),
        ("site1/site1_001", "site1/site1_002", "site2/site2_001"),
        ("Training Batch 1/volume-0", "Training Batch 1/volume-1", "Training Batch 2/volume-28"),
        ("ct_train/ct_train_1001", "ct_train/ct_train_1002", "ct_train/ct_train_1003"),
        ("C1_0001", "C1_0002", "C1_0003", "C2_0001"),
        ("Singapore/50/orig/FLAIR", "Utrecht/0/orig/FLAIR", "Utrecht/2/orig/FLAIR"),
        ("siteA/001/T1", "siteA/002/T1", "siteB/003/T1"),
    ],
)
def test_people_of_one_folder_stay_different_subjects(names):
    assert groups(*names) == [1] * len(names)


def test_one_name_in_two_folders_is_said():
    notes = subjects_by_name(["siteA/001", "siteA/002", "siteB/001"], "top").notes
    assert any("siteA/001 and siteB/001" in note and "subject_pattern='" in note for note in notes)
    doubt = subjects_by_name(["10000/10000_1000000", "10000/10000_1000001", "10001/10001_1000002"], "top").notes
    assert any("10000" in note and "subject_table" in note for note in doubt)


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("imagesVa/amos_0008.nii.gz", "labelsVa/amos_0008.nii.gz"),
        ("images_val/c3.nii.gz", "masks_val/c3.nii.gz"),
        ("imagesTrain/c3.nii.gz", "labelsTrain/c3.nii.gz"),
        ("TrainingImg/train_001_0000.nii.gz", "TrainingMask/train_001.nii.gz"),
        ("Case_N006/Images/Case_N006.nii.gz", "Case_N006/Contours/Case_N006.nii.gz"),
        ("sub-s1/ses-1/sub-s1_ses-1_dwi.nii.gz", "derivatives/sub-s1/ses-1/sub-s1_ses-1_msk.nii.gz"),
        ("sub-s1/ses-2/sub-s1_ses-2_dwi.nii.gz", "derivatives/sub-s1/ses-2/sub-s1_ses-2_lesion-msk.nii.gz"),
    ],
)
def test_label_maps_of_more_layouts_are_paired(tmp_path, image, label):
    (item,) = laid_out(tmp_path, image, label).items
    assert item.images == (str(tmp_path / image),)
    assert item.label == str(tmp_path / label)


def test_a_folder_called_after_a_target_domain_holds_images(tmp_path):
    items = laid_out(tmp_path, "target_training/a_hrT2.nii.gz", "source_training/a_ceT1.nii.gz").items
    assert [item.label for item in items] == [None, None]
    assert len(items) == 2
