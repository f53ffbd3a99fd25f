"""Running a method through `torch.compile`, refused before the first step where nothing can be compiled."""

import torch
from torch import Tensor, nn

from storage.errors import ConfigError


def enable(method: nn.Module, device: torch.device) -> None:
    """Compile a method's forward pass from its first step on.

    One small function is compiled first: what `torch.compile` needs of a machine it says at its first use only, and
    what it needs differs with the device, the release and the packages beside it.

    Args:
        method: As given to the engine.
        device: Where it trains.

    Raises:
        ConfigError: this machine cannot compile.
    """
    lack = why_not(device)
    if lack:
        raise ConfigError(
            "engine.compile",
            expected=f"a compiler that torch.compile works with on {device.type}, and the headers of Python",
            found=lack,
            remedy="set engine.compile=false, or train where there is one: g++, or what CXX names; the image has none",
        )
    method.compile()


def why_not(device: torch.device) -> str:
    """Why `torch.compile` does not work here, in one line; empty where it does."""
    try:
        torch.compile(_double, fullgraph=True, dynamic=False)(torch.ones(8, device=device))
    except (RuntimeError, OSError, ImportError) as error:  # torch's own are RuntimeErrors; a cache may not be writable
        # The first line names the backend that raised, the next one says what.
        lines = [line for line in str(error).splitlines() if line.strip() and not line.endswith(" raised:")]
        return lines[0].strip()[:300] if lines else type(error).__name__
    return ""


def _double(values: Tensor) -> Tensor:
    return values * 2
