"""Restarts of a job as events of its MLflow run.

Each is a tag, `tomoscale.restart.<time>`, with its cause in one sentence, so that it can be told twice and is there
once. The metric `restarts` counts them, at the step from which the job went on. Telling never blocks: MLflow may be
away just when something restarts.
"""

import threading
import time
from typing import Any

from jobs.tracking import runs
from jobs.tracking.outage import through_outage
from storage.errors import TomoscaleError

TAG = "tomoscale.restart."
_MOST_CHARACTERS = 500


def note(api: Any, run_id: str, cause: str, step: int | None, time_ms: int) -> None:
    """Write one restart into a run.

    Args:
        api: MLflow's client.
        run_id: The run.
        cause: One sentence.
        step: From which the job goes on; None where its last checkpoint says it.
        time_ms: Since the epoch.
    """
    when = time.gmtime(time_ms / 1000)
    place = "the last checkpoint" if step is None else f"step {step}"
    text = f"{time.strftime('%Y-%m-%d %H:%M:%S', when)} UTC, from {place}: {cause}"
    api.set_tag(run_id, f"{TAG}{time.strftime('%Y%m%dT%H%M%S', when)}.{time_ms % 1000:03d}", text[:_MOST_CHARACTERS])
    data = api.get_run(run_id).data
    count = sum(name.startswith(TAG) for name in data.tags)
    at = int(data.metrics.get(runs.SENTINEL, 0)) if step is None else step
    api.log_metric(run_id, runs.RESTARTS, count, timestamp=time_ms, step=at)


class Events:
    """Tells a run of restarts from threads; goes to Ray's controller as it is.

    Args:
        run_id: The run.
    """

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id

    def tell(self, cause: str, step: int | None = None) -> threading.Thread:
        """Write a restart that happens now, as soon as MLflow takes it; the thread dies with its process."""
        time_ms = int(time.time() * 1000)
        thread = threading.Thread(target=self._write, args=(cause, step, time_ms), name="restart-event", daemon=True)
        thread.start()
        return thread

    def _write(self, cause: str, step: int | None, time_ms: int) -> None:
        try:
            through_outage(lambda: note(runs.client(), self._run_id, cause, step, time_ms), "a restart of the job")
        except Exception as error:  # noqa: BLE001  whatever the network did, training goes on; the log has the event
            reason = error.found if isinstance(error, TomoscaleError) else type(error).__name__
            print(f"MLflow was not told of a restart ({reason})", flush=True)
