"""Restarts of a pre-training's workers, as its controller sees them: when, after which step, and why."""

from collections.abc import Callable
from typing import Any

from ray.train.v2._internal.execution.callback import ControllerCallback, ReportCallback, WorkerGroupCallback

from jobs.on_ray.metrics import RESTARTS, show
from jobs.watch.causes import cause_of_workers


def _say(line: str) -> None:
    """Not `print` itself, which Ray Train replaces by another that cannot be pickled."""
    print(line, flush=True)


class NoteRestarts(ControllerCallback, WorkerGroupCallback, ReportCallback):
    """Tells of every restart of the group that trained, whatever ended it; runs in Ray Train's controller.

    It waits for nothing and raises nothing: `tell` is to return at once.

    Args:
        job: Name of the job.
        tell: Hears the cause, in one sentence, and the step of the last checkpoint that counts.
        say: Hears a line for the log.
    """

    def __init__(self, job: str, tell: Callable[[str, int], Any], say: Callable[[str], None] = _say) -> None:
        self._job, self._tell, self._say = job, tell, say
        self._step, self._workers, self._count = 0, 0, 0
        self._cause = ""

    def after_report(self, training_report: Any, metrics: list[dict[str, Any]]) -> None:
        """A checkpoint counts from here on."""
        self._step = next((int(item["step"]) for item in metrics if "step" in item), self._step)

    def after_worker_group_start(self, worker_group: Any) -> None:
        """A group trains."""
        self._workers = len(worker_group.get_workers())
        self._cause = ""
        show(RESTARTS, self._count, job_name=self._job)

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Workers have failed, perhaps; asked every second or two."""
        show(RESTARTS, self._count, job_name=self._job)
        if worker_group_status.errors:
            self._cause = cause_of_workers(worker_group_status.errors)

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """A group is about to be started: the first one, or one in the place of another."""
        if not self._workers:
            return
        size = f"{self._workers} -> {resize_decision.num_workers} workers"
        cause = f"{self._cause} ({size})" if self._cause else f"nodes came or went: {size}"
        self._workers, self._count = 0, self._count + 1
        show(RESTARTS, self._count, job_name=self._job)
        self._say(f"restart {self._count} of the workers, from the checkpoint of step {self._step}: {cause}")
        self._tell(cause, self._step)
