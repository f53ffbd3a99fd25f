"""Optimizers whose state is kept by parameter name."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from storage.errors import ConfigError


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
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        kind: Literal["adamw", "sgd"],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        momentum: float = 0.9,
        fused: bool = True,
    ) -> None:
        kernels = {n: p for n, p in parameters.items() if p.dim() > 1 and "bias" not in n.rpartition(".")[2]}
        others = {n: p for n, p in parameters.items() if n not in kernels}
        # The optimizer numbers its parameters by group; here they are named.
        self._named = kernels | others
        groups = [
            {"params": list(kernels.values()), "decays": True},
            {"params": list(others.values()), "decays": False},
        ]
        groups = [group for group in groups if group["params"]]
        self._optimizer: torch.optim.Optimizer
        if kind == "sgd":
            self._optimizer = torch.optim.SGD(groups, lr=0.0, momentum=momentum, fused=fused)
        else:
            self._optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=fused)

    def step(self, lr: float, weight_decay: float) -> None:
        """Apply the gradients once."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = weight_decay if group["decays"] else 0.0
        self._optimizer.step()

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
            if state
        }
        self._optimizer.load_state_dict(packed)


def _placed(value: Any, parameter: nn.Parameter) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.shape == parameter.shape:
        # In the parameter's memory order, which a file does not keep.
        return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
    return value.clone()
