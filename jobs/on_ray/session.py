"""Connecting a driver to its cluster, and what comes back from its tasks."""

import logging
import os
from typing import Any

import ray
import ray.exceptions

from jobs.on_ray.interface import SET_UP
from storage.errors import StackError, TomoscaleError


def connect() -> None:
    """Join the cluster of this job; with no cluster configured, say so rather than start a private one.

    Raises:
        StackError: there is no cluster, or it does not answer.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's own helper actors look for "the" cluster of the machine and lose their way when it has several.
    address = {"RAY_ADDRESS": os.environ["RAY_ADDRESS"]} if "RAY_ADDRESS" in os.environ else {}
    environment = {"env_vars": address, "worker_process_setup_hook": SET_UP}
    try:
        ray.init(address="auto", runtime_env=environment, logging_level=logging.WARNING)
    except (ConnectionError, TimeoutError, RuntimeError) as error:
        raise StackError(
            "Ray",
            expected="a running cluster",
            found=" ".join(str(error).split())[:200],
            remedy="submit with `tomoscale ... --address URL` or `ray job submit`, or start one with `tomoscale up`",
        ) from error


def result_of(done: Any) -> Any:
    """The result of a task that has ended; an error of ours is raised here as it was there."""
    try:
        return ray.get(done)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, TomoscaleError):
            raise error.cause from None  # Ray's own text is the remote traceback
        raise
