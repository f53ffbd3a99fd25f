"""The silent failures that users of other libraries met, by name; each must be an error here, or cannot happen.

That gradients are not off by the world size is in `tests/distributed/test_engine_ranks.py`, which has the processes.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs.pretrain import loop as pretrain_loop
from jobs.tracking import bundles as bundling
from ssl_core.downstream.finetune import Start, build_segmenter
from storage.errors import CorruptChunk, TomoscaleError
from storage.format.manifest import Manifest
from storage.objects import open_store
from storage.reading.volume_store import VolumeStore
from storage.stream.crop_stream import CropStream
from storage.stream.plan import StreamSpec
from storage.testing.streams import rows
from tests.kit.phantoms import write_phantoms
from tests.kit.pretraining import config, train

BATCH = 4
SPEC = StreamSpec(seed=3, global_batch=BATCH, crop_DHW=(8, 8, 8), lanes=8, crops_per_visit=2, split="train")


@pytest.fixture
def data(tmp_path: Path) -> str:
    url = (tmp_path / "store").as_uri()
    write_phantoms(url, 8)
    return url


def read(url: str, batches: int, found: list[Any]) -> None:
    with VolumeStore(url, Manifest.open(url)) as store, CropStream(store, SPEC) as stream:
        for _ in range(batches):
            found += rows(next(stream))


def test_corrupt_scans_are_not_swapped_for_others(data: str) -> None:
    whole: list[Any] = []
    read(data, 12, whole)
    manifest = Manifest.open(data)
    # The volume that is met last, so that much comes before it.
    met = list(dict.fromkeys(row[1] for row in whole))
    assert len(met) > 1
    damaged = manifest.record(met[-1]).volume_id
    store = open_store(data)
    (shard,) = [key for key in store.list(f"volumes/{damaged}/0/") if "/c/" in key]
    voxels = bytearray(store.get(shard))
    voxels[len(voxels) // 3] ^= 1
    store.put(shard, bytes(voxels))
    found: list[Any] = []
    with pytest.raises(CorruptChunk, match=damaged) as caught:
        read(data, 12, found)
    assert shard in str(caught.value), "the key is named"
    first = next(i for i, row in enumerate(whole) if row[1] == met[-1])
    assert found == whole[: first // BATCH * BATCH], "what came before is as it was, and nothing came after"


@pytest.mark.parametrize("at", [3, 6])
def test_a_resume_skips_no_data(data: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = config(data, "simclr", steps=8, checkpoint_every=3)
    seen: list[int] = []
    plain = pretrain_loop.make_views

    def watched(batch: Any, *arguments: Any, **more: Any) -> Any:
        seen.extend(batch.sample_B.tolist())
        return plain(batch, *arguments, **more)

    monkeypatch.setattr(pretrain_loop, "make_views", watched)
    whole, _ = train(job, tmp_path / "whole")
    assert seen == list(range(8 * BATCH))
    seen.clear()
    resumed, _ = train(job, tmp_path / "resumed", tmp_path / "whole" / f"step-{at}")
    assert seen == list(range(at * BATCH, 8 * BATCH)), "each sample once: none left out, none a second time"
    assert resumed["samples"] == whole["samples"], "and they are the same voxels"


def test_the_stream_is_not_empty_after_the_first_epoch(data: str) -> None:
    found: list[Any] = []
    read(data, 12, found)
    volumes = [row[1] for row in found]
    visits = 6 * SPEC.crops_per_visit  # six of the eight volumes are in the training split
    assert len(volumes) >= 3 * visits
    assert [row[0] for row in found] == list(range(len(found)))
    assert len(set(found)) == len(found), "no crop of an earlier epoch comes again"


@pytest.mark.parametrize("fault", ["renamed", "left out", "added", "cut"])
def test_weights_that_did_not_load_are_an_error(fault: str, data: str, tmp_path: Path) -> None:
    """A bundle whose digests are right and whose tensors are not those of its network."""
    job = config(data, "simclr", steps=1, warmup_steps=0)
    train(job, tmp_path / "run")
    bundle = bundling.write_encoder(job, tmp_path / "run" / "step-1", tmp_path / "bundle", run_id="r")
    start(bundle)
    weights = load_file(bundle / "weights.safetensors")
    name = sorted(weights)[0]
    if fault == "renamed":
        weights[f"module.{name}"] = weights.pop(name)
    elif fault == "left out":
        del weights[name]
    elif fault == "added":
        keys = json.loads((bundle / "architecture.json").read_text())
        keys["encoder_keys"].append("another.weight")
        (bundle / "architecture.json").write_text(json.dumps(keys))
        weights["another.weight"] = torch.zeros(1)
    else:
        weights[name] = weights[name][:1].clone()
    save_file(weights, bundle / "weights.safetensors")
    card = json.loads((bundle / "bundle.json").read_text())
    for file in ("architecture.json", "weights.safetensors"):
        card["files"][file] = hashlib.sha256((bundle / file).read_bytes()).hexdigest()
    (bundle / "bundle.json").write_text(json.dumps(card))
    with pytest.raises(TomoscaleError) as caught:
        start(bundle)
    assert ("another.weight" if fault == "added" else name) in str(caught.value)


def start(bundle: Path) -> None:
    """What a fine-tuning does with the encoder that it is given."""
    encoder = bundling.pull_encoder(str(bundle))
    build_segmenter(encoder.backbone, encoder.arguments, 2, 0, Start("encoder", encoder.weights))
