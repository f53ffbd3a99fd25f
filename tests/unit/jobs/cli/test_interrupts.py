"""Ctrl-C at a store that has accepted the connection and says nothing."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path


def test_the_second_ctrl_c_leaves_a_hanging_request_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(240)
        environment = {
            **os.environ,
            "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "AWS_ACCESS_KEY_ID": "id",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "TOMOSCALE_STORE_DEADLINE_S": "900",  # an attempt takes its time-out of 30 s at least
        }
        command = [sys.executable, "-m", "jobs.cli.main", "data", "show", "s3://bucket/data"]
        shown = subprocess.Popen(
            command, cwd=Path(__file__).parents[4], env=environment, stderr=subprocess.PIPE, text=True
        )
        try:
            held, _ = silent.accept()
            with held:
                shown.send_signal(signal.SIGINT)
                assert shown.stderr is not None
                assert "Ctrl-C again leaves at once" in shown.stderr.readline()
                shown.send_signal(signal.SIGINT)
                assert shown.wait(20) == 130
        finally:
            shown.kill()
            shown.wait()


def test_sigterm_is_ctrl_c(tmp_path: Path) -> None:
    code = "from jobs.cli import interrupts; import time; interrupts.watch(); print('on', flush=True); time.sleep(600)"
    waiting = subprocess.Popen(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[4], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert waiting.stdout is not None
    assert waiting.stdout.readline() == b"on\n"
    waiting.terminate()
    _, said = waiting.communicate(timeout=240)
    assert said.rstrip().endswith(b"KeyboardInterrupt")
