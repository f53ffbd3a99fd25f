"""Puts the tables of a saved run into a page: `python -m jobs.bench.size.page PAGE FOLDER`.

FOLDER holds `size.json` and `checkpoint.json`, as `bench size` and `bench checkpoint` write them with `--out`.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.bench import checkpoint, measure
from jobs.bench.size import simulate
from jobs.bench.storage.page import Tables, fill


def _stall(result: Mapping[str, Any]) -> str:
    return measure.table(result["rows"], checkpoint.COLUMNS) + "\n\n" + checkpoint.uploads_text(result)


TABLES: Tables = {
    "size-machine": ("size", lambda r, _: measure.headline(r["machine"])),
    "size-steps": ("size", lambda r, _: measure.table(r["steps"], simulate.STEP_COLUMNS)),
    "size-volumes": ("size", lambda r, _: measure.table(r["volumes"], simulate.VOLUME_COLUMNS)),
    "size-digests": ("size", lambda r, _: measure.table(r["digests"], simulate.DIGEST_COLUMNS)),
    "size-checkpoints": ("size", lambda r, _: measure.table(r["checkpoints"], simulate.CHECKPOINT_COLUMNS)),
    "checkpoint-machine": ("checkpoint", lambda r, _: measure.headline(r["machine"])),
    "checkpoint": ("checkpoint", lambda r, _: _stall(r)),
    "size-same": ("size", lambda r, _: simulate.same_text(dict(r["same"]))),
}


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(fill(page.read_text(encoding="utf-8"), Path(sys.argv[2]), TABLES), encoding="utf-8")
