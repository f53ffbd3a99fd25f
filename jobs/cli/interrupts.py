"""Ctrl-C while a compiled library waits: say what is waited for, and leave at once when it is pressed again.

Python runs a signal's handler between two of its own instructions, so a request that hangs inside a compiled client
would swallow Ctrl-C until its time-out. The signal's arrival, unlike its handler, is seen by a thread.
"""

import os
import signal
import socket
import sys
import threading

_PATIENCE_S = 2.0
_handled = threading.Event()


def watch() -> None:
    """Handle SIGINT and SIGTERM as KeyboardInterrupt from now on; to be called once, in the main thread."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    arrivals, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(os.dup(writer.fileno()), warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(arrivals,), name="interrupts", daemon=True).start()


def _interrupt(signum: int, frame: object) -> None:
    _handled.set()
    raise KeyboardInterrupt


def _listen(arrivals: socket.socket) -> None:
    waiting = False
    while True:
        numbers = arrivals.recv(16)
        if not {signal.SIGINT, signal.SIGTERM} & set(numbers):
            continue
        if waiting and not _handled.is_set():
            # Nothing is lost: what is published is published by one atomic write, and leftovers carry no name.
            os._exit(130)
        if waiting := not _handled.wait(_PATIENCE_S):
            print(
                "tomoscale: interrupted; a request is still under way and ends within its time limit. Ctrl-C again "
                "leaves at once",
                file=sys.stderr,
                flush=True,
            )
        _handled.clear()
