"""Super-pixels beside the images of a store: made once, by `tomoscale data superpixels` or by the job that needs them.

`python -m jobs.superpixels CONFIG [key=value ...]` is the Ray job, with one Ray task a volume. `compute` does the same
from any process: over Ray tasks where that process is in a cluster, over threads where it is not.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial

import ray

from jobs.configs import PretrainConfig, SuperpixelConfig
from jobs.driver import guarded, load
from jobs.on_ray.map import ray_map
from jobs.on_ray.room import require_room
from jobs.on_ray.session import connect
from jobs.output import Progress as Bar
from ssl_core.config import resolved
from ssl_core.methods.base import method_class
from ssl_core.superpixels.settings import Superpixels
from ssl_core.views.types import ViewSpec
from storage.format.manifest import Manifest
from storage.ingest import derived_maps as derive
from storage.ingest.mapping import map_threads


def compute(data: str, settings: Superpixels, *, say: Callable[[str], None] = print) -> derive.DeriveReport:
    """Compute what is missing of one kind of super-pixels, publish it, and say what happened.

    Args:
        data: URL of the store.
        settings: How they are made; names the map.
        say: Hears the summary.

    Raises:
        TomoscaleError: as `storage.ingest.derived_maps.run`.
    """
    from ssl_core.superpixels.segment import of_volume  # slow to import; all that a task imports, and no torch

    bar: list[Bar] = []

    def progress(done: int, total: int) -> None:
        if not bar:
            bar.append(Bar("super-pixels", total, "volumes"))
        bar[0].update(done, "")

    report = derive.run(
        data,
        settings.name,
        partial(of_volume, settings=settings),
        recipe=described(settings),
        mapper=ray_map if ray.is_initialized() else map_threads,
        progress=progress,
    )
    say(
        f"{settings.name} beside the images of {data} (manifest {report.manifest.fingerprint}): {report.written}"
        f" computed, {report.resumed} left by an earlier run, {report.skipped} already there, in {report.seconds:.1f} s"
    )
    if report.absent:
        say(f"  {len(report.absent)} volumes were published meanwhile and have none: run it again")
    return report


def described(settings: Superpixels) -> str:
    """What the manifest says of how a map was made."""
    return "super-pixels " + " ".join(f"{key}={value}" for key, value in resolved(settings).items())


def ensure_superpixels(config: PretrainConfig, *, say: Callable[[str], None] = print) -> None:
    """Make the super-pixels that a job's method reads, where its store lacks some and the job pins no manifest.

    A pinned manifest stays what it is: `jobs.pretrain.inputs.require_superpixels` then says what to do.
    """
    if config.fingerprint is not None:
        return
    views: ViewSpec = method_class(config.method_name).view_spec(config.method_config)
    for settings in views.superpixels:
        if derive.lacking(Manifest.open(config.data), settings.name):
            say(f"computing {settings.name}, which {config.method_name} reads")
            compute(config.data, settings, say=say)


def main(argv: Sequence[str]) -> int:
    """Driver of the Ray job."""
    config = load(SuperpixelConfig, argv, "jobs.superpixels")
    connect()
    require_room("a task of the super-pixels", "", cpus=1)
    compute(config.data, config.superpixels, say=lambda line: print(line, flush=True))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
