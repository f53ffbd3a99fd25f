"""Training done again on this machine's CPU, from a checkpoint to a step, by as many ranks as it was done by.

One rank runs in this process. Several are processes that talk over loopback (gloo), since their sums have other bits
than those of one rank.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from jobs.configs import PretrainConfig, ProbeConfig
from jobs.driver import quiet
from jobs.pretrain.loop import Hooks, Take, run
from ssl_core.config import parse
from storage.errors import StackError


@dataclass(frozen=True)
class Span:
    """Steps to do again.

    Attributes:
        settings: The resolved configuration of the run.
        fingerprint: Of its manifest.
        restore: Directory of the checkpoint to begin from; None for the beginning.
        after: Step of that checkpoint, or 0.
        until: The last step.
        out: Directory of the checkpoint to write after it.
        world: Ranks.
        threads: Of each rank; sums are split by thread.
    """

    settings: Mapping[str, Any]
    fingerprint: str
    restore: str | None
    after: int
    until: int
    out: str
    world: int
    threads: int


def replay(span: Span) -> None:
    """Do the steps of a span.

    Raises:
        StackError: a rank of several ended with an error; carries its last line.
        TomoscaleError: whatever training raises.
    """
    if span.world == 1:
        before = torch.get_num_threads()
        torch.set_num_threads(span.threads)
        try:
            train(span)
        finally:
            torch.set_num_threads(before)
        return
    with tempfile.TemporaryDirectory(prefix="tomoscale-ranks-") as folder:
        plan = Path(folder) / "span.json"
        plan.write_text(json.dumps(vars(span)), encoding="utf-8")
        settings = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": str(span.threads)}
        ranks: list[tuple[subprocess.Popen[bytes], Path]] = []
        try:
            for rank in range(span.world):
                log = Path(folder) / f"rank-{rank}.log"
                command = [sys.executable, "-m", "jobs.replay.ranks", str(plan), str(rank)]
                with log.open("wb") as file:
                    ranks.append((subprocess.Popen(command, env=settings, stdout=file, stderr=file), log))
            codes = [process.wait() for process, _ in ranks]
        finally:
            for process, _ in ranks:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        if any(codes):
            logs = [log.read_text(encoding="utf-8", errors="replace").strip() for _, log in ranks]
            lines = [text.splitlines()[-1] for text, code in zip(logs, codes, strict=True) if code and text]
            raise StackError(
                f"replay of steps {span.after + 1} to {span.until} by {span.world} ranks",
                expected="all of them to end well",
                found=lines[0] if lines else f"exit codes {codes}",
                remedy="each rank holds a whole model: give it more memory, or replay an earlier step",
            )


def train(span: Span) -> None:
    """One rank's part, without probes, which change nothing; the last rank-0 state is written to `out`."""
    job = parse(PretrainConfig, dict(span.settings))
    engine = job.engine.model_copy(update={"probe_every": 0, "checkpoint_every": job.engine.steps})
    blind = {"engine": engine, "probe": ProbeConfig(label=None), "fingerprint": span.fingerprint}
    turns = iter(range(span.after + 1, span.until))

    def stop() -> bool:
        return next(turns, None) is None  # asked before each step; the one that it stops is done

    def publish(_step: int, take: Take | None, _metrics: dict[str, float]) -> None:
        if take is not None:
            take().save(span.out)

    restore = None if span.restore is None else Path(span.restore)
    run(job.model_copy(update=blind), Hooks(publish=publish, stop=stop), restore=restore, device=torch.device("cpu"))


def main(plan: str, rank: int) -> None:
    """One rank of several; see `replay`."""
    quiet()
    span = Span(**json.loads(Path(plan).read_text(encoding="utf-8")))
    torch.set_num_threads(span.threads)
    dist.init_process_group("gloo", init_method=f"file://{plan}.group", rank=rank, world_size=span.world)
    try:
        train(span)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
