"""Ingest as a Ray job: `python -m jobs.ingest CONFIG [key=value ...]`, one Ray task a volume."""

import os
import sys
from collections.abc import Sequence
from functools import partial

from jobs.driver import guarded, load
from jobs.ingest_config import IngestConfig
from jobs.ingestion import SIMULATED, ingest
from jobs.on_ray.map import ray_map
from jobs.on_ray.room import require_room
from jobs.on_ray.session import connect
from storage.errors import ConfigError
from storage.ingest.work import unread

over_tasks = partial(ray_map, lost=unread)
"""A mapper of an ingest: a volume whose task is killed each time is refused, and the others go on."""


def main(argv: Sequence[str]) -> int:
    """Driver of the Ray job."""
    config = load(IngestConfig, argv, "jobs.ingest")
    if not os.path.isdir(config.source) and config.source != SIMULATED:
        raise ConfigError(
            f"source {config.source}",
            expected="a folder that the cluster's nodes can see",
            found="a file" if os.path.exists(config.source) else "no such folder",
            remedy="check the path; every volume below a folder is taken",
        )
    connect()
    require_room("a task of the ingest", "", cpus=1)
    ingest(
        config.source,
        config.data,
        config.policy,
        append=config.append,
        mapper=over_tasks,
        say=lambda line: print(line, flush=True),
    )
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
