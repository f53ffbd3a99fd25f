"""The commands of docker/compose.yaml against the programs that they name."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.service
BIN = Path(sys.executable).parent
COMPOSE = Path(__file__).resolve().parents[2] / "docker" / "compose.yaml"
SERVICES = yaml.safe_load(COMPOSE.read_text())["services"]


@pytest.mark.parametrize(
    ("service", "help_command"),
    [
        ("s3", ["weed", "server", "-h"]),
        ("mlflow", ["mlflow", "server", "--help"]),
        ("head", ["ray", "start", "--help"]),
    ],
)
def test_options_in_compose_exist(service: str, help_command: list[str]) -> None:
    program, *rest = help_command
    shown = subprocess.run([BIN / program, *rest], capture_output=True, text=True, timeout=240)
    known = set(re.findall(r"(?<![\w-])--?[A-Za-z][\w.-]*", shown.stdout + shown.stderr))
    command = SERVICES[service]["command"]
    start = command.index(rest[0])
    used = {part.split("=", 1)[0] for part in command[start:] if part.startswith("-")}
    assert used
    assert used <= known
    if service == "head":
        worker = SERVICES["worker"]["command"]
        assert {part.split("=", 1)[0] for part in worker if part.startswith("-")} <= known
