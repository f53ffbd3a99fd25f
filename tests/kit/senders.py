"""Many senders of points to one MLflow server at once."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from jobs.tracking import runs as tracking
from jobs.tracking.outage import through_outage

SENDERS, POINTS = 32, 12


def send_at_once(api: Any) -> None:
    """Each of 32 senders sends 12 points of two metrics to a run of its own; none may be missing or there twice.

    Raises:
        AssertionError: names the run.
    """
    names = [f"sender-{number}" for number in range(SENDERS)]
    ids = [tracking.open_run(api, "senders", name, "trial", params={}, tags={}) for name in names]

    def send(number: int) -> None:
        sender = tracking.Sender(ids[number])
        for step in range(1, POINTS + 1):
            sender.put(tracking.point(step, {"inner_dice": number + step / 100, "loss": 1.0 / step}))
        sender.close(300)

    with ThreadPoolExecutor(SENDERS) as threads:
        list(threads.map(send, range(SENDERS)))
    for number, run_id in enumerate(ids):
        for metric in ("inner_dice", "loss"):
            read = partial(api.get_metric_history, run_id, metric)
            history = sorted(through_outage(read, "the points of a sender"), key=lambda m: m.step)
            assert [m.step for m in history] == list(range(1, POINTS + 1)), names[number]
        assert history[-1].value == 1.0 / POINTS
