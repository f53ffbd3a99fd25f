"""A CUDA device that is not there: tensors say `cuda:0` and keep their numbers on the CPU.

A step runs on it as on a device, and so shows without a GPU which ops mix devices (they raise, as there), which lines
make the host wait for the device, and which ops add in no fixed order there. Collectives must have what NCCL wants. It
says nothing of memory, speed, streams, compiled code, or of the numbers that CUDA's kernels give.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("cuda", 0)
_WAITS = frozenset({
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "_linalg_check_errors", "_linalg_eigh", "linalg_eig", "_linalg_svd",
})  # fmt: skip
"""Ops whose result the host has to know, or that ask a solver whether it succeeded."""

_UNORDERED = frozenset({
    "grid_sampler_2d_backward", "grid_sampler_3d_backward", "upsample_linear1d_backward", "avg_pool3d_backward",
    "upsample_bilinear2d_backward", "upsample_bicubic2d_backward", "upsample_trilinear3d_backward",
    "adaptive_max_pool2d_backward",
    "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward", "max_pool3d_with_indices_backward", "histc",
    "adaptive_max_pool3d_backward", "reflection_pad1d_backward", "reflection_pad2d_backward", "median", "put_",
    "reflection_pad3d_backward", "nll_loss2d_forward",
})  # fmt: skip
"""Ops that have no deterministic kernel on CUDA (`torch.use_deterministic_algorithms`); `cumsum` of floats besides."""

_TORCH, _HERE = str(Path(torch.__file__).parent), __file__


class OnDevice(Tensor):
    """A tensor that says it is on `DEVICE`; its numbers are `host`.

    For torch's core it is on the CPU, so that autograd needs no streams; Python and the ops' checks here see a device.
    """

    host: Tensor
    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, host: Tensor) -> "OnDevice":  # noqa: D102
        tensor: OnDevice = Tensor._make_wrapper_subclass(cls, host.size(), strides=host.stride(), dtype=host.dtype)
        tensor.host = host
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"{func} on the pretended device outside of `pretended_device()`")

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """As of any tensor; the core would not notice a copy to the CPU."""
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
        by_torch = sys._getframe(1).f_code.co_filename.startswith(_TORCH)  # which asked the core where the tensor is
        if device is None or device.type == DEVICE.type or by_torch:
            return super().to(dtype=dtype or self.dtype, memory_format=layout or torch.preserve_format)
        _Mode.leaving = True
        try:
            copied: Tensor = torch.ops.aten._to_copy(self, dtype=dtype, device=device, non_blocking=non_blocking)
        finally:
            _Mode.leaving = False
        return copied

    def cpu(self, memory_format: torch.memory_format = torch.preserve_format) -> Tensor:
        """As of any tensor."""
        return self.to("cpu")

    def tolist(self) -> Any:
        """As of any tensor."""
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """As of tensors on a device."""
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy; use Tensor.cpu() first")

    @property
    def data(self) -> Tensor:
        """As of any tensor; setting it moves the numbers too."""
        return Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, new: Tensor) -> None:
        assert isinstance(new, OnDevice)
        self.host = new.host
        Tensor.data.__set__(self, new)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Wait:
    """The host waits for the device.

    Attributes:
        why: The op, or the kind of copy.
        where: File and line, the innermost that is not torch's.
    """

    why: str
    where: str


@dataclass
class Record:
    """What happened on the device so far.

    Attributes:
        waits: In their order.
        unordered: Ops without a deterministic kernel, and where they were called.
        events: Recorded on the device's stream.
    """

    waits: list[Wait] = field(default_factory=list)
    unordered: set[Wait] = field(default_factory=set)
    events: int = 0


class _Generator(torch.Generator):
    """On the host in truth; where it was asked for is kept by its address, as ops see it without its class."""

    on_device: ClassVar[set[int]] = set()

    def __new__(cls, device: Any = "cpu") -> "_Generator":
        generator = super().__new__(cls, "cpu")  # type: ignore[call-arg]
        where = cls.on_device.add if torch.device(device).type == DEVICE.type else cls.on_device.discard
        where(generator._cdata)  # type: ignore[attr-defined]
        return generator


class _Autocast(torch.autocast):
    """The CPU's, since the core sees CPU tensors; its lists of ops are nearly CUDA's."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == DEVICE.type else device_type, *args, **kwargs)


class _Event:
    def __init__(self, record: Record) -> None:
        record.events += 1
        self.record, self.number = record, record.events

    def synchronize(self) -> None:
        if self.number == self.record.events:  # nothing was launched after it: the device stands still meanwhile
            self.record.waits.append(Wait("the newest event", _where()))


class _Stream:
    def __init__(self, record: Record) -> None:
        self.record = record

    def record_event(self) -> _Event:
        return _Event(self.record)


class _Calls(TorchFunctionMode):
    """Tells what Python asked of the CPU from what the core did so by itself, which knows no other device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        like = args[1] if func in (Tensor.to, Tensor.type_as) and len(args) > 1 else None
        if isinstance(like, OnDevice) and not isinstance(args[0], OnDevice):
            return args[0].to(DEVICE, like.dtype)  # the core would leave it where it is
        before = _Mode.inside
        _Mode.inside = any(isinstance(x, OnDevice) for x in _tensors((args, kwargs)))
        try:
            return func(*args, **(kwargs or {}))
        finally:
            _Mode.inside = before


class _Mode(TorchDispatchMode):
    leaving = False  # a copy to the CPU was asked for
    inside = False  # an op on tensors of the device is under way

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # it would be imported for that, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # comes in one piece in inference mode
                return func.decompose(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if name == "is_pinned":
            return _pinned(args[0])
        if name == "_pin_memory":
            return _pin(args[0].clone())
        tensors = _tensors((args, kwargs))
        on_device = [x for x in tensors if isinstance(x, OnDevice)]
        device, pin = kwargs.get("device"), kwargs.pop("pin_memory", False)
        to_device = bool(on_device) if device is None else device.type == DEVICE.type
        if device is not None:
            by_core = bool(on_device) or (self.inside and not tensors)
            to_device = to_device or (device.type == "cpu" and by_core and not self.leaving)
            kwargs["device"] = torch.device("cpu") if to_device else device
        if name in ("copy_", "_to_copy"):
            to_device = self._copies(name, args, kwargs, to_device)
        elif on_device:
            self._checks(func, name, args, kwargs, tensors)
        generator = kwargs.get("generator")
        if generator is not None and (generator._cdata in _Generator.on_device) != to_device:
            raise RuntimeError(f"{name}: a generator and a tensor on different devices")
        by_host = {id(x.host if isinstance(x, OnDevice) else x): x for x in tensors}
        plain_args, plain_kwargs = _map((args, kwargs), lambda x: x.host if isinstance(x, OnDevice) else x)
        out = func(*plain_args, **plain_kwargs)
        if pin:
            return _pin(out)
        return _map(out, lambda x: by_host[id(x)] if id(x) in by_host else OnDevice(x) if to_device else x)

    def _copies(self, name: str, args: Any, kwargs: Any, to_device: bool) -> bool:
        """Notes a copy that the host waits for; whether its result is on the device."""
        source = args[1] if name == "copy_" else args[0]
        to_device = isinstance(args[0], OnDevice) if name == "copy_" else to_device
        if to_device == isinstance(source, OnDevice):
            return to_device
        dtype = args[0].dtype if name == "copy_" else kwargs.get("dtype") or source.dtype
        free = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        host = source if to_device else args[0]
        # Only bytes as they are go from or to pinned memory; all else passes through ordinary memory.
        queued = free and _pinned(host) and dtype == source.dtype and source.is_contiguous()
        if not queued:
            self._wait("copy to the device" if to_device else "copy to the host")
        return to_device

    def _checks(self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[Tensor]) -> None:
        indices = [x for x in args[1] if x is not None] if name in ("index", "index_put", "index_put_") else []
        strangers = [x for x in tensors if not isinstance(x, OnDevice) and not any(x is i for i in indices)]
        scalars = torch.Tag.pointwise in func.tags or name in ("index_put", "index_put_", "where", "lerp_", "fill_")
        for stranger in strangers:
            if stranger.dim() or not scalars:
                raise RuntimeError(f"{name}: expected all tensors on one device, found {DEVICE} and {stranger.device}")
        if len(tensors) > len(strangers) and any(not isinstance(x, OnDevice) for x in indices):
            self._wait("copy of an index to the device")
        if func.namespace == "c10d" and not all(x.is_contiguous() for x in tensors):
            raise RuntimeError(f"{name}: NCCL takes contiguous tensors only")
        masks = any(x.dtype in (torch.bool, torch.uint8) for x in indices)
        fills = masks and name != "index" and args[2].numel() == 1  # becomes a masked fill
        if name in _WAITS or (masks and not fills) or (name == "repeat_interleave" and not kwargs.get("output_size")):
            self._wait("boolean index" if masks else name)
        weighted = name == "bincount" and len(args) > 1
        if name in _UNORDERED or weighted or (name == "cumsum" and args[0].is_floating_point()):
            self.record.unordered.add(Wait(name, _where()))

    def _wait(self, why: str) -> None:
        self.record.waits.append(Wait(why, _where()))


@contextmanager
def pretended_device() -> Iterator[Record]:
    """`DEVICE` works inside, as far as this module says; tensors of it mean nothing outside."""
    record = Record()
    lifts = torch._C._only_lift_cpu_tensors()
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    strict, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with (
        mock.patch.object(torch, "Generator", _Generator),
        mock.patch.object(torch, "autocast", _Autocast),
        mock.patch.object(torch.cuda, "current_stream", return_value=_Stream(record)),
        mock.patch.object(torch.cuda, "is_bf16_supported", return_value=True),
        mock.patch.object(torch.cuda, "_lazy_init"),
    ):
        try:
            torch._C._set_only_lift_cpu_tensors(True)  # or `torch.tensor(..., device=DEVICE)` wants a device
            torch.__future__.set_overwrite_module_params_on_conversion(True)
            with _Mode(record), _Calls():
                yield record
        finally:
            torch._C._set_only_lift_cpu_tensors(lifts)
            torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
            torch.use_deterministic_algorithms(strict, warn_only=warns)  # an engine sets it for the process


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with all tensors in it changed; torch's own such function takes most of the time of a small step."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (list, tuple):
        return type(value)(_map(x, change) for x in value)
    return {k: _map(x, change) for k, x in value.items()} if type(value) is dict else value


def _tensors(value: Any) -> list[Tensor]:
    tensors: list[Tensor] = []
    _map(value, lambda x: tensors.append(x) or x)  # type: ignore[func-returns-value]
    return tensors


def _pin(tensor: Tensor) -> Tensor:
    tensor.pinned_by_tests = True  # type: ignore[attr-defined]
    return tensor


def _pinned(tensor: Tensor) -> bool:
    return hasattr(tensor, "pinned_by_tests")


def _where() -> str:
    """The innermost line that is neither torch's nor this module's."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if (
            file != _HERE
            and not file.startswith((_TORCH, "<"))
            and "/lib/python" not in file.replace("site-packages", "")
        ):
            return f"{'/'.join(Path(file).parts[-2:])}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "the backward pass"
