"""Many nodes, many volumes and many steps, pretended on one machine: which costs grow with which of them.

Manifest, order, lanes, checkpoints and chain are the product's own. What runs nowhere here is the network between the
ranks: of the collectives only the work of one rank on what it gets is measured. All times are processor time.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from jobs.bench import measure
from jobs.bench.size.process import SHARE
from jobs.pretrain.loop import SampleRecord
from ssl_core.train import checkpoint
from ssl_core.train.chain import ROW, Chain
from ssl_core.train.checkpoint import Snapshot
from storage.errors import TomoscaleError
from storage.stream.crop_stream import HostBatch

VOLUME_COLUMNS = {
    "volumes": "volumes",
    "size_mib": "manifest MiB",
    "publish_s": "publish s",
    "publish_mib": "publish peak MiB",
    "open_s": "open s",
    "open_requests": "requests to open",
    "open_mib": "MiB to open",
    "open_memory_mib": "memory, opened MiB",
    "memory_mib": "memory, at work MiB",
    "resume_s": "to the first batch of a late step s",
}
STEP_COLUMNS = {
    "volumes": "volumes",
    "nodes": "nodes",
    "order_ms": "order and lanes ms a step",
    "plan_ms": "with crops and facts ms a step",
    "requests_1000": "requests for facts, 1000 steps",
    "mib_1000": "MiB for facts, 1000 steps",
}
DIGEST_COLUMNS = {"nodes": "nodes", "digest_ms": "digest of samples ms a step", "gathered_kib": "KiB gathered a step"}
CHECKPOINT_COLUMNS = {
    "steps": "steps done",
    "take_ms": "taken while training waits ms",
    "write_s": "written s",
    "read_s": "read and linked s",
    "size_mib": "MiB",
}


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured.

    Attributes:
        nodes: Ascending; one rank each.
        volumes: Ascending.
        planned: Steps planned for each row.
        done: Steps done at the checkpoints.
        late: The step that the stream goes on from.
    """

    nodes: tuple[int, ...] = (1, 10, 100, 1000)
    volumes: tuple[int, ...] = (1000, 10_000, 100_000, 1_000_000)
    planned: int = 300
    done: tuple[int, ...] = (1000, 10_000, 100_000, 1_000_000)
    late: int = 1_000_000


QUICK = Size(nodes=(1, 10), volumes=(600,), planned=8, done=(1000,))


def bench_size(size: Size, *, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure; see the module.

    Raises:
        TomoscaleError: ranks together read other crops than one rank alone.
    """
    began = time.perf_counter()
    facts = measure.machine()
    volume_rows: list[dict[str, Any]] = []
    step_rows: list[dict[str, Any]] = []
    same: dict[str, Any] = {}
    for volumes in size.volumes:
        say(f"{volumes:,} volumes")
        with tempfile.TemporaryDirectory(prefix="bench-size-") as folder:
            published = _apart({"verb": "publish", "folder": folder, "volumes": volumes})
            read = _apart(
                {
                    "verb": "read",
                    "folder": folder,
                    "nodes": list(size.nodes),
                    "steps": size.planned,
                    "late": size.late,
                }
            )
            step_rows += [{"volumes": volumes, **row} for row in read.pop("rows")]
            volume_rows.append({"volumes": volumes, **published, **read})
            if volumes == size.volumes[0]:
                say(f"the crops of {size.nodes[-1]} ranks and of one")
                same = _apart({"verb": "same", "folder": folder, "nodes": size.nodes[-1], "steps": 2})
    if not same["equal"]:
        raise TomoscaleError("order", expected=f"the crops of one rank from {same['nodes']}", found="others")
    say("digests and checkpoints")
    return {
        "volumes": volume_rows,
        "steps": step_rows,
        "same": same,
        "digests": [_digest(nodes) for nodes in size.nodes],
        "checkpoints": [_checkpoint(steps) for steps in size.done],
        "machine": facts,
        "took_s": time.perf_counter() - began,
    }


def format_size(result: dict[str, Any]) -> str:
    """The tables as text."""
    return "\n\n".join(
        [
            measure.headline(result["machine"]),
            measure.table(result["steps"], STEP_COLUMNS),
            measure.table(result["volumes"], VOLUME_COLUMNS),
            measure.table(result["digests"], DIGEST_COLUMNS),
            measure.table(result["checkpoints"], CHECKPOINT_COLUMNS),
            same_text(result["same"]),
        ]
    )


def same_text(same: dict[str, Any]) -> str:
    """What was compared, as a sentence."""
    return (
        f"The {same['crops']:,} crops of the first steps of {same['nodes']:,} ranks together are those that one rank "
        f"alone would read: {'yes' if same['equal'] else 'no'}."
    )


def _apart(task: dict[str, Any]) -> dict[str, Any]:
    """Run a verb of `process` in a process of its own, whose memory is its own."""
    command = [sys.executable, "-m", "jobs.bench.size.process", json.dumps(task)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if ended.returncode:
        raise TomoscaleError(f"bench size, {task['verb']}", expected="a result", found=f"exit code {ended.returncode}")
    result: dict[str, Any] = json.loads(ended.stdout)
    return result


class _Gathered:
    """What a rank of many gets from the others: rows like its own, of the samples that are theirs."""

    rank = 0
    overlaps = False

    def __init__(self, world: int) -> None:
        self.world = world

    def gather(self, x_B: Tensor) -> Tensor:
        rows = x_B.repeat(self.world, 1)
        rows[:, 0] = torch.arange(len(rows))
        return rows

    def mean(self, x: Tensor) -> Tensor:
        return x

    def sum(self, x: Tensor) -> Tensor:
        return x

    def begin_sum(self, x: Tensor) -> Callable[[], Tensor]:
        return lambda: x


def _digest(nodes: int, repeats: int = 20) -> dict[str, Any]:
    """The digest of samples of one rank of many."""
    zeros = np.zeros(SHARE, dtype=np.int64)
    batch = cast(HostBatch, _Batch(zeros, zeros, np.zeros((SHARE, 3), dtype=np.int64), np.zeros((SHARE, 1, 2, 2, 2))))
    record, ranks = SampleRecord(), _Gathered(nodes)
    record.add(batch, ranks)
    start = time.process_time()
    for _ in range(repeats):
        record.add(batch, ranks)
    spent = time.process_time() - start
    return {"nodes": nodes, "digest_ms": 1000 * spent / repeats, "gathered_kib": 48 * SHARE * nodes / 1024}


@dataclass(frozen=True)
class _Batch:
    sample_B: Any
    volume_B: Any
    start_B3: Any
    image_BCDHW: Any


def _checkpoint(steps: int) -> dict[str, Any]:
    """A checkpoint after so many steps, of a model of nothing: chain, position and facts."""
    chain = Chain({"configuration": "0" * 64, "manifest": "0" * 32})
    chain.start({"world": 1})
    chain.rows += os.urandom(ROW * steps)
    chain.weights.update((step, "0" * 64) for step in range(chain.every, steps + 1, chain.every))
    chain.head()  # linked as it went
    facts = {"step": steps, "stream": {"seed": 0, "next": steps * SHARE}, "samples": "0" * 64, "journal": []}
    with tempfile.TemporaryDirectory(prefix="bench-size-") as folder:
        path = Path(folder) / "checkpoint"
        times = [time.process_time()]
        snapshot = Snapshot.of({"chain": chain.state()}, facts)
        times.append(time.process_time())
        snapshot.save(path)
        times.append(time.process_time())
        state, _meta = checkpoint.load(path)
        again = Chain.from_state(state["chain"])
        head = again.head()
        times.append(time.process_time())
        size = sum(file.stat().st_size for file in path.iterdir())
    if head != chain.head():
        raise TomoscaleError("chain", expected=chain.head(), found=head)
    taken, written, read = np.diff(times).tolist()
    return {"steps": steps, "take_ms": 1000 * taken, "write_s": written, "read_s": read, "size_mib": size / 2**20}
