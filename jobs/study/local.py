"""A study on one machine without a stack: no Ray, no MLflow, results in a folder."""

from collections.abc import Callable
from pathlib import Path

from jobs.configs.study import StudyConfig
from jobs.ingestion import SIMULATED, ensure_data
from jobs.lease import Lease
from jobs.study.pools import Inline, Pool, Processes
from jobs.study.report import write
from jobs.study.run import Surroundings, run
from storage.ingest.mapping import map_threads


def placed(config: StudyConfig, folder: Path) -> StudyConfig:
    """The study with its results below a folder, and its data too where it would make them in a bucket."""
    url = folder.absolute().as_uri()
    changes = {"runs": f"{url}/runs", "cache": config.cache if config.cache else f"{url}/pretrained"}
    if config.source == SIMULATED and config.data.startswith("s3://"):
        changes["data"] = f"{url}/volumes/simulated"
    return config.model_copy(update=changes)


def study(config: StudyConfig, folder: Path, command: str, say: Callable[[str], None]) -> None:
    """Run a study in a few processes of this machine, write its report to the folder and say its conclusion.

    Args:
        config: The study, from `placed`.
        folder: Where everything goes.
        command: What repeats it, for the report's first line.
        say: Hears lines.

    Raises:
        TomoscaleError: as `jobs.study.run.run`; what is done stays, and the same command goes on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ensure_data(config.data, config.source, map_threads)
    pool: Pool = Processes(config.concurrent) if config.concurrent > 1 else Inline()
    with Lease(config.runs, config.name, "study") as lease:
        try:
            result = run(config, Surroundings(pool, check=lease.check, say=say))
        finally:
            pool.close()
        if result is None:
            return
        for path in write(config, result, folder / config.name, command):
            say(f"report: {path}")
    say("\n".join(result.conclusion))
