"""Which errors end a trial or a training run at once, and which after some tries."""

from typing import Any

import pytest
import torch
from ray.exceptions import OutOfMemoryError, RayTaskError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import ControllerError
from ray.tune.experiment.trial import Trial

from jobs.on_ray.failures import StopOnFinalErrors
from jobs.on_ray.patches import HANDLE_TASK_ERROR, patch_tune_to_stop_at_final_errors
from ssl_core.train.engine import NonFiniteError
from storage.errors import ConfigError, StoreError


@pytest.mark.parametrize(
    ("cause", "tries"),
    [
        (ConfigError("x"), 1),
        (ValueError("x"), 1),
        (NonFiniteError("step 3"), 1),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), 1),
        (StoreError("s3"), 3),
        (RuntimeError("a peer has gone"), 3),
    ],
)
def test_a_trial_is_tried_again_only_where_that_can_help(
    cause: Exception, tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trial, "_handle_ray_task_error", HANDLE_TASK_ERROR.original())  # put back afterwards
    patch_tune_to_stop_at_final_errors()
    trial = Trial("train", stub=True, max_failures=2)
    found = 0
    while found == 0 or trial.should_recover():
        trial._handle_ray_task_error(RayTaskError("train", "the traceback", cause))
        found += 1
    assert found == tries


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ..."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ..."),
    ],
)
def test_a_device_that_is_too_small_ends_training_at_once_with_a_remedy(error: Exception) -> None:
    with pytest.raises(ControllerError) as caught:
        StopOnFinalErrors().after_exception(None, {0: RuntimeError("connection closed by peer"), 2: error})
    cause = caught.value.controller_failure
    assert isinstance(cause, ConfigError)
    assert "rank 2" in cause.thing
    assert cause.found == str(error).splitlines()[0]
    assert "engine.micro_batch" in cause.remedy
    assert "\n" not in str(cause)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 3.00 GiB for an array"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        WorkerHealthCheckFailedError("a worker has died", failure=OutOfMemoryError("killed as the node is low")),
    ],
)
def test_hosts_that_run_out_of_memory_again_and_again_end_training(error: Exception) -> None:
    stop = StopOnFinalErrors()
    died: Any = {1: error, 0: RuntimeError("connection closed by peer")}
    for _ in range(2):
        stop.after_exception(None, died)
    stop.after_report(None, [{}], None)
    stop.after_report(None, [{}], "a checkpoint")  # progress: others may have filled the machine
    for _ in range(2):
        stop.after_exception(None, died)
    with pytest.raises(ControllerError) as caught:
        stop.after_exception(None, died)
    assert "stream.prefetch" in str(caught.value.controller_failure)


def test_a_lost_worker_is_tried_again() -> None:
    stop = StopOnFinalErrors()
    for _ in range(10):
        stop.after_exception(None, {0: RuntimeError("connection closed by peer"), 1: OSError("gone")})
