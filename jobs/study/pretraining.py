"""A pre-training inside one task: the loop of one rank, whose checkpoints go to the store.

A study trains many small networks rather than one large one, so each takes one process and no group of workers. The
loop is the one that `tomoscale pretrain` runs on each rank.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from jobs import driver
from jobs.configs import PretrainConfig
from jobs.pretrain.loop import JOURNAL, Hooks, Take, run
from jobs.tracking import registration
from jobs.tracking.bundles import write_encoder
from jobs.tracking.runs import Point
from ssl_core.config import parse
from ssl_core.train.checkpoint import read_meta
from storage.errors import NotFound
from storage.objects import ByteStore, join, open_store

NEWEST = "newest"
"""Names the checkpoint to go on from; written after it."""
_POINTS = 100
"""Points of the loss that a result keeps."""


def pretrain(job: dict[str, Any], url: str, *, gpu: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Train, from the last checkpoint where there is one, and store the encoder's bundle.

    Args:
        job: The pre-training job, resolved, but for where its results go.
        url: Where checkpoints and the bundle go.
        gpu: Whether to train on a GPU.
        say: Hears its lines.

    Returns:
        Points of the loss, the last value of each probe, steps, and seconds, those before an interruption included.
    """
    driver.quiet()
    config = parse(PretrainConfig, job, "pretrain")
    store = open_store(url)
    with tempfile.TemporaryDirectory(prefix="tomoscale-pretrain-") as scratch:
        folder = Path(scratch)
        restore, before_s = _fetch(store, folder)
        began = time.monotonic()
        last: list[Path] = [] if restore is None else [restore]

        def publish(step: int, take: Take | None, _metrics: dict[str, float]) -> None:
            assert take is not None, "a single rank takes its checkpoints"
            target = folder / f"step-{step:08d}"
            if target in last:
                return
            take().save(target)
            _put(store, target, before_s + time.monotonic() - began)
            for old in last:
                shutil.rmtree(old)
                _delete(store, old.name)
            last[:] = [target]

        hooks = Hooks(publish=publish, say=say)
        device = torch.device("cuda" if gpu else "cpu")
        outcome = run(config, hooks, restore=restore, device=device)
        seconds = before_s + time.monotonic() - began
        points = [Point.from_json(item) for item in read_meta(last[-1])[JOURNAL]]
        bundle = write_encoder(config, last[-1], folder / "bundle", run_id="")
        registration.store_bundle(bundle, url)
    losses = [(point.step, point.metrics["loss"]) for point in points if "loss" in point.metrics]
    return {
        "losses": losses[:: max(1, len(losses) // _POINTS)],
        "probes": {
            name: value for point in points for name, value in point.metrics.items() if name.startswith("probe/")
        },
        "steps": int(outcome["steps"]),
        "resumed_at": 0 if restore is None else int(restore.name.removeprefix("step-")),
        "trained_s": seconds,
        "samples": outcome["samples"],
        "url": join(url, registration.FOLDER),
    }


def clear(url: str) -> None:
    """Remove the checkpoints of a pre-training whose result is written."""
    store = open_store(url)
    _delete(store, NEWEST)
    _delete(store, "step-")


def _fetch(store: ByteStore, folder: Path) -> tuple[Path | None, float]:
    """The checkpoint to go on from, in a folder, and the seconds spent on it; None where there is none."""
    try:
        note = json.loads(store.get(NEWEST))
    except NotFound:
        return None, 0.0
    name = note["name"]
    for key in store.list(f"{name}/"):
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(store.get(key))
    return folder / name, float(note["seconds"])


def _put(store: ByteStore, checkpoint: Path, seconds: float) -> None:
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file():
            store.put(f"{checkpoint.name}/{path.relative_to(checkpoint).as_posix()}", path.read_bytes())
    store.put(NEWEST, json.dumps({"name": checkpoint.name, "seconds": seconds}).encode())


def _delete(store: ByteStore, name: str) -> None:
    for key in list(store.list(name)):
        store.delete(key)
