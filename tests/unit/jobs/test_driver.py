"""What jobs share: how their runs end, and what they say when they fail."""

import signal
import sys
from types import SimpleNamespace

import pytest

from jobs import driver as entry
from jobs.pretrain import driver as pretrain
from storage.errors import RefusedInput


class Tracker:
    """Stands for MLflow's client; hears the last status."""

    status = ""

    def set_terminated(self, run_id: str, status: str) -> None:
        self.status = status


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt(), "KILLED"), (SystemExit(15), "KILLED"), (ValueError("x"), "FAILED")],
    ids=["Ctrl-C", "jobs stop", "an error"],
)
def test_a_job_that_was_stopped_has_not_failed(error: BaseException, status: str) -> None:
    api = Tracker()
    entry.end_failed(api, "run", error)
    assert api.status == status


def test_a_failed_job_says_one_line_and_where_only_when_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(argv: object) -> int:
        raise RefusedInput("volume x", found="that")

    monkeypatch.setattr(entry, "quiet", lambda: None)
    monkeypatch.setattr(sys, "argv", ["/a/pretrain.py", "c.yaml"])
    monkeypatch.delenv("TOMOSCALE_TRACEBACK", raising=False)
    assert entry.guarded(fail) == 3
    assert capsys.readouterr().err == "pretrain: volume x; found that\n"
    monkeypatch.setenv("TOMOSCALE_TRACEBACK", "1")
    assert entry.guarded(fail) == 3
    assert "Traceback" in capsys.readouterr().err


def test_an_error_that_nobody_foresaw_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(argv: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(entry, "quiet", lambda: None)
    with pytest.raises(ZeroDivisionError):
        entry.guarded(fail)


@pytest.mark.parametrize(("code", "kind"), [(0, KeyboardInterrupt), (1, KeyboardInterrupt), (15, SystemExit)])
def test_ctrl_c_while_ray_trains_is_an_interruption(code: int, kind: type[BaseException]) -> None:
    before = signal.getsignal(signal.SIGINT)

    def fit() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ray's own handler
        sys.exit(code)

    with pytest.raises(kind):
        pretrain._fitted(SimpleNamespace(fit=fit))
    assert signal.getsignal(signal.SIGINT) is before
