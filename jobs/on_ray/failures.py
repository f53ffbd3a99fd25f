"""Which errors of a training worker or a trial another try would only meet again, and how Ray is told."""

from collections.abc import Iterator
from typing import Any

import torch
from ray.exceptions import OutOfMemoryError as KilledForMemory
from ray.train import UserCallback
from ray.train.v2.api.exceptions import ControllerError

from jobs.lease import LeaseLost
from storage.errors import ConfigError, CorruptChunk, RefusedInput, StackError

# Training is a function of configuration, data and step, so these come back at the same step; a loss that is not finite
# is an ArithmeticError, and a step that does not fit a device does not fit it the next time. A store that does not
# answer, a lost worker and what its death does to the other ranks (RuntimeError, OSError) may not.
FINAL = (
    LeaseLost,
    ConfigError,
    RefusedInput,
    CorruptChunk,
    torch.OutOfMemoryError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    TypeError,
    ValueError,
)
TRIES_WITHOUT_PROGRESS = 3
"""Times that a host may run out of memory without a new checkpoint in between, as it may be others who fill it."""
# Not every out-of-memory of torch's has its class.
_OF_DEVICE, _OF_HOST = ("CUDA out of memory", "CUDA error: out of memory"), ("can't allocate memory",)


def is_final(error: BaseException | None) -> bool:
    """Whether another try would meet the same error."""
    return isinstance(error, FINAL) or (isinstance(error, RuntimeError) and _says(error, _OF_DEVICE))


class StopOnFinalErrors(UserCallback):
    """Ends a Ray Train run at the first error that is final, whatever `max_failures` allows.

    So too where hosts run out of memory again and again without a step further.
    """

    def __init__(self) -> None:
        self._out_of_memory = 0

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Called in Ray Train's controller with each report of the workers."""
        if checkpoint is not None:
            self._out_of_memory = 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called in Ray Train's controller, which ends the run on a `ControllerError`.

        Raises:
            ControllerError: carries the final error of the lowest rank that has one, in our words where it is memory.
        """
        for rank, error in sorted(worker_exceptions.items()):
            if is_final(error):
                raise ControllerError(_no_room_on_device(rank, error) if isinstance(error, RuntimeError) else error)
        for rank, error in sorted(worker_exceptions.items()):
            lack = next(filter(_is_of_host, _causes(error)), None)
            if lack is not None:
                self._out_of_memory += 1
                if self._out_of_memory >= TRIES_WITHOUT_PROGRESS:
                    raise ControllerError(_no_room_on_host(rank, lack))
                return


def _no_room_on_device(rank: int, error: Exception) -> ConfigError:
    return ConfigError(
        f"a training step on rank {rank}",
        expected="room for it in the memory of its device",
        found=_first_line(error),
        remedy="set engine.micro_batch lower, with which the same name goes on from its last checkpoint;"
        " engine.activation_checkpointing=true, smaller views or a smaller network want another name",
    )


def _no_room_on_host(rank: int, error: BaseException) -> StackError:
    return StackError(
        f"training on rank {rank}",
        expected="room for it in the memory of its machine",
        found=f"{TRIES_WITHOUT_PROGRESS} ends for lack of it since the last checkpoint, the last: {_first_line(error)}",
        remedy="set stream.prefetch, stream.crops_per_visit or engine.micro_batch lower, give workers more"
        " cluster.cpus_per_worker so that fewer share a machine, or take larger machines; the same name goes on",
    )


def _is_of_host(error: BaseException) -> bool:
    return isinstance(error, MemoryError | KilledForMemory) or (
        isinstance(error, RuntimeError) and _says(error, _OF_HOST)
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those that it was raised from or that Ray Train wrapped in it."""
    while error is not None:
        yield error
        inner = getattr(error, "health_check_failure", None) or error.__cause__
        error = inner if isinstance(inner, BaseException) else None


def _says(error: BaseException, words: tuple[str, ...]) -> bool:
    return any(word in str(error) for word in words)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
