"""Sliding windows slab by slab: the whole-volume result to the last bit, with a window's depth in memory."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from ssl_core.portable.windows import gaussian, padded, slide, slide_slabs
from tests.kit import ROOT

CPU = torch.device("cpu")
CASES = [
    ((37, 22, 50), (16, 24, 16), 4),  # padded along H, flush ends, batches across rows
    ((16, 16, 16), (16, 16, 16), 4),
    ((5, 6, 30), (8, 8, 8), 3),
    ((41, 17, 19), (8, 16, 12), 1),
    ((33, 9, 9), (7, 5, 9), 5),
]


def _network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Conv3d(2, 3, 3, padding=1).requires_grad_(False)


def test_slabs_are_monais_sliding_window_to_the_last_bit() -> None:
    from monai.data.utils import compute_importance_map
    from monai.inferers.utils import sliding_window_inference

    network, air = _network(), np.array([-1.5, 0.5], np.float32)
    for shape, window, batch in CASES:
        image = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
        expected_weight = compute_importance_map(window, mode="gaussian", sigma_scale=0.125)
        assert torch.equal(gaussian(window), expected_weight)
        larger, inside = padded(image, window, air)
        expected = sliding_window_inference(
            torch.from_numpy(larger)[None], window, batch, network, overlap=0.5, mode="gaussian", sigma_scale=0.125
        )
        assert isinstance(expected, torch.Tensor)
        scores = slide(network, image, air, window, device=CPU, batch=batch)
        assert torch.equal(scores, expected[0][(slice(None), *inside)]), shape


@pytest.mark.parametrize(("shape", "window", "batch"), CASES)
def test_each_part_is_read_once_and_given_out_once(
    shape: tuple[int, int, int], window: tuple[int, int, int], batch: int
) -> None:
    image = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    reads: list[tuple[int, int]] = []

    def read(start: int, stop: int) -> np.ndarray:
        reads.append((start, stop))
        return image[:, start:stop]

    slabs = slide_slabs(_network(), read, shape, np.zeros(2, np.float32), window, device=CPU, batch=batch)
    places = [(start, start + scores.shape[1]) for start, scores in slabs]
    for spans in (reads, places):
        assert spans[0][0] == 0
        assert spans[-1][1] == shape[0]
        assert all(before[1] == after[0] for before, after in pairwise(spans))
        assert max(stop - start for start, stop in spans) <= window[0]


PEAK = """
import re
import numpy as np, torch
from ssl_core.portable.windows import slide, slide_slabs
torch.set_num_threads(1)
shape, classes, window = (384, 64, 64), 32, (8, 32, 32)
def network(x): return torch.cat([x * k for k in range(classes)], 1)
def read(start, stop): return np.full((1, stop - start, *shape[1:]), 0.5, np.float32)
def peak(): return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
air, how = np.zeros(1, np.float32), {"device": torch.device("cpu"), "overlap": 0.0}
for _ in slide_slabs(network, read, (16, 64, 64), air, window, **how): pass
before, mask = peak(), np.empty(shape, np.uint8)
for start, scores in slide_slabs(network, read, shape, air, window, **how):
    mask[start : start + scores.shape[1]] = scores.argmax(0).numpy()
slabs = peak()
slide(network, read(0, shape[0]), air, window, **how)
print(slabs - before, peak() - before)
"""


def test_a_deep_volume_takes_the_memory_of_a_windows_depth() -> None:
    """Scores of 384 slices are 201 MB; those of a window's depth 4 MB."""
    scores = 32 * 384 * 64 * 64 * 4
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", PEAK], env=environment, capture_output=True, text=True, check=True)
    slabs, whole = map(int, run.stdout.split())
    assert slabs < 0.15 * scores, "what the bound is below"
    assert whole > 0.5 * scores, "and the whole above; importing torch took some of the room that it has"


def test_nothing_is_left_of_inference_mode_between_slabs() -> None:
    slabs = slide_slabs(
        _network(), lambda a, b: np.ones((2, b - a, 8, 8), np.float32), (24, 8, 8), np.zeros(2, np.float32), (8, 8, 8),
        device=CPU,
    )  # fmt: skip
    for _, scores in slabs:
        assert not torch.is_inference_mode_enabled()
        assert not scores.requires_grad


def test_a_mask_of_a_store_is_read_slab_by_slab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it is read as a whole, and no crop is deeper than a window and a row of chunks."""
    from jobs.predict.scans import scans_of
    from ssl_core.portable import Predictor
    from storage.reading import slabs as reading
    from storage.reading.volume_store import VolumeStore
    from tests.kit.phantoms import write_phantoms
    from tests.kit.small_models import segmenter_bundle

    url = (tmp_path / "store").as_uri()
    write_phantoms(url, 1, shape=(150, 16, 17))
    predictor = Predictor(segmenter_bundle(tmp_path / "b"), "cpu", lambda _note: None)
    with VolumeStore(url) as store:
        record = store.manifest.record(0)
        values = store.read_volume(record.volume_id) * record.scale + record.offset
    affine = np.array(record.affine).reshape(4, 4)
    expected = predictor.segment(values, affine, record.stats)
    monkeypatch.setattr(reading, "PART", 1)
    depths: list[int] = []
    many = VolumeStore.read_many
    monkeypatch.setattr(
        VolumeStore, "read_many", lambda self, crops, label=None: depths.append(crops[0].size_DHW[0])
        or many(self, crops, label),
    )  # fmt: skip
    (scan,) = scans_of(url)
    frame, slabs = scan.read().admitted(predictor, "v")
    mask = predictor.segment(slabs, frame.affine, record.stats)
    assert np.array_equal(mask, expected)
    assert len(np.unique(mask)) > 1
    assert max(depths) <= record.chunk_DHW[0] < 150
    assert sum(depths) == 2 * 150, "once for its range of values, once for its windows"
