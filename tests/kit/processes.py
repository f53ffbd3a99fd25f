"""Functions run by several processes that share a gloo group."""

import datetime
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ssl_core.distributed import Collectives


def worker(rank: int, world: int, folder: Path, parts: list[Callable[[Path], None]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=240),
    )
    try:
        for part in parts:
            part(folder)
    finally:
        dist.destroy_process_group()


def spawn(world: int, folder: Path, parts: list[Callable[[Path], None]]) -> None:
    mp.spawn(worker, args=(world, folder, parts), nprocs=world)  # type: ignore[no-untyped-call]


def fail(collectives: Collectives) -> None:
    raise ValueError(f"rank {collectives.rank} says no")


def sleep(_collectives: Collectives) -> None:
    time.sleep(600)


def identity(_collectives: Collectives) -> int:
    return os.getpid()
