"""What jobs share: how their runs end, and what they say when they fail."""

import signal
import sys
from types import SimpleNamespace

import pytest
from mlflow.exceptions import MlflowException

from jobs import driver
from jobs.pretrain import driver as pretrain
from storage.errors import RefusedInput
from storage.objects.retry import RetryPolicy


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
    driver.end_failed(api, "run", error)
    assert api.status == status


def test_a_failed_job_says_one_line_and_where_only_when_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(argv: object) -> int:
        raise RefusedInput("volume x", found="that")

    monkeypatch.setattr(driver, "quiet", lambda: None)
    monkeypatch.setattr(sys, "argv", ["/a/pretrain.py", "c.yaml"])
    monkeypatch.delenv("TOMOSCALE_TRACEBACK", raising=False)
    assert driver.guarded(fail) == 3
    assert capsys.readouterr().err == "pretrain: volume x; found that\n"
    monkeypatch.setenv("TOMOSCALE_TRACEBACK", "1")
    assert driver.guarded(fail) == 3
    assert "Traceback" in capsys.readouterr().err


def test_an_error_that_nobody_foresaw_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(argv: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(driver, "quiet", lambda: None)
    with pytest.raises(ZeroDivisionError):
        driver.guarded(fail)


@pytest.mark.parametrize(("code", "kind"), [(0, KeyboardInterrupt), (1, KeyboardInterrupt), (15, SystemExit)])
def test_ctrl_c_while_ray_trains_is_an_interruption(code: int, kind: type[BaseException]) -> None:
    before = signal.getsignal(signal.SIGINT)

    def fit() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ray's own handler
        sys.exit(code)

    with pytest.raises(kind):
        pretrain._fitted(SimpleNamespace(fit=fit))
    assert signal.getsignal(signal.SIGINT) is before


def test_a_status_that_mlflow_did_not_take_is_set_again(capsys: pytest.CaptureFixture[str]) -> None:
    class Away(Tracker):
        requests = 0

        def set_terminated(self, run_id: str, status: str) -> None:
            self.requests += 1
            if self.requests == 1:
                raise MlflowException("503")
            super().set_terminated(run_id, status)

    api = Away()
    driver.end_run(api, "run", "FINISHED")
    assert (api.status, api.requests) == ("FINISHED", 2)
    assert capsys.readouterr().out == "MLflow did not take the status FINISHED (MlflowException)\n"


def test_a_run_that_cannot_be_ended_ends_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(Tracker):
        def set_terminated(self, run_id: str, status: str) -> None:
            raise MlflowException("404")

    monkeypatch.setattr(driver, "_END_OF_A_RUN", RetryPolicy(deadline_s=1.0, attempt_s=1.0))
    driver.end_run(Gone(), "run", "FINISHED")


def test_a_package_that_is_run_is_called_by_its_own_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(argv: object) -> int:
        raise RefusedInput("volume x", found="that")

    monkeypatch.setattr(driver, "quiet", lambda: None)
    monkeypatch.setattr(sys, "argv", ["/a/pretrain/__main__.py", "c.yaml"])
    assert driver.guarded(fail) == 3
    assert capsys.readouterr().err.startswith("pretrain: volume x")
