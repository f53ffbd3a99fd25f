"""Optimizers whose state is kept by parameter name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssl_core.train.sharding import placed
from storage.errors import ConfigError


@dataclass(frozen=True)
class Rates:
    """Learning rates that differ between parameters.

    Attributes:
        group_of: Group of each trainable parameter, by the parameter's name.
        at: What the learning rate of each group is multiplied by at a step, counted from 0. At 0 its parameters, their
            moments and their step counts are left alone, so that a group that joins later begins as a new one does.
    """

    group_of: Mapping[str, str]
    at: Callable[[int], Mapping[str, float]]


class NamedOptimizer:
    """AdamW or SGD, fused by default, with decay for kernels only.

    Decay pulls biases and the scales of norms to zero for no gain, so only parameters of two and more axes have it, and
    of these none that is called a bias, such as the table of position biases of windowed attention.

    Args:
        named: Trainable parameters.
        kind: `adamw`, or `sgd` with momentum.
        betas: AdamW's decay rates of the two moments.
        momentum: SGD's.
        fused: One kernel for all parameters; plain loops over them otherwise, to compare with.
        rates: Where they are not one rate for all.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        kind: Literal["adamw", "sgd"],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        momentum: float = 0.9,
        fused: bool = True,
        rates: Rates | None = None,
    ) -> None:
        kernels = {n: p for n, p in parameters.items() if p.dim() > 1 and "bias" not in n.rpartition(".")[2]}
        others = {n: p for n, p in parameters.items() if n not in kernels}
        self._rates = rates
        self._group_of = dict.fromkeys(parameters, "") if rates is None else {n: rates.group_of[n] for n in parameters}
        # The optimizer numbers its parameters by group; here they are named.
        self._named: dict[str, nn.Parameter] = {}
        groups = []
        for rate in dict.fromkeys(self._group_of.values()):
            for part, decays in ((kernels, True), (others, False)):
                own = {n: p for n, p in part.items() if self._group_of[n] == rate}
                self._named |= own
                groups.append({"params": list(own.values()), "decays": decays, "rate": rate})
        groups = [group for group in groups if group["params"]]
        self._optimizer: torch.optim.Optimizer
        if kind == "sgd":
            self._optimizer = torch.optim.SGD(groups, lr=0.0, momentum=momentum, fused=fused)
        else:
            self._optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=fused)

    def step(self, lr: float, weight_decay: float, step: int = 0) -> None:
        """Apply the gradients once, at a step that says the rates of the groups."""
        scales = None if self._rates is None else self._rates.at(step)
        waiting: list[tuple[nn.Parameter, Tensor | None]] = []
        for group in self._optimizer.param_groups:
            group["lr"] = lr if scales is None else lr * scales[group["rate"]]
            group["weight_decay"] = weight_decay if group["decays"] else 0.0
            if scales is not None and not scales[group["rate"]]:
                waiting += [(p, p.grad) for p in group["params"]]
        for parameter, _ in waiting:
            parameter.grad = None  # torch passes over it, its moments and its count
        self._optimizer.step()
        for parameter, grad in waiting:
            parameter.grad = grad

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """By parameter name; live tensors. Empty before the first step."""
        names = list(self._named)
        return {names[i]: dict(entry) for i, entry in sorted(self._optimizer.state_dict()["state"].items())}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Copies of the tensors of `state`.

        Raises:
            ConfigError: the state is of other parameters; names one.
        """
        odd = sorted(set(state) ^ set(self._named)) if state else []
        if self._rates is not None:  # a group that has not joined yet has no state, whole
            joined = {self._group_of.get(name) for name in state}
            odd = [name for name in odd if name in state or self._group_of[name] in joined]
        if odd:
            raise ConfigError(
                f"checkpoint's optimizer state of {odd[0]!r}",
                expected="state of this run's parameters" if odd[0] in state else "to be there",
                found="one of another method or network" if odd[0] in state else "none",
                remedy="resume with the method and network that wrote it",
            )
        packed = self._optimizer.state_dict()
        packed["state"] = {
            i: {key: _placed(value, parameter) for key, value in state[name].items()}
            for i, (name, parameter) in enumerate(self._named.items())
            if name in state
        }
        self._optimizer.load_state_dict(packed)


def _placed(value: Any, parameter: nn.Parameter) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.shape == parameter.shape:
        # In the parameter's memory order, which a file does not keep.
        return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(placed(value, parameter))
    return value.clone()
