"""Restarts as the controller of Ray Train sees them, from its own calls in their order."""

import builtins
from types import SimpleNamespace

import pytest
from ray import cloudpickle

from jobs.on_ray import restarts
from jobs.on_ray.restarts import NoteRestarts
from jobs.tracking.events import Events


class Controller:
    """Calls what Ray Train's controller calls."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, int]] = []
        self.lines: list[str] = []
        self.gauge = -1.0
        patch.setattr(restarts, "show", self._show)
        self._note = NoteRestarts("a", lambda cause, step: self.events.append((cause, step)), self.lines.append)

    def _show(self, metric: object, value: float, **labels: str) -> None:
        assert (metric, labels) == (restarts.RESTARTS, {"job_name": "a"})
        self.gauge = value

    def start(self, workers: int, *, fails: bool = False) -> None:
        self._note.before_controller_execute_resize_decision(SimpleNamespace(num_workers=workers))
        if not fails:
            self._note.after_worker_group_start(SimpleNamespace(get_workers=lambda: [None] * workers))

    def save(self, step: int) -> None:
        self._note.after_report(SimpleNamespace(), [{"step": step, "loss": 1.0}, {"step": step}])

    def poll(self, errors: dict[int, Exception]) -> None:
        self._note.after_worker_group_poll_status(SimpleNamespace(errors=errors))


def test_each_restart_has_its_step_and_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = Controller(monkeypatch)
    controller.start(2)
    assert controller.events == []
    assert controller.gauge == 0
    controller.poll({})
    controller.save(20)
    controller.poll({1: RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")})
    controller.start(2)
    controller.save(40)
    controller.start(1)
    (died, step), (resized, later) = controller.events
    assert died.startswith("rank 1: the GPU is out of memory")
    assert died.endswith("(2 -> 2 workers)")
    assert (step, later) == (20, 40)
    assert resized == "nodes came or went: 2 -> 1 workers"
    assert controller.gauge == 2
    assert controller.lines[1] == f"restart 2 of the workers, from the checkpoint of step 40: {resized}"


def test_a_group_that_does_not_come_up_is_no_second_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = Controller(monkeypatch)
    controller.start(4)
    controller.poll({0: OSError("the node was lost")})
    controller.start(4, fails=True)
    controller.start(2)
    assert len(controller.events) == 1


def test_it_goes_to_the_controller_of_a_driver_whose_print_ray_has_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtins, "print", lambda *_, **__: None)
    copy = cloudpickle.loads(cloudpickle.dumps(NoteRestarts("a", Events("run").tell)))
    assert isinstance(copy, NoteRestarts)
