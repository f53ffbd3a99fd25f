"""`python -m tests.kit.fleet_outcome NAME STEPS`: what a job left on S3 and in MLflow, as JSON."""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

from jobs.tracking import runs
from ssl_core.train import checkpoint
from storage.objects import open_store


def main(name: str, steps: int) -> None:
    """Print it."""
    store = open_store(f"s3://runs/{name}/step-{steps:08d}")
    with tempfile.TemporaryDirectory() as folder:
        for key in store.list():
            path = Path(folder) / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(store.get(key))
        state, meta = checkpoint.load(Path(folder))
    digest = hashlib.sha256()
    for key, tensor in sorted(state["method"].items()):
        digest.update(key.encode() + tensor.contiguous().numpy().tobytes())
    api = runs.client()
    experiment = api.get_experiment_by_name("tomoscale").experiment_id
    (run,) = api.search_runs([experiment], f"tags.`tomoscale.job` = '{name}'")
    history = sorted(api.get_metric_history(run.info.run_id, "loss"), key=lambda metric: metric.step)
    print(
        json.dumps(
            {
                "points": [metric.step for metric in history],
                "losses": [metric.value for metric in history],
                "samples": str(meta["samples"]),
                "weights": digest.hexdigest(),
                "status": run.info.status,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
