"""A bundle knows what it learned from: scans are brought to its spacing, and what is far from it is refused."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from jobs.cli import main as cli
from jobs.tracking.model_code import Bundle
from ssl_core.bundle import write_bundle
from ssl_core.bundle_card import training_data
from ssl_core.portable import Predictor
from ssl_core.portable.geometry import back_to_grid, to_canonical
from ssl_core.portable.predictor import check_bundle
from ssl_core.portable.training_data import TrainingData
from ssl_core.views.intensity import IntensityPolicy
from storage.errors import RefusedInput
from storage.geometry import resample
from storage.intensity_stats import STATS_ORDER
from tests.kit.bundles import SPACING, facts, learned, network
from tests.kit.phantoms import write_phantoms

HU = (dict.fromkeys(STATS_ORDER, (-900.0, 1500.0)) | {"p0_5": (-900.0, -500.0)},)
CT = {"modalities": ("CT",), "intensities": HU}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("b") / "mr", "segmenter", network(), facts(training=learned()))


@pytest.fixture(scope="module")
def ct_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    about = facts(training=learned(**CT), intensity=IntensityPolicy(kind="ct"))
    return write_bundle(tmp_path_factory.mktemp("b") / "ct", "segmenter", network(), about)


def scan(spacing_mm: tuple[float, float, float] = SPACING, field_mm: float = 60.0, seed: int = 0) -> tuple[Any, Any]:
    """Foreground of a few hundred, as an array in file order and its affine; RAS, so that D, H, W are k, j, i."""
    shape = [max(4, round(field_mm / s)) for s in spacing_mm[::-1]]
    array = np.random.default_rng(seed).gamma(2.0, 100.0, shape).astype(np.float32)
    return array, np.diag([*spacing_mm[::-1], 1.0])


def notes_of(bundle: Path, array: Any, affine: Any, **options: Any) -> tuple[Any, list[str]]:
    notes: list[str] = []
    return Predictor(bundle, "cpu", notes.append).predict(array, affine, **options), notes


def test_a_scan_at_the_spacing_of_training_keeps_its_grid(bundle: Path, tmp_path: Path) -> None:
    silent = write_bundle(tmp_path / "b", "segmenter", network(), facts())
    for rounding in (1.0, 1 + 1e-5):
        array, affine = scan()
        mask, notes = notes_of(bundle, array, affine * rounding / np.array([1, 1, 1, rounding]))
        assert notes == []
        assert np.array_equal(mask, notes_of(silent, array, affine)[0])


@pytest.mark.parametrize("spacing", [(2.0, 1.5, 3.0), (1.0, 0.75, 0.75), (4.0, 3.0, 1.5), (2.0, 1.5, 1.6)])
def test_a_scan_of_another_spacing_is_seen_at_that_of_training(
    bundle: Path, spacing: tuple[float, float, float]
) -> None:
    array, affine = scan(spacing)
    mask, (note,) = notes_of(bundle, array, affine)
    assert mask.shape == array.shape
    assert "resampled to 2x1.5x1.5 mm" in note
    volume = to_canonical("scan", array, affine)
    resampled, grid = resample(volume.values_CDHW, volume.affine, SPACING, "linear")
    classes = back_to_grid(
        Predictor(bundle, "cpu").segment(resampled, grid), SPACING, volume.values_CDHW.shape[1:], spacing
    )
    assert np.array_equal(mask, volume.to_file(classes))


def test_within_the_spacings_of_training_none_is_changed() -> None:
    mixed = learned(spacing_mm=((1.0, 1.0, 1.0), (3.0, 2.0, 2.0)))
    assert mixed.nearest_spacing((2.9, 1.0, 1.4)) is None
    assert mixed.nearest_spacing((5.0, 0.5, 1.4)) == (3.0, 1.0, 1.4)


def _ct() -> tuple[Any, Any]:
    array, affine = scan()
    return np.round(array * 2 - 1000).astype(np.int16), affine


FAR = {
    "voxels of 0.001 mm": (lambda: (scan()[0], np.diag([0.001, 0.001, 0.001, 1])), "times as small"),
    "voxels four times as large": (lambda: scan((8.0, 6.0, 6.0)), "4 times as large"),
    "a field of view of a few mm": (lambda: (scan()[0][:3, :3, :3], scan()[1]), "field of view"),
    "a CT": (_ct, "a CT by its values, where it learned from MR"),
}


@pytest.mark.parametrize("kind", sorted(FAR))
def test_what_is_far_from_training_is_refused_or_forced(bundle: Path, kind: str) -> None:
    make, words = FAR[kind]
    array, affine = make()
    with pytest.raises(RefusedInput, match=words) as caught:
        Predictor(bundle, "cpu").predict(array, affine)
    assert "--force" in str(caught.value)
    mask, notes = notes_of(bundle, array, affine, force=True)
    assert mask.shape == array.shape
    assert any(words in note for note in notes)


def test_an_mr_is_refused_by_a_model_of_ct(ct_bundle: Path) -> None:
    array, affine = scan()
    with pytest.raises(RefusedInput, match="no value below 0, where it learned from CT"):
        Predictor(ct_bundle, "cpu").predict(array, affine)
    assert notes_of(ct_bundle, *_ct())[1] == []
    with pytest.raises(RefusedInput, match="foreground intensities"):
        Predictor(ct_bundle, "cpu").predict(_ct()[0] / 1000, affine)
    volume = to_canonical("scan", *_ct())
    with pytest.raises(RefusedInput, match="modality PT"):
        Predictor(ct_bundle, "cpu").segment(volume.values_CDHW, volume.affine, modality="PT")


def test_what_is_a_little_outside_is_noted(bundle: Path) -> None:
    assert "field of view" in notes_of(bundle, scan()[0][:18], scan()[1])[1][0]
    assert "foreground intensities" in notes_of(bundle, scan()[0] - 300, scan()[1])[1][0]


def test_a_bundle_that_does_not_say_what_it_learned_from_is_read_with_a_note(tmp_path: Path) -> None:
    path = write_bundle(tmp_path / "b", "segmenter", network(), facts())
    plan = json.loads((path / "preprocess.json").read_text())
    del plan["training"]  # as versions before wrote it
    (path / "preprocess.json").write_text(json.dumps(plan))
    card = json.loads((path / "bundle.json").read_text())
    card["files"]["preprocess.json"] = hashlib.sha256((path / "preprocess.json").read_bytes()).hexdigest()
    (path / "bundle.json").write_text(json.dumps(card))
    check_bundle(path)
    array, affine = scan((8.0, 6.0, 6.0))
    notes: list[str] = []
    predictor = Predictor(path, "cpu", notes.append)
    assert predictor.predict(array, affine).shape == array.shape
    predictor.predict(array, affine)
    (note,) = notes
    assert "does not say which spacing" in note


def test_the_record_comes_from_the_training_volumes(tmp_path: Path) -> None:
    records = list(write_phantoms((tmp_path / "store").as_uri(), 3).records())
    records[0] = replace(records[0], spacing_mm=(2.0, 1.0, 1.0), modality="MR")
    records[1] = replace(records[1], notes=("resampled from 3x0.5x1 to 1x1x1 mm (D, H, W), bspline",))
    data = training_data(records)
    assert data.volumes == 3
    assert "MR" in data.modalities
    assert data.spacing_mm == ((1.0, 1.0, 1.0), (2.0, 1.0, 1.0))
    assert data.source_mm == ((1.0, 0.5, 1.0), (3.0, 1.0, 1.0))
    assert data.field_mm[1][0] == 2.0 * records[0].shape_DHW[0]
    assert data.intensities[0]["p99_5"][1] == max(record.stats[0]["p99_5"] for record in records)
    assert TrainingData.parse(json.loads(json.dumps(data.dump()))) == data


@pytest.mark.parametrize("kind", ["MR at 4 mm", *sorted(FAR)])
def test_the_registered_model_and_the_command_line_do_the_same(
    bundle: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    array, affine = FAR[kind][0]() if kind in FAR else scan((4.0, 3.0, 3.0))
    source, target = tmp_path / "scan.nii.gz", tmp_path / "mask.nii.gz"
    nib.save(nib.Nifti1Image(array, affine), source)
    model = Bundle()
    context = SimpleNamespace(artifacts={"bundle": str(bundle)}, model_config={"device": "cpu"})
    model.load_context(context)
    words = ["predict", str(bundle), str(source), str(target)]
    if kind in FAR:
        assert cli.main(words) == 3
        assert FAR[kind][1] in capsys.readouterr().err
        with pytest.raises(Exception, match=FAR[kind][1]):
            model.predict(context, str(source))
        words.append("--force")
        context.model_config["force"] = True
        model.load_context(context)
    with pytest.warns(UserWarning, match=FAR[kind][1] if kind in FAR else "resampled to"):
        mask = model.predict(context, {"image": array, "affine": affine})
    assert cli.main(words) == 0
    assert "note: " in capsys.readouterr().err
    assert np.array_equal(np.asanyarray(nib.load(target).dataobj), mask)


def test_a_dictionary_without_its_affine_is_refused_by_name(bundle: Path) -> None:
    model = Bundle()
    model.load_context(SimpleNamespace(artifacts={"bundle": str(bundle)}, model_config={"device": "cpu"}))
    array, affine = scan()
    for item, words in (
        ({"image": array}, "expected its affine"),
        ({"affine": affine}, "dictionary; expected `image`"),
        ({"image": array, "afine": affine}, "afine"),
    ):
        with pytest.raises(Exception, match=words):
            model.predict(None, item)
