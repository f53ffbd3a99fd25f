"""Which errors of a training worker or a trial another try would only meet again, and how Ray is told."""

from typing import Any

from ray.train import UserCallback
from ray.train.v2.api.exceptions import ControllerError

from jobs.lease import LeaseLost
from storage.errors import ConfigError, CorruptChunk, RefusedInput

# Training is a function of configuration, data and step, so these come back at the same step; a loss that is not finite
# is an ArithmeticError. A store that does not answer, a lost worker and what its death does to the other ranks
# (RuntimeError, OSError) may not.
FINAL = (
    LeaseLost,
    ConfigError,
    RefusedInput,
    CorruptChunk,
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    TypeError,
    ValueError,
)


class StopOnFinalErrors(UserCallback):
    """Ends a Ray Train run at the first error that is final, whatever `max_failures` allows."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called in Ray Train's controller, which ends the run on a `ControllerError`.

        Raises:
            ControllerError: carries the final error of the lowest rank that has one.
        """
        for _, error in sorted(worker_exceptions.items()):
            if isinstance(error, FINAL):
                raise ControllerError(error)
