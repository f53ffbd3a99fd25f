"""Why something failed, from the words of the libraries: their own errors where they can be made here."""

import numpy as np
import pytest
import ray.exceptions
import torch
from ray.train.v2.api.exceptions import WorkerGroupError

from jobs.watch.causes import cause_in, cause_of, cause_of_workers
from storage.errors import CorruptChunk, StoreError

_KILLED = (
    "A worker died or was killed while executing a task by an unexpected system error. To troubleshoot the problem, "
    "check the logs for the dead worker. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits "
    "with a connection error code 2. End of file. There are some potential root causes. (1) The process is killed by "
    "SIGKILL by OOM killer due to high memory usage. (2) ray stop --force is called."
)
_GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:34567"
_CORRUPT = CorruptChunk("volume a: s3://v/a/0/c/0", expected="what was written", found="chunk 3", remedy="ingest anew")


def _full_gpu() -> Exception:
    return torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79 GiB."
    )


def _full_host() -> Exception:
    try:
        torch.empty(1 << 60)
    except RuntimeError as error:
        return error
    raise AssertionError


def _full_numpy() -> Exception:
    try:
        np.empty(1 << 58)
    except MemoryError as error:
        return error
    raise AssertionError


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (_full_gpu(), "the GPU is out of memory: it had no 2.50 GiB left"),
        (_full_host(), "a node is out of memory"),
        (_full_numpy(), "a node is out of memory"),
        (
            ray.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory."),
            "Ray ended the worker",
        ),
        (ray.exceptions.NodeDiedError("The node of the task has died."), "a node was lost"),
        (ray.exceptions.WorkerCrashedError(), "a worker process was killed or crashed"),
        (ray.exceptions.LocalRayletDiedError(), "a node was lost"),
        (ray.exceptions.ActorDiedError(), "a worker process was killed or crashed"),
        (RuntimeError(_KILLED), "a worker process was killed or crashed"),
        (
            OSError("When uploading part: AWS Error NETWORK_CONNECTION during UploadPart operation: curlCode: 7"),
            "S3 did not",
        ),
        (OSError(28, "No space left on device"), "a disk or a quota is full"),
        (
            ModuleNotFoundError("No module named 'monai.networks'", name="monai.networks"),
            "lacks the package monai.networks",
        ),
        (
            RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with"),
            "the GPU failed: CUDA error",
        ),
        (RuntimeError(_GLOO), "a worker lost its connection to another one"),
        (_CORRUPT, str(_CORRUPT)),
        (
            StoreError("s3://v/a", expected="an answer within 120 s", found="5 failed attempts"),
            "s3://v/a; expected an answer",
        ),
        (ValueError("what nobody\nforesees"), "ValueError: forese"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_an_error_has_its_cause_in_one_sentence(error: Exception, words: str) -> None:
    sentence = cause_of(error)
    assert words in sentence
    assert "\n" not in sentence
    assert len(sentence) < 400


def test_the_error_that_led_to_another_is_the_cause() -> None:
    error = RuntimeError("the loader has ended")
    error.__cause__ = _CORRUPT
    assert cause_of(error) == str(_CORRUPT)


def test_who_lost_its_peer_is_not_the_cause() -> None:
    failures: dict[int, Exception] = {0: RuntimeError(_GLOO), 1: _full_gpu(), 2: RuntimeError(_GLOO)}
    assert cause_of_workers(failures).startswith("rank 1: the GPU is out of memory")
    assert "GPU is out of memory" in cause_of(WorkerGroupError("many words", failures))
    assert "lost its connection" in cause_of_workers({0: RuntimeError(_GLOO)})
    assert "lost its connection" not in (cause_in(f"{_GLOO}\n{_full_gpu()}\n{_GLOO}") or "")


def test_a_text_tells_its_last_cause() -> None:
    remote = f"Traceback (most recent call last):\n  File x\nstorage.errors.CorruptChunk: {_CORRUPT}\n"
    assert cause_in(f"MemoryError\nresumed at step 4\n{remote}") == str(_CORRUPT)
    assert cause_in("training\nall is well\n") is None
