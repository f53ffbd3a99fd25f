"""Which code and which libraries a run is made with."""

import hashlib
import platform
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssl_core.train.chain import canonical_digest

PACKAGES = ("jobs", "ssl_core", "storage")
"""What trains; `cluster` only starts it."""
_ROOT = Path(__file__).parents[2]


@cache
def code_files() -> dict[str, str]:
    """SHA-256 of each Python file of the packages, by path."""
    return {
        path.relative_to(_ROOT).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for package in PACKAGES
        for path in sorted((_ROOT / package).rglob("*.py"))
    }


def code_digest() -> str:
    """SHA-256 over `code_files`."""
    return canonical_digest(code_files())


def environment(device: torch.device, precision: str, world: int) -> dict[str, Any]:
    """What decides the bits of a run besides its configuration and its data.

    Args:
        device: Where it trains.
        precision: Such as `fp32`.
        world: Ranks.
    """
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "world": world,
        "device": device.type,
        "processor": f"{platform.machine()} {kind}",
        "threads": torch.get_num_threads(),
        "precision": precision,
        "tomoscale": version("tomoscale"),
        "code": code_digest(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }
