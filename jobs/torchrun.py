"""The pre-training loop without Ray: `torchrun --nproc-per-node 2 -m jobs.torchrun CONFIG [--out FOLDER]`.

For a single machine with no cluster, and as the yardstick of what Ray Train costs. Checkpoints go to the folder; the
newest is resumed from, and a lease there keeps a second run of the name out. Metrics are written beside them, one JSON
line a report; nothing is registered. SIGTERM and Ctrl-C end the run with a checkpoint after the step under way.
"""

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

from jobs.certificate import document, signing
from jobs.certificate.captures import Captures
from jobs.configs import PretrainConfig
from jobs.driver import guarded
from jobs.lease import Lease
from jobs.output import write_page
from jobs.pretrain.loop import KIND, Hooks, Take, collectives_backend, run
from jobs.tracking.runs import Point
from ssl_core.config import load, resolved
from ssl_core.distributed import current
from storage.objects import open_store


class Lines:
    """A file of points, one JSON line each, every step once.

    Args:
        path: The file. What a killed run has written of steps that come again, or only in part, is taken out first.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._known = path, not path.exists()

    def add(self, item: Point) -> None:
        """Append a point; steps ascend."""
        if not self._known:
            lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]
            write_page(self._path, "".join(line for line in whole if json.loads(line)[0] < item.step))
            self._known = True
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(item.to_json()) + "\n")


def main(argv: Sequence[str]) -> int:
    """One rank."""
    usage = argparse.ArgumentParser(prog="torchrun -m jobs.torchrun")
    usage.add_argument("config", help="YAML file of a pre-training job")
    usage.add_argument("overrides", nargs="*", metavar="key=value")
    usage.add_argument("--out", type=Path, default=Path("pretrain-out"), help="folder for checkpoints and metrics")
    arguments = usage.parse_args(argv)
    config = load(PretrainConfig, Path(arguments.config), arguments.overrides)
    signing.own_key()  # a wrong file is told now, and not after the last step
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)  # or every rank keeps a context, and NCCL a communicator, on the first GPU
    dist.init_process_group(collectives_backend(gpu=cuda))
    rank = dist.get_rank()
    try:
        # The first rank alone writes; where it is refused, torchrun ends the others.
        with Lease(arguments.out.absolute().as_uri(), config.name, KIND) if rank == 0 else nullcontext():
            dist.barrier()
            steps = _train(config, arguments.out / config.name, device)
            if rank == 0 and steps == config.engine.steps:
                _certify(config, arguments.out)
    finally:
        dist.destroy_process_group()
    if steps < config.engine.steps:
        if rank == 0:
            print(
                f"stopped after step {steps} of {config.engine.steps}; the same command goes on from there", flush=True
            )
        return 128 + signal.SIGTERM
    return 0


def _certify(config: PretrainConfig, folder: Path) -> None:
    """Write the certificate of a training that has ended, while no other of its name can begin."""
    out = folder / config.name
    last = out / f"step-{config.engine.steps:08d}"
    document.issue_from(open_store(out.absolute().as_uri()), last, config.name, resolved(config))


def _train(config: PretrainConfig, out: Path, device: torch.device) -> int:
    """Train this rank until the last step or a signal; the number of steps done."""
    done = sorted(p for p in out.glob("step-*") if p.is_dir())

    def publish(step: int, take: Take | None, metrics: dict[str, float]) -> None:
        if take is not None:
            take().save(out / f"step-{step:08d}")

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    hooks = Hooks(
        publish=publish,
        on_point=Lines(out / "metrics.jsonl").add,
        is_recorded=lambda _step: True,
        say=lambda line: print(line, flush=True),
        stop=stop.is_set,
        captures=Captures(out.absolute().as_uri(), lambda line: print(line, flush=True)),
    )
    nodes_differ = os.environ["LOCAL_WORLD_SIZE"] != os.environ["WORLD_SIZE"]  # so on every rank or on none
    restore, collectives = done[-1] if done else None, current(overlap=nodes_differ)
    return int(run(config, hooks, restore=restore, device=device, collectives=collectives)["steps"])


if __name__ == "__main__":
    sys.exit(guarded(main))
