"""Fixtures of the unit tests."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def nothing_configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No server, store or key in the environment; the command line may change how signals are handled."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "MLFLOW_", "RAY_", "TOMOSCALE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TOMOSCALE_STATE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)
