"""Puts the tables of a saved run into a page: `python -m jobs.bench.size.page PAGE FOLDER`.

FOLDER holds `size.json`, as `tomoscale bench size --out` writes it.
"""

import sys
from pathlib import Path

from jobs.bench import measure
from jobs.bench.size import simulate
from jobs.bench.storage.page import Tables, fill

TABLES: Tables = {
    "size-machine": ("size", lambda r, _: measure.headline(r["machine"])),
    "size-steps": ("size", lambda r, _: measure.table(r["steps"], simulate.STEP_COLUMNS)),
    "size-volumes": ("size", lambda r, _: measure.table(r["volumes"], simulate.VOLUME_COLUMNS)),
    "size-digests": ("size", lambda r, _: measure.table(r["digests"], simulate.DIGEST_COLUMNS)),
    "size-checkpoints": ("size", lambda r, _: measure.table(r["checkpoints"], simulate.CHECKPOINT_COLUMNS)),
    "size-same": ("size", lambda r, _: simulate.same_text(dict(r["same"]))),
}


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(fill(page.read_text(encoding="utf-8"), Path(sys.argv[2]), TABLES), encoding="utf-8")
