"""The simulated cohort: deterministic, smooth, labelled, and called what it is."""

import hashlib
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from storage.datasets import simulated as cohort
from storage.errors import ConfigError
from storage.ingest.pipeline import run
from storage.ingest.policy import IngestPolicy


def digests(folder: Path) -> dict[str, str]:
    """Of decoded voxels: gzip stores the time of writing."""
    out = {}
    for path in sorted(folder.rglob("*.nii.gz")):
        image = nib.load(path)
        out[str(path.relative_to(folder))] = hashlib.sha256(np.asarray(image.dataobj).tobytes()).hexdigest()
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return cohort.ensure(tmp_path_factory.mktemp("cohort") / "a", 4, 3)


def test_it_is_deterministic_by_seed_and_cached(made, tmp_path):
    again = cohort.ensure(tmp_path / "b", 4, 3)
    assert digests(again) == digests(made)
    assert len(set(digests(made).values())) == 8
    other = cohort.ensure(tmp_path / "c", 4, 4)
    assert not set(digests(other).values()) & set(digests(made).values())
    first = next((made / "images").iterdir()).stat().st_mtime_ns
    assert cohort.ensure(made, 4, 3) == made
    assert next((made / "images").iterdir()).stat().st_mtime_ns == first


def test_more_subjects_leave_the_first_ones_as_they_are(made, tmp_path):
    more = digests(cohort.ensure(tmp_path / "more", 5, 3))
    assert {k: more[k] for k in digests(made)} == digests(made)


def test_every_subject_has_every_structure_on_both_sides(made):
    for path in sorted((made / "labels").iterdir()):
        image = nib.load(path)
        label = np.asarray(image.dataobj)
        assert label.shape == (48, 56, 48)
        assert set(np.unique(label)) == {0, 1, 2, 3}
        for value in cohort.STRUCTURES:
            where = nib.affines.apply_affine(image.affine, np.argwhere(label == value))
            volume_ml = len(where) * 8 / 1000
            assert 3 < volume_ml < 60
            assert where[:, 0].min() < -8 < 8 < where[:, 0].max()


def test_images_look_like_a_head(made):
    for path in sorted((made / "images").iterdir()):
        image = np.asarray(nib.load(path).dataobj).astype(float)
        label = np.asarray(nib.load(made / "labels" / path.name).dataobj)
        assert image.min() >= 0
        assert (image > 0.2 * np.percentile(image, 99)).mean() > 0.6  # the box lies inside the brain
        white = np.percentile(image[label == 0], 90)
        assert 0.4 * white < np.median(image[label > 0]) < 1.05 * white  # grey matter nuclei are darker than white


def test_the_warp_is_smooth_and_keeps_orientation():
    for number in range(5):
        flow = cohort.diffeomorphism(np.random.Generator(np.random.Philox(key=[0, number])))
        assert flow.shape == (3, *cohort.SHAPE_DHW)
        assert 1.0 < float(np.sqrt((flow**2).mean())) < 8.0
        # Jacobian of place + displacement; axes run d, h, w and components r, a, s
        gradient = np.stack([np.stack(np.gradient(c, cohort.SPACING_MM)[::-1]) for c in flow])
        jacobian = np.moveaxis(gradient, (0, 1), (-2, -1)) + np.eye(3)
        assert np.linalg.det(jacobian).min() > 0.05


def test_it_says_that_it_is_simulated(made, tmp_path):
    assert "SIMULATED" in (made / "README.txt").read_text()
    assert json.loads((made / "dataset.json").read_text())["simulated"] is True
    report = run(str(made), (tmp_path / "store").as_uri(), IngestPolicy(split=(0.5, 0, 0.5)))
    assert report.manifest.dataset["simulated"] is True
    assert report.manifest.dataset["labels"] == {"1": "hippocampus", "2": "thalamus", "3": "putamen"}
    assert {r.modality for r in report.manifest.records()} == {"MR"}
    assert report.orphans == ()


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(ConfigError, match="other files"):
        cohort.ensure(tmp_path, 2, 0)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(ConfigError, match="1 to 9999"):
        cohort.ensure(tmp_path / "x", 0)


def test_a_cohort_of_another_kind_is_replaced_whole(made, tmp_path):
    path = cohort.ensure(tmp_path / "c", 2, 0)
    cohort.ensure(path, 4, 3)
    assert digests(path) == digests(made)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_without_the_template_package_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(cohort, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"tomoscale\[local\]"):
        cohort.ensure(tmp_path / "x", 2, 0)
    assert list(tmp_path.iterdir()) == []
