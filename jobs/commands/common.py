"""What several verbs share: where the local stack is, and talking to a cluster."""

import argparse
import os
from pathlib import Path

from cluster import stack
from storage.errors import StackError


def state_dir(arguments: argparse.Namespace) -> Path:
    """The local stack's folder: `--state`, else $TOMOSCALE_STATE, else ~/.tomoscale."""
    chosen = getattr(arguments, "state", None)
    return Path(chosen) if chosen else stack.default_state_dir()


def add_state(parser: argparse.ArgumentParser) -> None:
    """The `--state` option."""
    parser.add_argument("--state", metavar="DIR", help="folder of the local stack (default $TOMOSCALE_STATE or ~/.tomoscale)")


def add_json(parser: argparse.ArgumentParser) -> None:
    """The `--json` option of reading verbs."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def use_stack(arguments: argparse.Namespace) -> None:
    """Point this process at the local stack, if one is up; what is already set in the environment stays."""
    for key, value in stack.environment(state_dir(arguments)).items():
        os.environ.setdefault(key, value)


def job_address(arguments: argparse.Namespace) -> str:
    """Where to submit: `--address`, else the local stack, else $RAY_API_SERVER_ADDRESS.

    Raises:
        StackError: none of them is there.
    """
    address = getattr(arguments, "address", None) or os.environ.get("RAY_API_SERVER_ADDRESS")
    if not address:
        raise StackError(
            "cluster",
            expected="--address URL, or a local stack",
            found="neither",
            remedy="start one with `tomoscale up`",
        )
    return address
