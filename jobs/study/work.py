"""What a cell does, in whatever process: one result, written once, whole or not at all."""

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from jobs.configs import LabelledConfig
from jobs.finetune import score_test, train_from
from jobs.finetune.checkpoints import StoredCheckpoints
from jobs.study import cells, seal
from jobs.study.cells import Cell
from jobs.study.pretraining import clear, pretrain
from jobs.tracking import registration
from ssl_core.bundle import write_bundle
from ssl_core.bundle_card import BundleFacts
from ssl_core.config import parse
from ssl_core.downstream.finetune import FinetuneConfig, TrainedSegmenter
from ssl_core.downstream.scores import CaseSlice
from ssl_core.networks.registry import build
from ssl_core.views.intensity import IntensityPolicy
from storage.objects import join, open_store

CHECKPOINTS = "checkpoints"
"""Of fine-tunings under way, below the study; empty when it has ended."""


Say = Callable[[str], None]


@dataclass(frozen=True)
class Task:
    """A cell and what it takes to do it.

    Attributes:
        cell: What is to be done.
        cache: URL of pre-trained networks.
        study: URL of the study.
        threads: Of torch.
        gpu: Whether it may use one.
    """

    cell: Cell
    cache: str
    study: str
    threads: int
    gpu: bool


def perform(task: Task) -> dict[str, Any]:
    """Do a cell and write its result, unless that is there by now.

    Returns:
        The result: what the cell was, what came of it, how long it took, and on what.
    """
    cell, store = task.cell, open_store(task.cell.place)
    say = Murmur(cell.title).say
    # Whatever the process was started with: sums in another order of adding are other numbers.
    torch.set_num_threads(task.threads)
    began, cpu = time.monotonic(), time.process_time()
    outcome = _ACTIONS[cell.kind](task, say)
    result = {
        "kind": cell.kind,
        "title": cell.title,
        "start": cell.start,
        "labels": cell.labels,
        "draw": cell.draw,
        "seed": cell.seed,
        "spec": cell.spec,
        **outcome,
        "seconds": time.monotonic() - began,
        "cpu_seconds": time.process_time() - cpu,
        "environment": environment(),
    }
    key, content = f"{cell.key}.json", json.dumps(result).encode()
    if not store.put(key, content, if_absent=True):
        content = store.get(key)  # another worker of a killed study was first
    if cell.kind == cells.PRETRAIN:
        clear(join(task.cache, cell.key))
    elif cell.kind != cells.NETWORK:
        _checkpoints(task).clear()
    as_read: dict[str, Any] = json.loads(content)
    return as_read


class Murmur:
    """What a cell of minutes or hours says while it is under way: a line now and then, none of a short one.

    Args:
        title: Of the cell; lines of several processes are mixed.
        every_s: Least seconds before the first line, and between two.
        clock: Seconds of now.
    """

    def __init__(self, title: str, every_s: float = 60.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._title, self._every_s, self._clock = title, every_s, clock
        self._last = clock()

    def say(self, line: str) -> None:
        """Print the line, unless it is too soon."""
        now = self._clock()
        if now - self._last >= self._every_s:
            self._last = now
            print(f"  {self._title}: {line}", flush=True)


def environment() -> dict[str, str]:
    """What a result was made with."""
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        **{name: version(name) for name in ("tomoscale", "torch", "numpy")},
    }


def _network(task: Task, _say: Say) -> dict[str, Any]:
    spec = task.cell.spec
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build(spec["backbone"]["name"], **spec["backbone"]["arguments"])
    facts = BundleFacts(
        name="untrained",
        patch_DHW=tuple(spec["patch_DHW"]),
        intensity=parse(IntensityPolicy, spec["intensity"], "intensity"),
        notes=("Random weights: only its architecture and preprocessing are of use.",),
    )
    with tempfile.TemporaryDirectory(prefix="tomoscale-network-") as folder:
        bundle = write_bundle(Path(folder) / "bundle", "encoder", network, facts)
        registration.store_bundle(bundle, join(task.cache, task.cell.key))
    return {"parameters": sum(p.numel() for p in network.net.parameters())}


def _pretrain(task: Task, say: Say) -> dict[str, Any]:
    return pretrain(task.cell.spec["job"], join(task.cache, task.cell.key), gpu=task.gpu, say=say)


def _supervised(task: Task, say: Say) -> dict[str, Any]:
    spec = task.cell.spec
    settings = parse(FinetuneConfig, spec["finetune"])
    with _bundle(task, spec["network"]) as like:
        trained = _trained(task, "none", parse(LabelledConfig, spec["labelled"]), settings, like, say)
    with trained.store, tempfile.TemporaryDirectory(prefix="tomoscale-supervised-") as folder:
        facts = BundleFacts(
            name="supervised",
            patch_DHW=settings.patch_DHW,
            intensity=trained.intensity,
            labels=((0, "background"), *trained.labels.items()),
        )
        bundle = write_bundle(Path(folder) / "bundle", "segmenter", trained.network, facts)
        registration.store_bundle(bundle, join(task.cache, task.cell.key))
    return {"history": [dict(metrics) for metrics in trained.history]}


def _tuned(task: Task, labelled: LabelledConfig, say: Say) -> dict[str, Any]:
    """A fine-tuning, scored on the test subjects that `labelled` may see."""
    spec = task.cell.spec
    settings = parse(FinetuneConfig, spec["finetune"])
    with _bundle(task, spec["network"]) as like, _origin(task) as start:
        began = time.monotonic()
        trained = _trained(task, start, labelled, settings, like, say)
        trained_s = time.monotonic() - began
    with trained.store:
        record = trained.store.manifest.record
        outcome: dict[str, Any] = {
            "history": [dict(metrics) for metrics in trained.history],
            "trained_s": trained_s,
            "subjects": sorted({record(i).subject for i in trained.subjects.train}),
            "peak_gb": _peak_gb(task.gpu),
        }
        if trained.subjects.test:
            slices: dict[str, Any] = {}

            def keep(volume_id: str, mask_DHW: NDArray[Any], truth_DHW: NDArray[Any]) -> None:
                slices[volume_id] = CaseSlice.largest(mask_DHW, truth_DHW).to_json()

            cases = score_test(trained, labelled, settings, spec["nsd_tolerance_mm"], keep)
            outcome |= {"cases": [case.to_json() for case in cases], "slices": slices}
    return outcome


def _search(task: Task, say: Say) -> dict[str, Any]:
    return _tuned(task, parse(LabelledConfig, task.cell.spec["labelled"]), say)


def _test(task: Task, say: Say) -> dict[str, Any]:
    return _tuned(task, seal.open_test(task.study, task.cell.spec, task.cell.start, task.cell.labels), say)


_ACTIONS = {
    cells.NETWORK: _network,
    cells.PRETRAIN: _pretrain,
    cells.SUPERVISED: _supervised,
    cells.SEARCH: _search,
    cells.TEST: _test,
}


def _trained(
    task: Task, start: str, labelled: LabelledConfig, settings: FinetuneConfig, like: str, say: Say
) -> TrainedSegmenter:
    """A fine-tuning that says how far it is and goes on where a worker before was killed."""
    return train_from(
        start,
        labelled,
        settings,
        seed=task.cell.spec["seed"],
        like=like,
        on_epoch=lambda epoch, metrics: say(f"epoch {epoch} of {settings.epochs}, loss {metrics['loss']:.3f}"),
        gpu=task.gpu,
        checkpoints=_checkpoints(task),
    )


def _checkpoints(task: Task) -> StoredCheckpoints:
    """Of a fine-tuning, which a worker that is killed leaves to the next."""
    return StoredCheckpoints(join(task.study, CHECKPOINTS, task.cell.key))


@contextmanager
def _origin(task: Task) -> Iterator[str]:
    """What `train_from` is to start from: a folder, a model's version, or `none`."""
    origin = task.cell.spec["origin"]
    if origin in task.cell.needs:
        with _bundle(task, origin) as folder:
            yield folder
    else:
        yield origin


@contextmanager
def _bundle(task: Task, key: str) -> Iterator[str]:
    """A folder with the bundle of another cell."""
    store = open_store(join(task.cache, key, registration.FOLDER))
    with tempfile.TemporaryDirectory(prefix="tomoscale-start-") as folder:
        for name in store.list():
            target = Path(folder) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(store.get(name))
        yield folder


def _peak_gb(gpu: bool) -> float:
    """Most memory that was in use: of the device on a GPU, else resident of this process since it began."""
    if gpu:
        return torch.cuda.max_memory_allocated() / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def score(result: Mapping[str, Any]) -> float:
    """What a setting of the search is judged by: Dice on its further subjects after the last step."""
    return float(result["history"][-1]["inner_dice"])
