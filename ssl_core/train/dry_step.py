"""One step of a method with shapes alone: what does not fit together is refused before a job starts.

Fake tensors have a shape and a type and no numbers, so that the largest network takes no memory and hardly any time.
What they cannot do at all is left to the job's first step: to refuse it here would refuse methods that work.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor
from torch._subclasses import fake_tensor

from ssl_core.config import flatten, resolved
from ssl_core.methods.base import MethodConfig, StepContext, method_class
from ssl_core.networks.pyramid import Pyramid
from ssl_core.networks.registry import architecture, outline
from ssl_core.views.types import RoleSpec, View, ViewBatch, ViewSpec
from storage.errors import ConfigError

_BEYOND_FAKES = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedOperatorException,
    fake_tensor.UnsupportedFakeTensorException,
)
_OF_FAKES = ("FakeTensor", "tensor subclasses", "meta tensor", "fake tensor")
"""Words of errors that are about fake tensors and would not come with real ones."""


class _Fakes(fake_tensor.FakeTensorMode):
    """A mode that copies of its tensors share, as those of a target network."""

    def __deepcopy__(self, _memo: dict[int, Any]) -> Self:
        return self


def check_step(
    method: str, settings: MethodConfig, backbone: str, arguments: Mapping[str, Any], *, samples: int
) -> None:
    """Build a network and a method as a worker does, and take a step forward and backward with shapes alone.

    Args:
        method: Registered name.
        settings: The method's.
        backbone: Registered name.
        arguments: The network's.
        samples: Of one pass of a worker.

    Raises:
        ConfigError: names the key, as far as it can be told, and what the network or the method says to it.
    """
    try:
        architecture(backbone)
    except ConfigError:
        return  # its package is not here; it may be where the job runs
    kind = method_class(method)
    spec: ViewSpec = kind.view_spec(settings)
    with _fakes() as mode:
        network = _network(backbone, arguments, mode)
        channels = int(arguments.get("in_channels", 1))
        _check_logits(network, backbone, channels)
        flat = flatten(resolved(settings)).items()
        keys = {str(role.size_DHW): [k for k, v in flat if v == list(role.size_DHW)] for role in spec.roles}
        with _named(f"method {method} on backbone {backbone}", "change `method` or `backbone.arguments`", keys):
            learner = kind(settings, network).train()
            terms = learner(_views(spec, samples, channels), StepContext(0, 1))
            terms.total.backward()


@contextlib.contextmanager
def _fakes() -> Iterator[_Fakes]:
    """In it, tensors are made without numbers, and nothing is drawn from the global generator."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), _Fakes() as mode:
        warnings.simplefilter("ignore")
        yield mode


@contextlib.contextmanager
def _named(thing: str, remedy: str, keys: Mapping[str, Sequence[str]] = MappingProxyType({})) -> Iterator[None]:
    """What fails inside as a ConfigError; what fails for want of numbers is passed over.

    Args:
        thing: What it is about.
        remedy: What can be done.
        keys: By the size that an error may be about, the method's settings that are this size.
    """
    try:
        yield
    except _BEYOND_FAKES:
        return
    except ConfigError as error:
        places = next((own for size, own in keys.items() if own and error.found.startswith(size)), ())
        place = " and ".join(f"method.{key}" for key in places) or thing
        raise ConfigError(
            f"{place}: {error.thing}", expected=error.expected, found=error.found, remedy=error.remedy or remedy
        ) from error
    except Exception as error:  # whatever a class of another package raises over values that do not fit
        text = " ".join(str(error).split())
        if any(word in text for word in _OF_FAKES):
            return
        raise ConfigError(
            thing, expected="settings that fit together", found=f"{type(error).__name__}: {text[:300]}", remedy=remedy
        ) from error


def _network(name: str, arguments: Mapping[str, Any], mode: _Fakes) -> Pyramid:
    """The network without numbers.

    Raises:
        ConfigError: names the arguments each of which alone, left out, would let it be built.
    """
    try:
        return outline(name, **arguments)
    except ConfigError as error:
        if isinstance(error.__cause__, _BEYOND_FAKES):  # a class that asks for a number while it is built
            with fake_tensor.unset_fake_temporarily():
                network = outline(name, **arguments)
            for module in network.modules():
                for tensors in (module._parameters, module._buffers):
                    tensors |= {key: mode.from_tensor(t) for key, t in tensors.items() if t is not None}
            return network
        keys = [key for key in arguments if _builds(name, {k: v for k, v in arguments.items() if k != key})]
        values = ", ".join(f"{key}={arguments[key]!r}" for key in keys or arguments)
        raise ConfigError(
            ", ".join(f"backbone.arguments.{key}" for key in keys) or "backbone.arguments",
            expected=f"what {name} takes: {' '.join(error.expected.split())[:300]}",
            found=values[:300],
            remedy="change it, or leave it out" if len(keys) == 1 else "change one of them, or leave it out",
        ) from error


def _builds(name: str, arguments: dict[str, Any]) -> bool:
    try:
        outline(name, **arguments)
    except ConfigError as error:
        return isinstance(error.__cause__, _BEYOND_FAKES)
    return True


def _check_logits(network: Pyramid, name: str, channels: int) -> None:
    size = tuple(2 * n for n in network.multiple_DHW())
    with _named("backbone.arguments", "its decoder does not come back to the size of the crop: see its strides"):
        logits = network.eval().logits(torch.zeros(1, channels, *size))
        if tuple(logits.shape[2:]) != size:
            raise ConfigError(
                f"output of {name}", expected=f"the size of its input, {size}", found=str(tuple(logits.shape[2:]))
            )
    network.train()


def _views(spec: ViewSpec, samples: int, channels: int) -> ViewBatch:
    index, rows = torch.zeros(samples, dtype=torch.int64), torch.ones(samples, 3, dtype=torch.float64)

    def view(role: RoleSpec) -> View:
        image: Tensor = torch.zeros(samples, channels, *role.size_DHW)
        return View(
            image_BCDHW=image,
            to_volume_B34=torch.zeros(samples, 3, 4, dtype=torch.float64),
            position_B3=rows,
            valid_B1DHW=torch.ones(samples, 1, *role.size_DHW),
            clean_BCDHW=torch.zeros_like(image) if role.keep_clean else None,
            maps={name: torch.zeros(samples, *role.size_DHW, dtype=torch.int64) for name in spec.maps},
        )

    roles = {role.name: tuple(view(role) for _ in range(role.count)) for role in spec.roles}
    return ViewBatch(roles, index, index.clone(), rows, rows.clone())
