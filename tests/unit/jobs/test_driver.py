"""What jobs share: how their runs end, and what they say when they fail."""

import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from mlflow.exceptions import MlflowException

from jobs import driver
from jobs.pretrain import driver as pretrain
from storage.errors import ConfigError, RefusedInput
from storage.format.manifest import Manifest
from storage.format.volume import Membership, Provenance, Volume
from storage.format.volume_writer import write_volume
from storage.objects import open_store
from storage.objects.retry import RetryPolicy
from tests.kit.phantoms import write_phantoms
from tests.kit.pretraining import config, train


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


def test_a_network_of_other_channels_than_the_data_is_refused_before_it_trains(tmp_path: Path) -> None:
    url = (tmp_path / "store").as_uri()
    records = list(write_phantoms(url, 4).records())
    two = Volume(np.zeros((2, 20, 24, 22), np.int16), spacing_mm=(1, 1, 1), affine=np.eye(4))
    provenance = Provenance(source="two")
    membership = Membership(subject="two", split="train")
    more = write_volume(open_store(url), "two", two, membership=membership, provenance=provenance)
    manifest = Manifest.from_records([*records, more], {"name": "phantoms"})
    manifest.write(open_store(url))
    everyone = range(len(manifest))
    with pytest.raises(ConfigError, match=r"volume two; expected 1 channel\(s\), as the encoder takes; found 2"):
        driver.check_channels(manifest, everyone, "the encoder", {})
    with pytest.raises(ConfigError, match="volume phantom-000; expected 2"):
        driver.check_channels(manifest, everyone, "the encoder", {"in_channels": 2})
    with pytest.raises(ConfigError, match="volume two; expected 1"):
        train(config(url, "simclr"), tmp_path / "run")
    driver.check_channels(manifest, [manifest.index_of("two")], "the encoder", {"in_channels": 2})


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
