"""Refusing what was carried through a fork: in the child its threads do not exist, and waiting for them never ends."""

import os

from storage.errors import StoreError


def same_process(pid: int, thing: str) -> None:
    """Check that this is the process `pid`, in which `thing` was opened.

    Raises:
        StoreError: it is a fork of it.
    """
    if os.getpid() != pid:
        raise StoreError(
            thing,
            expected="the process that opened it",
            found="a fork of that process, in which its threads do not exist",
            remedy="start workers by spawn or forkserver, and open it in each of them",
        )
