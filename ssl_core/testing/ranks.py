"""Several gloo processes that run functions for tests, and leave nothing behind."""

import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ssl_core.distributed import ProcessGroup


class Ranks:
    """A group of gloo processes that run functions until closed.

    Args:
        world: Number of processes.
        timeout_s: Longest that one `run` may take; then all processes are ended and `TimeoutError` is raised.
    """

    def __init__(self, world: int, timeout_s: float = 240.0) -> None:
        self.world, self.timeout_s = world, timeout_s
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(world):
            parent_end, child_end = context.Pipe()
            file = str(Path(self._folder.name) / "store")
            process = context.Process(target=_serve, args=(rank, world, file, child_end), daemon=True)
            process.start()
            child_end.close()
            self._pipes.append(parent_end)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Results of `function(collectives, *args)` of all ranks; the function must be importable by name."""
        for pipe in self._pipes:
            pipe.send((function, args))
        results = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(self.timeout_s):
                self.close()
                raise TimeoutError(f"rank {rank} of {self.world}: no answer within {self.timeout_s} s")
            try:
                good, value = pipe.recv()
            except EOFError as error:
                self.close()
                raise RuntimeError(f"rank {rank} of {self.world} ended") from error
            if not good:
                self.close()
                raise RuntimeError(f"rank {rank} of {self.world}: {value}")
            results.append(value)
        return results

    def close(self) -> None:
        """End all processes."""
        for pipe in self._pipes:
            pipe.close()  # a worker ends when its pipe does
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()

    def __enter__(self) -> "Ranks":
        """The group itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends all processes."""
        self.close()


def _serve(rank: int, world: int, file: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    try:
        while True:
            function, args = pipe.recv()
            try:
                pipe.send((True, function(ProcessGroup(), *args)))
            except Exception as error:  # noqa: BLE001  whatever it is, the caller is told
                pipe.send((False, f"{type(error).__name__}: {error}"))
    except (EOFError, BrokenPipeError):
        pass
    finally:
        dist.destroy_process_group()
