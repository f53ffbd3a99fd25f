"""What several verbs share: where the local stack is, and talking to a cluster."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from cluster import services, stack
from cluster.state import default_dir
from storage.errors import StackError

MODEL = "model URI (models:/NAME@ALIAS, models:/NAME/VERSION or NAME), or the folder or URL of a bundle"
"""What verbs that read a model say of it."""


def state_dir(arguments: argparse.Namespace) -> Path:
    """The local stack's folder: `--state`, else $TOMOSCALE_STATE, else ~/.tomoscale."""
    option = getattr(arguments, "state", None)
    return Path(option) if option else default_dir()


def add_state(parser: argparse.ArgumentParser) -> None:
    """The `--state` option."""
    parser.add_argument(
        "--state", metavar="DIR", help="folder of the local stack (default $TOMOSCALE_STATE or ~/.tomoscale)"
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """The `--json` option of reading verbs."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def use_stack(arguments: argparse.Namespace) -> None:
    """Point this process at the local stack, if one is up; what else is set in the environment stays.

    Where $AWS_ENDPOINT_URL_S3 or $MLFLOW_TRACKING_URI names another server, that one is meant: its settings stay as
    they are, and it is not shown the stack's keys. Where it names none, the stack is not shown those of another.
    """
    folder = state_dir(arguments)
    if not stack.status(folder).running:
        return
    settings = stack.environment(folder)
    if os.environ.get("AWS_ENDPOINT_URL_S3") in (None, "", settings["AWS_ENDPOINT_URL_S3"]):
        for key in services.UNSET:  # keys of another store in the environment would beat the stack's profile
            os.environ.pop(key, None)
    for address, group in (("AWS_ENDPOINT_URL_S3", "AWS_"), ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_")):
        url = os.environ.get(address)
        own = {key: value for key, value in settings.items() if key.startswith(group)}
        if not url:
            os.environ.update(own)
        elif url != settings[address]:
            settings = {key: value for key, value in settings.items() if key not in own}
    for key, value in settings.items():
        os.environ.setdefault(key, value)


def check_starts(config: Any, arguments: argparse.Namespace) -> None:
    """Refuse a job that starts from what is not there or does not fit; what cannot be asked from here is a note.

    Raises:
        TomoscaleError: see `jobs.plan.starts.require_starts`.
    """
    from jobs.plan.starts import require_starts

    use_stack(arguments)
    require_starts(config, lambda line: print(f"note: {line}", file=sys.stderr, flush=True))


def salt_here() -> str | None:
    """The variable that names the user's salt of pseudonyms, where one is set; a secret, so no job carries it."""
    return next((name for name in ("TOMOSCALE_SALT", "TOMOSCALE_SALT_FILE") if os.environ.get(name)), None)


def job_address(arguments: argparse.Namespace) -> str:
    """Where to submit: `--address`, else $TOMOSCALE_JOBS_ADDRESS, else the local stack.

    Raises:
        StackError: none of them is there.
    """
    info = stack.status(state_dir(arguments))
    local = info.jobs_address if info.running else None
    address = getattr(arguments, "address", None) or os.environ.get("TOMOSCALE_JOBS_ADDRESS") or local
    if not address:
        raise StackError(
            "cluster",
            expected="--address URL, or a local stack",
            found="neither",
            remedy="start one with `tomoscale up`",
        )
    return address
