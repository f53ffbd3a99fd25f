"""Bad input at the real command line where a server says no: one message, its exit code, nothing half-published."""

import os
import signal
import subprocess
import sys
import uuid
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.stack_info import StackInfo
from jobs.cli import main as cli
from jobs.cli.verbs.common import use_stack
from storage.objects import open_store
from tests.kit import ROOT
from tests.kit.phantoms import write_phantoms
from tests.kit.scans import folder

pytestmark = pytest.mark.service


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def url(local_stack: StackInfo) -> str:
    return f"s3://volumes/{uuid.uuid4().hex}"


def refused(capsys: pytest.CaptureFixture[str], code: int, arguments: list[str], *parts: str) -> str:
    """Run it; it must end with this code and one message that holds the parts. Returns what it printed."""
    found = cli.main(arguments)
    out, err = capsys.readouterr()
    _check(found, out, err, code, *parts)
    return out


def failed_job(code: int, arguments: list[str], *parts: str) -> None:
    """The same in a process of its own, which Ray's client, once loaded, needs for its log."""
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli.main", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    _check(done.returncode, done.stdout, done.stderr, code, *parts)


def _check(found: int, out: str, err: str, code: int, *parts: str) -> None:
    assert found == code, out + err
    assert "Traceback" not in out + err
    (message,) = [line for line in err.splitlines() if line.startswith("tomoscale: ")]
    for part in ("; expected ", "; found ", *parts):
        assert part in message, message


def test_wrong_s3_credentials(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = folder(tmp_path / "scans", 3)
    with monkeypatch.context() as wrong:
        (tmp_path / "keys").write_text("[own]\naws_access_key_id=nobody\naws_secret_access_key=wrong-secret\n")
        wrong.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
        wrong.setenv("AWS_PROFILE", "own")
        for arguments in (["data", "ingest", "--local", str(source), url], ["data", "show", url]):
            out = refused(capsys, 1, arguments, url, "403", "AWS")
            assert "wrong-secret" not in out
    assert list(open_store(url).list()) == []
    assert cli.main(["data", "ingest", "--local", str(source), url]) == 0


def test_another_s3_server_is_used_with_its_own_keys(
    local_stack: StackInfo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The local stack is up, and the environment names another store: neither gets the keys of the other."""
    own = {"AWS_ACCESS_KEY_ID": "mine", "AWS_SECRET_ACCESS_KEY": "mine-secret"}
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
        use_stack(Namespace(state=str(local_stack.state_dir)))
        found = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        assert found == {**own, "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"}
    use_stack(Namespace(state=str(local_stack.state_dir)))
    assert os.environ["AWS_ENDPOINT_URL_S3"] == local_stack.url("s3")
    assert "AWS_ACCESS_KEY_ID" not in os.environ
    list(open_store("s3://volumes/any").list())


def test_an_s3_server_that_is_not_there(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setenv("TOMOSCALE_STORE_DEADLINE_S", "3")
    refused(capsys, 1, ["data", "show", url], url)


def test_a_wrong_mlflow_password(
    local_stack: StackInfo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong-secret")
    out = refused(capsys, 1, ["models", "list"], "MLflow at http://127.0.0.1", "authenticate", "credentials")
    assert "wrong-secret" not in out


def test_an_unknown_model(local_stack: StackInfo, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in (["models", "show", "nobody@candidate"], ["models", "pull", "nobody@candidate", str(tmp_path / "x")]):
        refused(capsys, 1, verb, "nobody@candidate")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("count", "reason"), [(0, "an empty folder"), (1, "at least 2 subjects")])
def test_a_job_on_the_cluster_keeps_the_exit_code_and_the_reason(
    url: str, tmp_path: Path, count: int, reason: str
) -> None:
    source = folder(tmp_path / "scans", count)
    source.mkdir(exist_ok=True)
    failed_job(3, ["data", "ingest", str(source), url], "exit code 3", str(source), reason, "tomoscale jobs logs")
    assert list(open_store(url).list()) == []


def test_pretraining_without_data_is_refused_by_the_job(url: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"name: n{uuid.uuid4().hex}\ndata: {url}\n")
    failed_job(1, ["pretrain", str(tmp_path / "c.yaml")], "exit code 1", url, "tomoscale data ingest")


def test_evaluation_without_that_label(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_phantoms(url, 4, shape=(8, 9, 10))
    refused(capsys, 2, ["evaluate", str(tmp_path), url, "--label", "tumour"], url, "'tumour'", "tomoscale data show")
