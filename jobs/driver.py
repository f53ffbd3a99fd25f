"""What every `python -m jobs.NAME CONFIG [key=value ...]` shares: arguments, errors, how its run ends, its result."""

import argparse
import contextlib
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from jobs.output import open_streams
from jobs.tracking.runs import in_our_words
from jobs.watch.causes import cause_of
from ssl_core.config import Config
from ssl_core.config import load as load_config
from storage.errors import ConfigError, StoreError, TomoscaleError
from storage.format.manifest import Manifest
from storage.objects import join, open_store
from storage.objects.retry import RetryPolicy, TransientError, retry

C = TypeVar("C", bound=Config)
# A request to MLflow and its repetition take 20 s at most; see `jobs.tracking.runs.client`.
_END_OF_A_RUN = RetryPolicy(deadline_s=50.0, attempt_s=20.0, first_s=2.0)


def load(kind: type[C], argv: Sequence[str], program: str) -> C:
    """The configuration named on a job's command line."""
    usage = argparse.ArgumentParser(prog=f"python -m {program}")
    usage.add_argument("config", help="YAML file")
    usage.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="settings that replace those of the file",
    )
    arguments = usage.parse_args(argv)
    return load_config(kind, Path(arguments.config), arguments.overrides)


def check_channels(manifest: Manifest, indices: Iterable[int], network: str, arguments: Mapping[str, Any]) -> None:
    """Refuse volumes of another number of channels than a network takes.

    Args:
        manifest: Of the volumes.
        indices: Those that the network will see.
        network: What the message calls it.
        arguments: Of its backbone.

    Raises:
        ConfigError: names the first such volume.
    """
    channels = int(arguments.get("in_channels", 1))
    codes, kinds = manifest.kinds()  # not row by row, which for a million volumes takes minutes on every rank
    rows = np.array(list(indices), dtype=np.int64)
    others = rows[np.isin(codes[rows], [code for code, (_, count) in enumerate(kinds) if count != channels])]
    if len(others):
        record = manifest.record(int(others[0]))
        raise ConfigError(
            f"volume {record.volume_id}",
            expected=f"{channels} channel(s), as {network} takes",
            found=str(record.channels),
            remedy="set in_channels of the backbone, start from an encoder of as many, or ingest as many",
        )


def guarded(main: Callable[[Sequence[str]], int]) -> int:
    """Run a job's main; errors of ours become one line and an exit code."""
    open_streams()
    quiet()
    try:
        return main(sys.argv[1:])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130
    except Exception as error:
        failure = error if isinstance(error, TomoscaleError) else in_our_words(error)
        if failure is None:
            print(f"{_program()}: {cause_of(error)}; where it happened:", file=sys.stderr, flush=True)
            raise
        print(f"{_program()}: {failure}", file=sys.stderr, flush=True)
        if os.environ.get("TOMOSCALE_TRACEBACK"):
            traceback.print_exc()
        return failure.exit_code


def _program() -> str:
    path = Path(sys.argv[0])
    return path.parent.name if path.stem == "__main__" else path.stem


def quiet() -> None:
    """Keep the log for what a reader can act on: libraries speak from warnings upwards, and not of deprecations."""
    for name in ("ray", "ray.train", "ray.tune", "botocore", "mlflow", "optuna", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # A line for each try of each request to a server that is away; what asks says once that it is.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(mlflow|monai|ray|torch)(\.|$)")


def end_run(api: Any, run_id: str, status: str) -> None:
    """Set the final status of a run, through a server outage of half a minute; never raises."""
    from mlflow.exceptions import MlflowException  # late: not every job has MLflow

    def attempt() -> None:
        try:
            api.set_terminated(run_id, status)
        except MlflowException as error:
            print(f"MLflow did not take the status {status} ({type(error).__name__})", flush=True)
            raise TransientError(str(error)) from error

    with contextlib.suppress(StoreError):
        retry(attempt, _END_OF_A_RUN, "MLflow")


def end_failed(api: Any, run_id: str, error: BaseException) -> None:
    """End the run of a job that an error ended: as killed where somebody stopped it, else as failed.

    `jobs stop` sends SIGTERM, which Ray turns into SystemExit in a driver.
    """
    end_run(api, run_id, "KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED")


def write_result(runs: str, name: str, result: dict[str, Any]) -> None:
    """Write `<runs>/<name>/result.json`."""
    open_store(join(runs, name)).put("result.json", json.dumps(result).encode())


def read_result(runs: str, name: str) -> dict[str, Any]:
    """What a job of that name wrote last.

    Raises:
        NotFound: it has written nothing.
    """
    result: dict[str, Any] = json.loads(open_store(join(runs, name)).get("result.json"))
    return result
