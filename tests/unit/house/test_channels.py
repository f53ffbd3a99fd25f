"""Channels of different scales: each is normalised and padded by its own values, from the file to the network.

The second channel is the first times 100 plus 1000, so that under every policy that goes by a volume's statistics the
network has to see the same values in both.
"""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ssl_core.bundle import write_bundle
from ssl_core.bundle_card import BundleFacts
from ssl_core.downstream.finetune import predict_volume
from ssl_core.networks import build
from ssl_core.portable import Predictor
from ssl_core.portable.preprocess import Preprocess, prepare
from ssl_core.views.intensity import IntensityPolicy, normalise, normalise_array
from ssl_core.views.make import make_views
from ssl_core.views.placement_size import host_size
from ssl_core.views.types import RoleSpec, ViewSpec
from storage.errors import ConfigError, CorruptChunk, RefusedInput
from storage.format import manifest as manifest_module
from storage.format import manifest_rows
from storage.format.manifest import Manifest
from storage.format.records import stats_to_items
from storage.ingest.discover import discover
from storage.ingest.pipeline import run
from storage.ingest.policy import IngestPolicy
from storage.ingest.prepare import prepare as ingest
from storage.ingest.publishing.claims import Sidecar, side_key
from storage.ingest.readers.raw import ReadPolicy
from storage.intensity_stats import STATS_ORDER, channel_foreground, foreground_stats
from storage.objects import open_store
from storage.reading.verify import verify
from storage.reading.volume_store import Crop, VolumeStore
from storage.stream.crop_stream import CropStream
from storage.stream.plan import StreamSpec
from storage.testing.phantoms import publish_phantoms
from tests.kit.records import record
from tests.kit.scans import disc, phantom, save_nifti

SHAPE = (10, 12, 14)
WINDOW = (16, 16, 16)
BY_STATS = ("percentile", "zscore", "unit")
POLICY = IngestPolicy(split=(0.5, 0.0, 0.5), read=ReadPolicy(four_d="channels"))


def pair(seed: int) -> NDArray[np.int16]:
    """(2, D, H, W)."""
    first = phantom(SHAPE, seed, level=200)
    return np.stack([first, first * 100 + 1000])


@pytest.fixture(scope="module", params=["int16", "float32"])
def source(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Files of two channels: whole numbers, and numbers that int16 cannot hold for both channels alike."""
    root = tmp_path_factory.mktemp("files")
    for i in range(4):
        values = pair(i).astype(request.param)
        if request.param == "float32":
            values[0] += np.random.default_rng(i).uniform(0, 0.9, SHAPE).astype(np.float32)
            values[1] = values[0] * 100 + 1000
        save_nifti(root / "images" / f"case_{i:02d}.nii.gz", values)
        save_nifti(root / "labels" / f"case_{i:02d}.nii.gz", disc(SHAPE))
    return root


@pytest.fixture(scope="module")
def store(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VolumeStore]:
    url = tmp_path_factory.mktemp("store").as_uri()
    assert run(str(source), url, POLICY).published == 4
    with VolumeStore(url) as opened:
        yield opened


def test_ingest_measures_each_channel(store: VolumeStore) -> None:
    for found in store.manifest.records():
        assert found.channels == len(found.stats) == 2
        values = store.read_volume(found.volume_id) * found.scale + found.offset
        for channel, stats in zip(values, found.stats, strict=True):
            assert stats == pytest.approx(foreground_stats(channel), rel=1e-5)
        assert found.stats[1]["std"] == pytest.approx(100 * found.stats[0]["std"], rel=1e-5)
    again = Manifest.from_records(store.manifest.records(), store.manifest.dataset)
    assert again.fingerprint == store.manifest.fingerprint
    assert verify(store.url).ok


@pytest.mark.parametrize("kind", BY_STATS)
def test_views_of_both_channels_are_equal(store: VolumeStore, kind: str) -> None:
    spec = ViewSpec((RoleSpec("a", 2, WINDOW, scale=(0.9, 1.2), intensity="none"),))
    wanted = StreamSpec(seed=0, global_batch=4, crop_DHW=host_size(spec), lanes=4, split="")
    with CropStream(store, wanted) as stream:
        batch = next(stream)
    assert batch.stats_BCS.shape == (4, 2, len(STATS_ORDER))
    policy = IntensityPolicy(kind=kind)  # type: ignore[arg-type]
    for view in make_views(batch, spec, seed=0, policy=policy).roles["a"]:
        first, second = view.image_BCDHW.unbind(1)
        assert first.std() > 0.05
        assert view.valid_B1DHW.min() == 0, "padding is in the view"
        torch.testing.assert_close(first, second, atol=2e-4, rtol=0)


def seen_by(module: torch.nn.Module) -> list[torch.Tensor]:
    """What the network is given from now on, each (B, C, D, H, W)."""
    found: list[torch.Tensor] = []
    module.register_forward_pre_hook(lambda _, given: found.append(given[0].clone()))
    return found


@pytest.mark.parametrize("kind", BY_STATS)
def test_a_bundle_gives_the_network_what_fine_tuning_gave_it(
    store: VolumeStore, source: Path, tmp_path: Path, kind: str
) -> None:
    policy = IntensityPolicy(kind=kind)  # type: ignore[arg-type]
    network = build("unet", channels=[4, 8], strides=[2], in_channels=2, out_channels=3)
    labels = {1: "one", 2: "two"}
    facts = BundleFacts("m", WINDOW, policy, ((0, "background"), *labels.items()))
    predictor = Predictor(write_bundle(tmp_path / "b", "segmenter", network, facts), "cpu")
    trained, predicted = seen_by(network.net), seen_by(predictor.network)
    mask = predict_volume(network, store, 1, labels=labels, policy=policy, window=WINDOW, device=torch.device("cpu"))
    found = store.manifest.record(1)
    from_file = predictor.predict(source / found.source)
    values = store.read_volume(found.volume_id) * np.float64(found.scale) + found.offset
    from_store = predictor.segment(values, np.array(found.affine).reshape(4, 4), found.stats)
    assert len(trained) == 1
    assert trained[0].shape == (1, 2, *WINDOW)
    first, second = trained[0].unbind(1)
    assert first.std() > 0.05
    torch.testing.assert_close(first, second, atol=2e-4, rtol=0)
    assert len(predicted) == 2
    for given in predicted:  # the same padding around it, too
        torch.testing.assert_close(given, trained[0], atol=2e-4, rtol=0)
    assert (mask == from_file.T).mean() > 0.99
    assert (from_store == mask).mean() > 0.99


def test_beyond_the_border_each_channel_holds_its_own_minimum(store: VolumeStore) -> None:
    for found in store.manifest.records():
        crop = store.read(Crop(found.volume_id, (-3, 0, 0), (3, 4, 5)))
        for channel, stats in zip(crop, found.stats, strict=True):
            assert len(np.unique(channel)) == 1
            assert float(channel[0, 0, 0]) * found.scale + found.offset == pytest.approx(stats["min"])
        assert found.stats[1]["min"] > 1000
        partly = store.read(Crop(found.volume_id, (-3, 0, 0), (6, 4, 5)))
        np.testing.assert_array_equal(partly[:, :3], crop)
        np.testing.assert_array_equal(partly[:, 3:], store.read_volume(found.volume_id)[:, :3, :4, :5])


def test_foreground_is_each_channels_own() -> None:
    """A bright half in one channel says nothing of what is bright in the other."""
    values = np.random.default_rng(0).normal(100, 5, (2, 8, 8, 8))
    values[0, :4], values[1, 4:] = 0, 0
    mask, stats = channel_foreground(values)
    assert mask.all()
    assert stats == tuple(map(foreground_stats, values))
    assert all(channel["min"] > 50 for channel in stats)
    alone, _ = channel_foreground(np.stack([values[0], np.zeros((8, 8, 8))]))
    assert not alone[:4].any(), "a channel of one value does not say where the body is"
    assert channel_foreground(np.zeros((2, 3, 3, 3)))[0].all()


@pytest.mark.parametrize("other", ["zero", "constant", "one voxel", "negative"])
def test_a_channel_without_foreground_stays_finite(tmp_path: Path, other: str) -> None:
    values = np.stack([phantom(SHAPE).astype(np.float32), np.zeros(SHAPE, np.float32)])
    values[1] = {"constant": 1e6, "negative": -3.7}.get(other, 0)
    if other == "one voxel":
        values[1, 4, 4, 4] = 1e5
    save_nifti(tmp_path / "case.nii.gz", values)
    (item,) = discover(str(tmp_path)).items
    ready = ingest(item, POLICY.model_copy(update={"label_maps": "keep"}))  # two values are asked about
    back = ready.stored_CDHW * np.float64(ready.scale) + ready.offset
    assert any("channel 1" in note for note in ready.notes) is (other != "one voxel")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in BY_STATS:
            policy = IntensityPolicy(kind=kind)  # type: ignore[arg-type]
            out = normalise_array(back, ready.stats, policy)
            plan = Preprocess(2, None, "linear", policy.model_dump(), WINDOW, ((0, "background"),))
            prepared = prepare(values, np.eye(4), plan)
            portable, air = prepared.whole(), prepared.air_C
            assert np.isfinite(out).all()
            assert np.isfinite(portable).all()
            assert np.isfinite(air).all()
            np.testing.assert_allclose(out[0], portable[0], atol=2e-4)
            if other != "one voxel":
                np.testing.assert_allclose(out[1], 0, atol=0.01)  # half a step of int16 over both channels
                np.testing.assert_array_equal(portable[1], 0)


@pytest.mark.parametrize("unit", [1e-9, 1e-3, 1e9])
def test_the_unit_of_a_channel_does_not_matter(unit: float) -> None:
    """Diffusion in m^2/s is of the order of 1e-9: no reason to take it for a constant."""
    values = pair(0).astype(np.float64) * unit
    for kind in BY_STATS:
        policy = IntensityPolicy(kind=kind)  # type: ignore[arg-type]
        out = normalise_array(values, channel_foreground(values)[1], policy)
        plan = Preprocess(2, None, "linear", policy.model_dump(), WINDOW, ((0, "background"),))
        assert out[0].std() > 0.05
        np.testing.assert_allclose(out[0], out[1], atol=2e-4)
        np.testing.assert_array_equal(out, prepare(values, np.eye(4), plan).whole())


def test_statistics_of_the_first_channel_only_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As an earlier version wrote them. Volumes of one channel read as ever, under the fingerprint that they had."""
    for name, channels in (("one", 1), ("two", 2)):
        url = (tmp_path / name).as_uri()
        published, _ = publish_phantoms(url, [(8, 9, 10)], channels=channels)
        with monkeypatch.context() as earlier:
            earlier.setattr(manifest_rows, "stats_to_items", lambda stats: stats_to_items(stats[:1]))
            old = Manifest.from_records(published.records(), published.dataset)
        old.write(open_store(url))
        if channels == 1:
            assert old.fingerprint == published.fingerprint
            assert list(Manifest.open(url).records()) == list(published.records())
            continue
        with pytest.raises(CorruptChunk, match=r"phantom-000.*12 would be.*first channel only.*ingest"):
            Manifest.open(url).record(0)


def test_another_format_of_the_manifest_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as later:
        later.setattr(manifest_module, "FORMAT", "17")
        data = manifest_module._to_parquet([record()], {})
    with pytest.raises(CorruptChunk, match="expected a manifest of format 1; found format 17") as caught:
        Manifest.from_bytes(data)
    assert "ingest again" in caught.value.remedy


def test_side_records_of_an_earlier_run_are_not_taken_for_this_ones() -> None:
    """One that died, before every channel had statistics: its volume is read again."""
    store = open_store("memory://side-records")
    mine = Sidecar("v00000", "ab", "native/1", record(stats=record().stats * 2, channels=2))
    mine.save(store)
    assert Sidecar.load(store, "v00000") == mine
    data = json.loads(store.get(side_key("v00000")))
    data["record"]["stats"] = data["record"]["stats"][0]
    store.put(side_key("v00000"), json.dumps(data).encode())
    assert Sidecar.load(store, "v00000") is None


def test_other_numbers_of_statistics_are_refused() -> None:
    """Arrays of length one would broadcast over all channels."""
    with pytest.raises(ConfigError, match="one of each channel"):
        record(channels=2)
    values = pair(0)
    stats = channel_foreground(values)[1]
    policy = IntensityPolicy()
    plan = Preprocess(2, None, "linear", policy.model_dump(), WINDOW, ((0, "background"),))
    with pytest.raises(ConfigError, match="expected 2, one of each channel"):
        normalise_array(values, stats[:1], policy)
    with pytest.raises(RefusedInput, match="expected 2, one of each channel"):
        prepare(values, np.eye(4), plan, stats[:1])
    one = np.ones(3, np.float32)
    with pytest.raises(ConfigError, match="stats_BCS"):
        normalise(torch.zeros(3, 2, 4, 4, 4), one, one, np.ones((3, 1, len(STATS_ORDER)), np.float32), policy)
