from pathlib import Path

import pytest

from cluster import doctor
from cluster import state as states
from storage.errors import ConfigError


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An environment that points at nothing."""
    import os

    for name in list(os.environ):
        if name.startswith(("AWS_", "MLFLOW_", "RAY_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TOMOSCALE_STATE", str(tmp_path / "state"))
    return tmp_path


def test_without_services_each_is_named_with_what_to_do(bare: Path) -> None:
    checks = {check.name: check for check in doctor.run()}
    for name in ("S3", "MLflow", "Ray jobs", "telemetry"):
        assert not checks[name].ok, name
        assert checks[name].remedy
    for name in ("Python", "packages", "process start", "ports", "secrets"):
        assert checks[name].ok, checks[name]


def test_telemetry_is_off_only_when_both_say_so(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    check = doctor._telemetry()
    assert not check.ok
    assert "MLFLOW_DISABLE_TELEMETRY" in check.finding
    assert "RAY" not in check.finding
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    assert doctor._telemetry().ok


def test_a_secret_that_others_can_read_is_found(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "_LONGEST", 4096)
    states.prepare(bare / "state")
    assert doctor._secrets(bare / "state").ok
    (bare / "state" / "secrets" / "ray_token").chmod(0o640)
    check = doctor._secrets(bare / "state")
    assert not check.ok
    assert "ray_token" in check.finding


def test_a_proxy_in_the_way_of_loopback(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:3128")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    assert not doctor._proxy().ok
    monkeypatch.setenv("NO_PROXY", "example.org,127.0.0.1")
    assert doctor._proxy().ok


def test_releases_compare_without_their_build() -> None:
    assert doctor._same_release("2.13.0+cpu", "2.13.0")
    assert not doctor._same_release("2.13.1", "2.13.0")
    assert not doctor._same_release(None, "2.13.0")


@pytest.mark.parametrize(
    ("problem", "ok", "words"),
    [
        ("", False, "answers to all"),
        ("HTTP 401 Unauthorized", True, "asks"),
        ("HTTP 403 Forbidden", True, "asks"),
        ("timed out", False, "not known: timed out"),
    ],
)
def test_only_a_refusal_shows_that_a_server_is_closed(
    problem: str, ok: bool, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.services.http_problem", lambda url: problem)
    check = doctor._closed("access", "http://x", "asks", "answers to all", "close it")
    assert (check.ok, check.finding) == (ok, words)


def test_a_password_in_mlflows_address_is_not_repeated(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://admin:hush-hush@127.0.0.1:5000")
    (check,) = doctor._mlflow()
    assert not check.ok
    assert "hush" not in check.finding


def test_it_looks_at_the_stack_and_the_job_server_that_it_is_told(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "_LONGEST", 4096)
    states.prepare(bare / "other")
    (bare / "other" / "secrets" / "ray_token").chmod(0o644)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    monkeypatch.setenv("TOMOSCALE_JOBS_ADDRESS", "ray://127.0.0.1:2")
    checks = {check.name: check for check in doctor.run(state_dir=bare / "other")}
    assert not checks["secrets"].ok
    assert "another kind of address" in checks["Ray jobs"].finding


@pytest.mark.parametrize("url", ["runs", "file:///runs", "s3://", "s3://KEY:hush-hush@runs"])
def test_a_store_that_is_no_bucket_is_refused(bare: Path, url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        doctor.run(url)
    assert "hush" not in str(caught.value)
