"""Prediction and features against the plain network, written out here step by step."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from ssl_core.bundle import write_bundle
from ssl_core.portable import Predictor
from ssl_core.portable.preprocess import Preprocess, prepare
from ssl_core.portable.preprocess import apply as portable_apply
from ssl_core.portable.preprocess import constants as portable_constants
from ssl_core.portable.safetensors import read_safetensors
from ssl_core.portable.windows import padded, slide, slide_features
from ssl_core.views.intensity import IntensityPolicy, normalise, normalise_array
from storage.errors import ConfigError, RefusedInput
from storage.geometry import canonicalise, resample
from storage.intensity_stats import STATS_ORDER, foreground_stats
from tests.kit.bundles import encoder, facts, network, scan, segmenter

__all__ = ["encoder", "segmenter"]  # fixtures


@pytest.mark.parametrize("kind", ["percentile", "unit", "ct", "zscore", "none"])
def test_intensities_are_those_of_training(kind: str) -> None:
    rng = np.random.default_rng(0)
    policy = IntensityPolicy(kind=kind)  # type: ignore[arg-type]
    for values in (rng.gamma(2, 100, (6, 7, 8)), np.full((3, 3, 3), 5.0), rng.normal(-500, 300, (6, 7, 8))):
        stats = foreground_stats(values)
        predicted = portable_apply(values, portable_constants(policy.model_dump(), stats))
        assert np.array_equal(predicted, normalise_array(values[None], (stats,), policy)[0])
        row_BCS = np.array([[[stats[key] for key in STATS_ORDER]]])
        trained = normalise(torch.from_numpy(values)[None, None], np.ones(1), np.zeros(1), row_BCS, policy)
        assert np.array_equal(predicted, trained[0, 0].numpy())


def test_prediction_is_the_network_on_the_canonical_volume(tmp_path: Path, segmenter: Path) -> None:
    """One window covers the volume, so the mask is the argmax of one forward pass."""
    source = scan(tmp_path, (20, 25, 28))
    image = nib.load(source)
    values, _ = canonicalise(np.asanyarray(image.dataobj).transpose(2, 1, 0)[None], image.affine)
    stats = foreground_stats(values)
    policy = IntensityPolicy()
    normal = normalise_array(values, (stats,), policy)
    air = normalise_array(np.array([stats["min"]]), (stats,), policy)
    room = np.full((1, 32, 32, 32), air[0], np.float32)
    corner = [(32 - n) // 2 for n in normal.shape[1:]]
    inside = tuple(slice(c, c + n) for c, n in zip(corner, normal.shape[1:], strict=True))
    room[(slice(None), *inside)] = normal
    net = network().net.eval()
    with torch.no_grad():
        classes = net(torch.from_numpy(room)[None])[0].argmax(0).numpy()[inside]
    wanted = np.array([0, 1, 7], np.uint8)[classes]
    mask = Predictor(segmenter, "cpu").predict(source)
    assert mask.dtype == np.uint8
    assert mask.shape == image.shape
    found, _ = canonicalise(mask.transpose(2, 1, 0)[None], image.affine)
    assert (found[0] == wanted).mean() > 0.9999  # blending divides and multiplies by the weight
    assert len(np.unique(mask)) > 1


def test_orientation_of_the_file_does_not_change_the_prediction(tmp_path: Path, segmenter: Path) -> None:
    predictor = Predictor(segmenter, "cpu")
    source = nib.load(scan(tmp_path))
    turned = source.as_reoriented(np.array([[2, -1], [0, 1], [1, -1]]))
    a = nib.as_closest_canonical(
        nib.Nifti1Image(predictor.predict(np.asanyarray(source.dataobj), source.affine), source.affine)
    )
    b = nib.as_closest_canonical(
        nib.Nifti1Image(predictor.predict(np.asanyarray(turned.dataobj), turned.affine), turned.affine)
    )
    assert np.array_equal(np.asanyarray(a.dataobj), np.asanyarray(b.dataobj))


def test_file_array_and_written_mask_agree(tmp_path: Path, segmenter: Path) -> None:
    predictor = Predictor(segmenter, "cpu")
    source = scan(tmp_path)
    image = nib.load(source)
    mask = predictor.predict_file(source, tmp_path / "mask.nii.gz")
    written = nib.load(tmp_path / "mask.nii.gz")
    assert np.array_equal(np.asanyarray(written.dataobj), mask)
    assert np.array_equal(written.affine, image.affine)
    assert np.array_equal(predictor.predict(np.asanyarray(image.dataobj), image.affine), mask)


def test_what_was_assumed_of_a_header_is_reported_however_a_file_is_predicted(tmp_path: Path, segmenter: Path) -> None:
    source = scan(tmp_path)
    image = nib.load(source)
    image.header["pixdim"][1:4] = 3.0  # sform says otherwise
    nib.save(image, source)
    notes: list[str] = []
    predictor = Predictor(segmenter, "cpu", report=notes.append)
    predictor.predict_file(source, tmp_path / "mask.nii.gz")
    predictor.predict(source)
    predictor.features(source)
    about = [note for note in notes if note.startswith(f"{source}: pixdim says voxels of 3 x 3 x 3, sform ")]
    assert len(about) == 3
    assert all(note.endswith("sform used") for note in about)


def test_resampling_gives_a_mask_in_the_grid_of_the_file(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", "segmenter", network(), facts(spacing_mm=(2.0, 2.0, 2.0)))
    mask = Predictor(bundle, "cpu").predict(scan(tmp_path))
    assert mask.shape == (36, 30, 41)


def test_recorded_statistics_are_not_used_for_a_volume_that_is_resampled() -> None:
    """Noise averages out in larger voxels: with the finer grid's deviation the network would see other values."""
    values = np.random.default_rng(0).normal(100, 30, (1, 16, 18, 20))
    recorded = foreground_stats(values[0])
    plan = Preprocess(1, (2.0, 2.0, 2.0), "linear", IntensityPolicy().model_dump(), (16, 16, 16), ((0, "background"),))
    for stats in (None, (recorded,)):
        prepared = prepare(values, np.eye(4), plan, stats)
        image, air = prepared.whole(), prepared.air_C
        wanted = foreground_stats(resample(values, np.eye(4), (2.0, 2.0, 2.0), "linear")[0][0])
        assert wanted["std"] < 0.7 * recorded["std"]
        table = portable_constants(plan.intensity, wanted)
        assert np.array_equal(image, portable_apply(resample(values, np.eye(4), (2.0, 2.0, 2.0), "linear")[0], table))
        assert air == portable_apply(np.array([wanted["min"]]), table)
    # On the grid that they were measured on they are used as they are.
    known = recorded | {"mean": 1.0}
    image = prepare(values, np.diag([2.0, 2.0, 2.0, 1.0]), plan, (known,)).whole()
    assert np.array_equal(image, portable_apply(values, portable_constants(plan.intensity, known)))


def test_inputs_that_do_not_fit_are_refused(tmp_path: Path, segmenter: Path, encoder: Path) -> None:
    predictor = Predictor(segmenter, "cpu")
    with pytest.raises(RefusedInput, match="channel"):
        predictor.predict(np.zeros((8, 8, 8, 3)), np.eye(4))
    with pytest.raises(RefusedInput, match="finite"):
        predictor.predict(np.full((8, 8, 8), np.nan), np.eye(4))
    with pytest.raises(ConfigError, match="affine"):
        predictor.predict(np.zeros((8, 8, 8)))
    with pytest.raises(ConfigError, match="segmenter"):
        Predictor(encoder, "cpu").predict(scan(tmp_path))


def test_volumes_smaller_than_a_window_are_padded_with_air() -> None:
    image = np.ones((2, 3, 10, 4), np.float32)
    larger, inside = padded(image, (8, 8, 8), np.array([-1, -2], np.float32))
    assert larger.shape == (2, 8, 10, 8)
    assert np.array_equal(larger[(slice(None), *inside)], image)
    assert larger[0].sum() == 120 - (640 - 120)
    assert larger[1].sum() == 120 - 2 * (640 - 120)


def test_sliding_reproduces_a_voxelwise_function() -> None:
    """Whatever the blend, a function that looks at one voxel only gives that function of the volume."""
    image = np.random.default_rng(0).normal(size=(1, 37, 22, 50)).astype(np.float32)
    found = slide(
        lambda x: torch.cat([x, x**2], 1), image, np.zeros(1, np.float32), (16, 24, 16), device=torch.device("cpu")
    )
    assert np.allclose(found.numpy(), np.concatenate([image, image**2]), atol=1e-5)


def test_features_of_a_strided_function_lie_on_one_grid() -> None:
    image = np.random.default_rng(0).normal(size=(1, 37, 22, 50)).astype(np.float32)
    pool = torch.nn.AvgPool3d((2, 4, 4))
    found = slide_features(
        pool, image, np.zeros(1, np.float32), (16, 24, 16), stride_DHW=(2, 4, 4), device=torch.device("cpu")
    )
    room = np.zeros((1, 38, 24, 52), np.float32)
    room[:, :37, :22, :50] = image
    assert found.shape == (1, 19, 6, 13)
    assert np.allclose(found.numpy(), pool(torch.from_numpy(room)[None])[0].numpy(), atol=1e-5)


def test_encoder_features_are_the_backbones(tmp_path: Path, encoder: Path) -> None:
    source = nib.load(scan(tmp_path, (32, 32, 32)))
    predictor = Predictor(encoder, "cpu")
    values, _ = canonicalise(np.asanyarray(source.dataobj).transpose(2, 1, 0)[None], source.affine)
    image = normalise_array(values, (foreground_stats(values),), IntensityPolicy())
    backbone = network(1)
    backbone.net.eval()
    with torch.no_grad():
        wanted = backbone.features(torch.from_numpy(image)[None])
    for level, maps in enumerate(wanted):
        found = predictor.features(np.asanyarray(source.dataobj), source.affine, level=level)
        assert found.shape == tuple(maps.shape[1:])
        assert np.allclose(found, maps[0].numpy(), atol=1e-4)


def test_an_encoders_features_take_no_pass_through_the_decoder(tmp_path: Path, encoder: Path) -> None:
    predictor, passed = Predictor(encoder, "cpu"), set[str]()
    for name, module in predictor.network.named_modules():
        module.register_forward_hook(lambda *_, name=name: passed.add(name))
    predictor.features(scan(tmp_path, (32, 32, 32)), level=1)
    deepest = {entry["module"] for entry in predictor.architecture["levels"][2:]}
    assert predictor.architecture["levels"][1]["module"] in passed
    assert not passed & deepest
    assert "" not in passed, "the pass ended before the network's own output"


def test_safetensors_reader_reads_what_the_package_writes_and_refuses_the_rest(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {
        "a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.tensor(True), "d": torch.randn(2, 2).bfloat16(),
        "e": torch.empty(0, 3), "f": torch.randn(2).half(), "g": torch.tensor([1, 2], dtype=torch.uint8),
    }  # fmt: skip
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, {"who": "me"})
    found = read_safetensors(path)
    assert set(found) == set(tensors)
    for key, value in tensors.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value)
    data = path.read_bytes()
    for broken in (b"", data[:20], data[:-1], b"\xff" * 8 + data[8:], data[:8] + b"x" + data[9:]):
        path.write_bytes(broken)
        with pytest.raises(RefusedInput, match=r"x\.safetensors"):
            read_safetensors(path)


AXES_MM = np.diag([1.5, 1.5, 1.5, 1.0])


@pytest.mark.parametrize(
    "empty",
    [
        np.zeros((20, 18, 16), np.int16),
        np.full((20, 18, 16), 7.5),
        (np.arange(20 * 18 * 16).reshape(20, 18, 16) % 3 == 0).astype(np.uint8),
        np.arange(20 * 18 * 16).reshape(20, 18, 16) * 1e-42,
    ],
    ids=["zeros", "constant", "mask", "below float32"],
)
def test_a_scan_without_anything_in_it_is_refused(segmenter: Path, empty: np.ndarray) -> None:
    notes: list[str] = []
    predictor = Predictor(segmenter, "cpu", notes.append)
    with pytest.raises(RefusedInput, match="after normalisation each voxel has one value"):
        predictor.predict(empty, AXES_MM)
    assert predictor.predict(empty, AXES_MM, force=True).shape == empty.shape
    assert "each voxel has one value" in notes[-1]


def test_a_scan_whose_values_float32_cannot_tell_apart_is_refused(segmenter: Path) -> None:
    values = np.random.default_rng(0).gamma(2, 100, (20, 18, 16))
    predictor = Predictor(segmenter, "cpu", lambda _note: None)
    for shifted in (values + 1e9, np.full(values.shape, 2**64 - 1, np.uint64) - values.astype(np.uint64)):
        with pytest.raises(RefusedInput, match="subtract the offset"):
            predictor.predict(shifted, AXES_MM)
    wide = values.astype(np.uint64) << np.uint64(52)
    assert np.array_equal(predictor.predict(wide, AXES_MM), predictor.predict(wide.astype(np.float64), AXES_MM))


def test_a_prediction_says_how_many_slices_are_done(segmenter: Path) -> None:
    heard: list[tuple[int, int]] = []
    values_CDHW = np.random.default_rng(0).normal(size=(1, 100, 32, 32)).astype(np.float32)
    Predictor(segmenter, "cpu").segmented(values_CDHW, np.eye(4), on_slab=lambda done, of: heard.append((done, of)))
    assert heard[0] == (0, 100)
    assert heard[-1] == (100, 100)
    assert len(heard) > 3
    assert heard == sorted(set(heard))
