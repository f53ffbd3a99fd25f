"""What several verbs share: where the local stack is, and talking to a cluster."""

import argparse
import os
from pathlib import Path

from cluster import services, stack
from cluster.state import default_dir
from storage.errors import StackError


def state_dir(arguments: argparse.Namespace) -> Path:
    """The local stack's folder: `--state`, else $TOMOSCALE_STATE, else ~/.tomoscale."""
    chosen = getattr(arguments, "state", None)
    return Path(chosen) if chosen else default_dir()


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

    Where $AWS_ENDPOINT_URL_S3 names another server, that one is meant and all S3 settings stay as they are.
    """
    folder = state_dir(arguments)
    if not stack.status(folder).running:
        return
    settings = stack.environment(folder)
    s3 = "AWS_ENDPOINT_URL_S3"
    if os.environ.get(s3) not in (None, "", settings[s3]):
        settings = {key: value for key, value in settings.items() if not key.startswith("AWS_")}
    else:
        for key in services.UNSET:  # keys of another store in the environment would beat the stack's profile
            os.environ.pop(key, None)
    for key, value in settings.items():
        os.environ.setdefault(key, value)


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
