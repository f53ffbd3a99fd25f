"""What a node does while a run trains on it, under MLflow's own names, which the page of a run draws by themselves.

MLflow measures; its own thread for that ends for good when the server is away once. This one goes on, and what it could
not send is lost: these numbers are for looking at, and no point of the training.
"""

import threading
import time
from contextlib import suppress
from typing import Any, Self

import psutil

from jobs.tracking.runs import client
from storage.errors import StackError

PREFIX = "system/"
_SAMPLE_S = 10.0  # MLflow's own
_SAMPLES = 6
_LAST_S = 15.0  # for the last request, which no job waits for longer


class NodeMetrics:
    """A thread that sends means of a minute: processors, memory, disk, network, and GPUs where there are any.

    Args:
        run_id: Run that they are logged to; their step is the seconds since it began, so that a job that goes on later
            goes on here too.
        node: Name of the node in the metrics' names; empty where there is only one.
        sample_s: Seconds between two samples.
        samples: Of a mean.
    """

    def __init__(self, run_id: str, node: str = "", *, sample_s: float = _SAMPLE_S, samples: int = _SAMPLES) -> None:
        self._run_id, self._prefix = run_id, f"{PREFIX}{node}/" if node else PREFIX
        self._sample_s, self._samples = sample_s, samples
        self._api: Any = None
        self._began_ms = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system metrics", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        """Send what was sampled by now, and end."""
        self._over.set()
        self._thread.join(_LAST_S)

    def _run(self) -> None:
        monitors = _monitors()
        while not self._over.is_set():
            for _ in range(self._samples):
                for monitor in monitors:
                    monitor.collect_metrics()
                if self._over.wait(self._sample_s):
                    break
            values = {key: value for monitor in monitors for key, value in monitor.aggregate_metrics().items()}
            for monitor in monitors:
                monitor.clear_metrics()
            self._send(values)

    def _send(self, values: dict[str, float]) -> None:
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        now_ms = int(time.time() * 1000)
        try:
            if self._api is None:
                api = client()
                self._began_ms = int(api.get_run(self._run_id).info.start_time)
                self._api = api
            step = (now_ms - self._began_ms) // 1000
            metrics = [Metric(self._prefix + key, float(value), now_ms, step) for key, value in values.items()]
            self._api.log_batch(self._run_id, metrics=metrics)
        except (StackError, MlflowException):
            return  # the server is away; the next minute is another one


def _monitors() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    psutil.cpu_percent()  # the first answer is always 0
    kinds: list[Any] = [CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor]
    monitors = []
    for kind in kinds:
        with suppress(RuntimeError):  # of the last, where there is no NVIDIA driver
            monitors.append(kind())
    return monitors
