"""The command line. Exit codes: 0 done, 1 failed, 2 usage or configuration, 3 refused input, 4 a job goes on unwatched.

It is argparse's: `key=value` after options and imports that wait for their verb are all that it lacks.
"""

import argparse
import contextlib
import errno
import os
import select
import signal
import sys
import traceback
from collections.abc import Sequence

from jobs.cli import interrupts
from jobs.cli.verbs import bench, certificate, data, demo, models, plan, predict, stack, study, train
from jobs.cli.verbs import jobs as submit
from jobs.output import open_streams
from jobs.tracking.runs import in_our_words
from storage.errors import TomoscaleError

# What was expected, and what to do, where the system itself says no.
_ELSEWHERE = "or give another place"
_RIGHTS = ("the right to use it", f"change its owner or rights, {_ELSEWHERE}")
_SYSTEM = {
    errno.ENOSPC: ("room on its disk", f"free space there or in $TMPDIR, {_ELSEWHERE}"),
    errno.EDQUOT: ("room within the quota", f"free space there or in $TMPDIR, {_ELSEWHERE}"),
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: ("a file system that may be written", "give another place"),
    errno.ENOENT: ("a path that exists", "check the path"),
}


def parser() -> argparse.ArgumentParser:
    """The whole grammar; every verb that is listed works."""
    top = argparse.ArgumentParser(
        prog="tomoscale",
        description="Self-supervised pre-training for CT and MR volumes: Zarr on object storage, Ray, MLflow.",
        epilog="Exit codes: 0 done, 1 failed, 2 usage or configuration, 3 refused input, 4 a job goes on unwatched.",
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for group in (demo, stack, data, train, study, plan, models, predict, submit, certificate, bench):
        group.add(verbs)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code."""
    open_streams()
    if argv is None:
        interrupts.watch()
    try:
        try:
            arguments = _parse(argv)
            code: int | None = arguments.run(arguments)
        finally:
            sys.stdout.flush()  # a reader that went away shows here, and not when the interpreter ends
        return code or 0
    except KeyboardInterrupt:
        print("tomoscale: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_gone():
            return 128 + signal.SIGPIPE  # as with `| head`: nothing to say, and nobody to say it to
        code = _failed(_of_the_system(error), 1)
        _drop_unwritten()
        return code
    except Exception as error:
        failure = error if isinstance(error, TomoscaleError) else in_our_words(error)
        if failure is None:
            raise
        return _failed(str(failure), failure.exit_code)


def _failed(message: str, code: int) -> int:
    print(f"tomoscale: {message}", file=sys.stderr)
    if os.environ.get("TOMOSCALE_TRACEBACK"):
        traceback.print_exc()
    return code


def _of_the_system(error: OSError) -> str:
    """The message of an error that no part of the project has put into words of its own."""
    reason = error.strerror or str(error)
    if error.errno not in _SYSTEM:
        return f"{error.filename}: {reason}" if error.filename else reason
    expected, remedy = _SYSTEM[error.errno]
    thing = str(error.filename or "a file of this command")
    return str(TomoscaleError(thing, expected=expected, found=reason, remedy=remedy))


def _drop_unwritten() -> None:
    """Forget output that a full disk did not take: the interpreter would fail over it again as it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _reader_gone() -> bool:
    """Whether our output or messages went into a pipe that nobody reads any more; if so, the rest goes nowhere."""
    gone = False
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a stream without a file, as in a notebook
            look = select.poll()
            look.register(stream.fileno(), 0)
            if any(event & (select.POLLERR | select.POLLHUP) for _, event in look.poll(0)):
                gone = True
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return gone


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments, with `key=value` allowed after options too, where argparse alone would not have it."""
    top = parser()
    arguments, rest = top.parse_known_args(argv)
    takes = next((name for name in ("overrides", "policy", "settings") if hasattr(arguments, name)), None)
    if rest and (takes is None or any(item.startswith("-") or "=" not in item for item in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if takes and rest:
        setattr(arguments, takes, [*getattr(arguments, takes), *rest])
    return arguments


if __name__ == "__main__":
    sys.exit(main())
