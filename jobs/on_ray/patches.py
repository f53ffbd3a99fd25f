"""All patches of Ray: what it has no setting for, each in this process from its call on.

They replace private names, which another Ray may not have. Each looks for its own first and says so where they are
gone, so that no job runs without the behaviour that a patch was to give it.
"""

import functools
import importlib
from dataclasses import dataclass
from typing import Any

import ray

from jobs.on_ray.failures import is_final
from storage.errors import StackError


@dataclass(frozen=True)
class PrivateName:
    """A name of Ray's that its documentation does not promise.

    Attributes:
        module: Where it is.
        path: Its name there; that of a method after its class and a dot.
    """

    module: str
    path: str

    def owner(self) -> Any:
        """The module or class that has it.

        Raises:
            StackError: nothing has it in this Ray.
        """
        *outer, last = self.path.split(".")
        try:
            owner = functools.reduce(getattr, outer, importlib.import_module(self.module))
            getattr(owner, last)
        except (ImportError, AttributeError) as error:
            raise StackError(
                f"Ray {ray.__version__}",
                expected=f"{self.module}.{self.path}, which a patch in jobs/on_ray/patches.py needs",
                found="no such name",
                remedy="install the Ray of requirements.lock, or write the patch anew for this one",
            ) from error
        return owner

    def replace(self, value: Any) -> None:
        """Put something else in its place."""
        setattr(self.owner(), self.path.rpartition(".")[2], value)

    def original(self) -> Any:
        """Ray's own, also after `replace`, so that patching twice does not stack."""
        current = getattr(self.owner(), self.path.rpartition(".")[2])
        return _originals.setdefault(self, current)


_originals: dict[PrivateName, Any] = {}
CREATE_SCALING_POLICY = PrivateName("ray.train.v2.api.data_parallel_trainer", "create_scaling_policy")
COUNT_WORKERS = PrivateName(
    "ray.train.v2._internal.execution.scaling_policy", "ElasticScalingPolicy._count_possible_workers"
)
HANDLE_TASK_ERROR = PrivateName("ray.tune.experiment.trial", "Trial._handle_ray_task_error")
GET_TRAIN_CONTEXT = PrivateName("ray.train.v2._internal.execution.context", "get_train_context")
"""Read, not replaced."""
PRIVATE_NAMES = (CREATE_SCALING_POLICY, COUNT_WORKERS, HANDLE_TASK_ERROR, GET_TRAIN_CONTEXT)


def patch_ray_to_share_evenly(sizes: tuple[int, ...]) -> None:
    """Let elastic runs have only these numbers of workers.

    The policy that a trainer makes goes to the controller as it is.

    Raises:
        StackError: this Ray lacks a name that the patch needs.
    """
    COUNT_WORKERS.owner()
    create = CREATE_SCALING_POLICY.original()
    from jobs.on_ray.elastic import EvenShares  # only now: its base class is one of the names

    def create_even(scaling_config: Any) -> Any:
        elastic = scaling_config.elasticity_enabled
        return EvenShares(scaling_config, sizes) if elastic else create(scaling_config)

    CREATE_SCALING_POLICY.replace(create_even)


def patch_tune_to_stop_at_final_errors() -> None:
    """Let a final error use up all tries of its trial.

    Ray Tune counts every error of a trial's function alike and has no hook before it decides to try again.

    Raises:
        StackError: this Ray lacks a name that the patch needs.
    """
    handle = HANDLE_TASK_ERROR.original()

    def handle_and_count(trial: Any, error: Any) -> None:
        handle(trial, error)
        if is_final(error.cause):
            facts = trial.run_metadata
            facts.num_failures = max(facts.num_failures, trial.max_failures + 1)

    HANDLE_TASK_ERROR.replace(handle_and_count)
