"""`tomoscale bench predict`: how much memory and time a mask of a large volume takes, and whether it fits.

The volume is a phantom in a store, the network has random weights, and the mask is written by `tomoscale predict` in a
process of its own, whose memory is what the kernel counted.
"""

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from jobs.bench.measure import machine, peak_mib
from jobs.bench.storage.data import DataSet, phantoms, write_tomoscale
from jobs.output import table
from ssl_core.bundle import write_bundle
from ssl_core.bundle_card import BundleFacts
from ssl_core.networks.registry import build
from ssl_core.views.intensity import IntensityPolicy
from storage.errors import StackError

Say = Callable[[str], None]
Triple = tuple[int, int, int]
LIMIT_GIB = 8.0
"""Memory of a small workstation, in which a whole-body CT has to fit."""
_SLICES = 100
"""Of the phantom; they are repeated, since a whole one takes more memory to make than to segment."""


@dataclass(frozen=True, slots=True)
class Size:
    """What is predicted.

    Attributes:
        shape_DHW: Voxels of the volume.
        window_DHW: Voxels of a window, multiples of 8.
        classes: Background included.
        features: Of the network's stages.
    """

    shape_DHW: Triple = (1000, 512, 512)
    window_DHW: Triple = (128, 128, 128)
    classes: int = 14
    features: tuple[int, ...] = (8, 16, 32, 64)


FULL = Size()
QUICK = Size((40, 48, 64), (16, 16, 16), 4, (4, 8, 16, 32))


def bench_predict(size: Size, *, batch: int = 1, say: Say = print) -> dict[str, Any]:
    """Write a volume and a model, and predict.

    Args:
        size: What is predicted.
        batch: Windows at once.
        say: Hears progress.

    Returns:
        JSON-able: `machine`, `size`, `batch`, `seconds`, `cpu_seconds` of all threads, `peak_gib` of resident memory,
        `image_gib` as stored values, `limit_gib`.

    Raises:
        StackError: the prediction failed.
    """
    with tempfile.TemporaryDirectory(prefix="tomoscale-predict-") as scratch:
        folder = Path(scratch)
        say(f"writing a volume of {' x '.join(map(str, size.shape_DHW))} voxels (D, H, W)")
        (folder / "store").mkdir()
        write_tomoscale(_volume(size), folder / "store")
        bundle = _model(size, folder / "model")
        store, mask = (folder / "store").as_uri(), folder / "mask.nii.gz"
        words = [str(bundle), store, str(mask), "--batch", str(batch)]
        began, cpu_before_s = time.monotonic(), _children_cpu_s()
        with subprocess.Popen([sys.executable, "-m", "jobs.cli.main", "predict", *words]) as process:
            peak = 0.0
            while process.poll() is None:
                peak = max(peak, peak_mib(process.pid))
                time.sleep(0.1)
        seconds, cpu_s = time.monotonic() - began, _children_cpu_s() - cpu_before_s
        if process.returncode != 0:
            raise StackError(
                "tomoscale predict",
                expected="exit code 0",
                found=str(process.returncode),
                remedy="see what it said above",
            )
        shape = nib.load(mask).shape  # type: ignore[attr-defined]
        assert shape == size.shape_DHW[::-1], shape
    return {
        "machine": machine(),
        "size": asdict(size),
        "batch": batch,
        "seconds": seconds,
        "cpu_seconds": cpu_s,
        "peak_gib": peak / 1024,
        "image_gib": 2 * int(np.prod(size.shape_DHW)) / 2**30,
        "limit_gib": LIMIT_GIB,
    }


def _children_cpu_s() -> float:
    """Processor seconds of processes that have ended and were waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _volume(size: Size) -> DataSet:
    depth, *plane = size.shape_DHW
    slices = min(depth, _SLICES)
    part = phantoms(1, (slices, plane[0], plane[1])).volumes["ct-00"]
    whole = np.concatenate([part] * -(-depth // slices))[:depth]
    return DataSet("phantom CT", size.window_DHW, {"ct-00": whole})


def _model(size: Size, target: Path) -> Path:
    torch.manual_seed(0)
    network = build("plain_unet", features_per_stage=list(size.features), out_channels=size.classes)
    facts = BundleFacts(
        name="random",
        patch_DHW=size.window_DHW,
        intensity=IntensityPolicy(kind="zscore"),
        labels=((0, "background"), *((value, f"class-{value}") for value in range(1, size.classes))),
    )
    return write_bundle(target, "segmenter", network, facts)


def format_predict(result: dict[str, Any]) -> str:
    """The result for a person."""
    size = result["size"]
    fits = "fits" if result["peak_gib"] <= result["limit_gib"] else "does NOT fit"
    rows = [
        ("volume (D, H, W)", " x ".join(map(str, size["shape_DHW"])) + f", {result['image_gib']:.2f} GiB"),
        ("windows (D, H, W)", " x ".join(map(str, size["window_DHW"])) + f", {result['batch']} at once"),
        ("classes", size["classes"]),
        ("time", f"{result['seconds'] / 60:.1f} min, {result['cpu_seconds'] / 60:.1f} min of processor"),
        ("memory at most", f"{result['peak_gib']:.2f} GiB, {fits} in {result['limit_gib']:.0f} GiB"),
    ]
    return table(("", ""), rows)
