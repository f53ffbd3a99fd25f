"""A folder of scans, a place for its store, and what lies there."""

from pathlib import Path
from urllib.parse import urlsplit

import pytest

from storage.ingest.policy import IngestPolicy
from tests.kit.scans import folder

HALVES = IngestPolicy(split=(0.5, 0.0, 0.5))


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return folder(tmp_path / "src")


@pytest.fixture
def dst(tmp_path: Path) -> str:
    return (tmp_path / "store").as_uri()


def on_disk(dst: str) -> dict[str, bytes]:
    root = Path(urlsplit(dst).path)
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
