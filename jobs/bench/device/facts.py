"""The machine and the versions that a benchmark of the training device ran with."""

from collections.abc import Iterable
from importlib import metadata
from typing import Any

import torch

from jobs.bench import measure

_VERSIONS = ("torch", "monai", "lightly", "kornia", "numpy", "dynamic-network-architectures")


def machine(devices: Iterable[torch.device] = ()) -> dict[str, Any]:
    """JSON-able; see `jobs.bench.measure.machine`, and torch's threads, accelerators and what is compared."""
    facts = measure.machine()
    facts["versions"] = {name: text for name in _VERSIONS if (text := version(name)) is not None}
    facts["threads"] = torch.get_num_threads()
    facts["capability"] = torch.backends.cpu.get_cpu_capability()
    facts["accelerators"] = [torch.cuda.get_device_name(d) for d in devices if d.type == "cuda"]
    return facts


def version(name: str) -> str | None:
    """Of an installed distribution."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
