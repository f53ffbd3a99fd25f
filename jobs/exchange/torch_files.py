"""PyTorch's own files, which are pickles: written for tools that ask for them, and read without executing any.

The only file of the project that opens them. A pickle can name any function to be called; PyTorch's restricted reader
(`weights_only=True`) builds tensors, containers and numbers and refuses all else.
"""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from storage.errors import RefusedInput

_SCALAR = np.float64(0).__reduce__()[0]
# Numbers of NumPy, which trainers keep beside the weights: a dtype and bytes.
_NUMBERS: list[Any] = [np.dtype, *{type(np.dtype(name)) for name in ("f2", "f4", "f8", "i4", "i8", "u1", "?")}]
_NUMBERS += [(_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]


def write_torch(path: Path, data: Any) -> None:
    """Write tensors, containers and numbers."""
    torch.save(data, path)


def read_torch(path: Path) -> Any:
    """Tensors, containers and numbers of a file, on the CPU.

    Raises:
        RefusedInput: no such file, none of PyTorch's, a damaged one, or one that would have to execute something; then
            the error names what.
    """
    try:
        with torch.serialization.safe_globals(_NUMBERS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        match = re.search(r"GLOBAL ([\w.]+)|(?:class|function|global) ([\w.]+\.[\w.]+)", str(error))
        if match is None:
            raise _unreadable(path, error) from error
        raise RefusedInput(
            str(path),
            expected="tensors, containers and numbers",
            found=f"{match[1] or match[2]}, which reading the file would execute",
            remedy="load it where you trust it, and save its state dict alone",
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> RefusedInput:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return RefusedInput(
        str(path), expected="a checkpoint of PyTorch", found=reason, remedy="check the path, or copy the file again"
    )
