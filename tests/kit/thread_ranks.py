"""Ranks as threads of one process: any number of them in milliseconds, through the product's own collectives."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch import Tensor

from ssl_core import distributed


class ThreadGroup:
    """What `ssl_core.distributed` calls of `torch.distributed`, between threads; sums are taken in rank order.

    Args:
        world: Number of threads.
    """

    def __init__(self, world: int) -> None:
        self._world, self._local = world, threading.local()
        self._barrier = threading.Barrier(world, timeout=300)
        self._slots: list[Tensor | None] = [None] * world

    def get_rank(self) -> int:
        rank: int = self._local.rank
        return rank

    def get_world_size(self) -> int:
        return self._world

    def all_gather(self, parts: list[Tensor], x: Tensor) -> None:
        for part, value in zip(parts, self._exchange(x), strict=True):
            part.copy_(value)

    def all_reduce(self, total: Tensor, group: None = None, async_op: bool = False) -> "ThreadGroup":
        total.copy_(sum(self._exchange(total)))
        return self

    def wait(self) -> None:
        """Of a sum; it is there already."""

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """`work(rank)` of all ranks."""

        def one(rank: int) -> Any:
            self._local.rank = rank
            try:
                return work(rank)
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self._world) as pool:
            return [future.result() for future in [pool.submit(one, rank) for rank in range(self._world)]]

    def _exchange(self, x: Tensor) -> list[Tensor]:
        self._slots[self.get_rank()] = x.detach().clone()
        self._barrier.wait()
        values = [slot for slot in self._slots if slot is not None]
        self._barrier.wait()
        return values


def on_threads(monkeypatch: pytest.MonkeyPatch, world: int, work: Callable[[int], Any]) -> list[Any]:
    """`work(rank)` of all ranks, where `ssl_core.distributed.ProcessGroup()` is a group of them."""
    group = ThreadGroup(world)
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "dist", group)
        return group.run(work)
