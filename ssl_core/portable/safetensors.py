"""A reader of the safetensors format: 8 bytes of header length, a JSON header, raw little-endian tensors.

The package `safetensors` is not part of the environment that a bundle may count on. Tensors that several names share
are stored once; the header's metadata names the others, `{"other name": "stored name"}`, as that package's `save_model`
does.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import RefusedInput

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU, by name; names that share a tensor have the same one.

    Raises:
        RefusedInput: truncated file, a header that is not JSON, an unknown dtype, or a tensor outside the file.
    """
    name = str(path)
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise RefusedInput(name, expected="a readable weights file", found=str(error.strerror)) from error
    length = int.from_bytes(data[:8], "little")
    try:
        if len(data) < 8 + length:
            raise ValueError(f"{len(data)} bytes for a header of {length}")
        header: dict[str, Any] = json.loads(data[8 : 8 + length])
        body = memoryview(data)[8 + length :]
        others: dict[str, str] = header.pop("__metadata__", {})
        tensors = {key: _tensor(key, entry, body) for key, entry in header.items()}
        shared = {other: tensors[key] for other, key in others.items() if key in tensors and other not in tensors}
        return tensors | shared
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RefusedInput(
            name, expected="a whole safetensors file", found=str(error), remedy="pull the bundle again"
        ) from error


def same_tensors(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Names whose tensor is that of another name: the same memory, shape and type.

    Returns:
        Each such name to the first with the fewest parts, which is not among the keys.
    """
    groups: dict[Any, list[str]] = {}
    for name, tensor in state.items():
        if tensor.numel():
            place = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
            groups.setdefault(place, []).append(name)
    first = {name: min(names, key=lambda n: n.count(".")) for names in groups.values() for name in names}
    return {name: one for name, one in first.items() if name != one}


def _tensor(key: str, entry: dict[str, Any], body: memoryview) -> Tensor:
    dtype = _DTYPES[entry["dtype"]]
    shape = [int(n) for n in entry["shape"]]
    start, stop = (int(n) for n in entry["data_offsets"])
    if not 0 <= start <= stop <= len(body) or stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"tensor {key!r} of shape {shape} at bytes {start} to {stop} of {len(body)}")
    if start == stop:
        return torch.empty(shape, dtype=dtype)
    # bytearray: torch wants memory that it may write to
    return torch.frombuffer(bytearray(body[start:stop]), dtype=dtype).reshape(shape)
