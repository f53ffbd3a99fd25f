"""`data ingest`: with a salt of the user's the work is done where the salt is."""

from pathlib import Path

import pytest

from cluster import jobclient
from jobs.cli import main as cli
from tests.kit.scans import folder, phantom, save_dicom, slices

pytestmark = pytest.mark.usefixtures("nothing_configured")


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    return ["data", "ingest", str(folder(tmp_path / "scans", 3)), f"file://{tmp_path}/store"]


def test_a_salt_is_not_left_behind_silently(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jobclient, "submit", lambda *_arguments, **_more: pytest.fail("sent"))
    monkeypatch.setenv("TOMOSCALE_SALT", "hush-hush-hush-hush")
    assert cli.main([*arguments, "--address", "http://127.0.0.1:1"]) == 2
    err = capsys.readouterr().err
    assert "$TOMOSCALE_SALT; expected the salt in the environment of the cluster's nodes" in err
    assert "hush" not in err
    assert not (tmp_path / "store").exists()
    assert cli.main([*arguments, "--address", "http://127.0.0.1:1", "--local"]) == 0


def test_beside_a_stack_the_work_is_done_in_the_process_that_has_the_salt(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("jobs.cli.verbs.data._clustered", lambda _arguments: True)
    monkeypatch.setattr(jobclient, "submit", lambda *_arguments, **_more: pytest.fail("sent"))
    (tmp_path / "salt").write_text("hush-hush-hush-hush")
    monkeypatch.setenv("TOMOSCALE_SALT_FILE", str(tmp_path / "salt"))
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert "published 3 volumes" in out
    assert "in this process, where $TOMOSCALE_SALT_FILE is" in err


def test_a_pre_training_that_would_ingest_without_the_salt_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jobclient, "submit", lambda *_arguments, **_more: pytest.fail("sent"))
    monkeypatch.setenv("TOMOSCALE_SALT", "hush-hush-hush-hush")
    (tmp_path / "c.yaml").write_text("name: n\ndata: memory://x\nsource: /scans\n")
    assert cli.main(["pretrain", str(tmp_path / "c.yaml"), "--address", "http://127.0.0.1:1"]) == 2
    assert "tomoscale data ingest /scans memory://x" in capsys.readouterr().err


def test_the_end_of_an_ingest_names_the_file_that_says_what_was_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of hidden sources the store holds digests alone."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for k in range(3):
        datasets = slices(phantom(seed=k), patient=f"P{k}")
        save_dicom(tmp_path / "scans" / str(k), datasets if k else datasets[:3] + datasets[4:])
    store = f"file://{tmp_path}/store"
    assert cli.main(["data", "ingest", str(tmp_path / "scans"), store, "--local", "split=[0.5, 0, 0.5]"]) == 0
    out = capsys.readouterr().out
    assert "slices missing" in out
    (keys,) = (tmp_path / "state" / "tomoscale" / "refused").iterdir()
    assert f"digests and paths are in {keys}, on this machine only" in out
