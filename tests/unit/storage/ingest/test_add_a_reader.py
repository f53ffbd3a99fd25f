"""The newcomer's task of docs/how-to-add-a-reader.md: one file and one line, and a folder of the format is ingested."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[4]
PAGE = ROOT / "docs/how-to-add-a-reader.md"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
REGISTRY = "storage/ingest/readers/registry.py"
INGEST = """
import sys

import numpy as np

from storage.ingest.pipeline import run
from storage.ingest.policy import IngestPolicy
from storage.reading.volume_store import VolumeStore

source, store = sys.argv[1:]
report = run(source, store, IngestPolicy(split=(0.5, 0.0, 0.5)))
assert [(q.source, q.reason) for q in report.quarantined] == [
    ("images/short.rawvol", "expected 120 bytes of voxels; found 118")
], report.quarantined
with VolumeStore(store) as volumes:
    for record in volumes.manifest.records():
        voxels, labels = (volumes.read_volume(record.volume_id, label) for label in (None, "label"))
        assert record.reader == "rawvol/1"
        np.savez(f"{source}/{record.volume_id}.npz", voxels, labels, record.spacing_mm)
"""


def blocks(language: str) -> list[str]:
    return [text for name, text in FENCE.findall(PAGE.read_text(encoding="utf-8")) if name == language]


def save(path: Path, array_DHW: np.ndarray, spacing_mm: tuple[float, float, float], lost: int = 0) -> None:
    header = json.dumps({"shape_DHW": array_DHW.shape, "spacing_mm": spacing_mm}).encode()
    voxels = array_DHW.astype("<i2").tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + b"\n" + voxels[: len(voxels) - lost])


def test_a_format_is_one_file_and_one_line(tmp_path: Path) -> None:
    (code,), (line,) = blocks("python"), blocks("text")
    shutil.copytree(ROOT / "storage", tmp_path / "storage", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "storage/ingest/readers/rawvol.py").write_text(code, encoding="utf-8")
    registry = (tmp_path / REGISTRY).read_text(encoding="utf-8")
    head, tuple_of_formats, rest = registry.partition("FORMATS: tuple[Format, ...] = (\n")
    assert tuple_of_formats
    (tmp_path / REGISTRY).write_text(head + tuple_of_formats + line + rest, encoding="utf-8")

    source, spacing = tmp_path / "scans", (2.0, 1.5, 0.75)
    volumes = {f"case-{i}": np.arange(60).reshape(3, 4, 5) * (i + 1) - 100 for i in range(3)}
    for name, array in volumes.items():
        save(source / "images" / f"{name}.rawvol", array, spacing)
        save(source / "labels" / f"{name}.rawvol", array > 0, spacing)
    save(source / "images" / "short.rawvol", volumes["case-0"], spacing, lost=2)

    result = subprocess.run(
        [sys.executable, "-c", INGEST, str(source), str(tmp_path / "store")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    for name, array in volumes.items():
        with np.load(source / f"{name}.npz") as stored:
            voxels, label, spacing_mm = (stored[key] for key in stored.files)
        np.testing.assert_array_equal(voxels[0], array)
        np.testing.assert_array_equal(label[0], array > 0)
        assert tuple(spacing_mm) == spacing
