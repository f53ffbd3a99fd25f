"""What all tests need of their process."""

import signal

# A shell that starts a program in the background has it, and all that it starts, ignore Ctrl-C, which tests send.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
