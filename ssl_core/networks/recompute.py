"""Activation checkpointing of the stock networks' blocks (Chen et al. 2016, sublinear memory).

Only a block's input is kept; its inner activations are computed again when the backward pass needs them. Results are
those without it to the last bit wherever kernels are deterministic, since random state is put back for the second time.
"""

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ssl_core.networks.batch_norm import GlobalBatchNorm
from storage.errors import ConfigError

BLOCKS = frozenset({
    "TwoConv", "ResidualUnit", "UnetBasicBlock", "UnetResBlock", "ResBlock", "SwinTransformerBlock",  # MONAI
    "StackedConvBlocks", "BasicBlockD", "BottleneckD",  # dynamic-network-architectures
})  # fmt: skip
"""Classes of the stock networks that hold two and more layers and see no skip."""


class _Recomputed:
    """A block's `forward`. Holds the block rather than its method, so that a copy of the block calls the copy."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        forward = type(self.block).forward
        if not torch.is_grad_enabled():
            return forward(self.block, *inputs, **keywords)
        return checkpoint(forward, self.block, *inputs, use_reentrant=False, **keywords)


def enable(module: nn.Module) -> int:
    """Checkpoint every outermost block of `module` that trains; returns how many.

    Raises:
        ConfigError: there is none, or one holds batch norm, whose running statistics would count every batch twice.
    """
    blocks = _blocks(module)
    for block in blocks:
        if any(isinstance(part, GlobalBatchNorm | nn.modules.batchnorm._BatchNorm) for part in block.modules()):
            raise ConfigError(
                "activation_checkpointing",
                expected="blocks without batch norm",
                found=f"batch norm in {type(block).__name__}",
                remedy="use instance or group norm, or switch it off",
            )
        block.forward = _Recomputed(block)
    if not blocks:
        raise ConfigError(
            "activation_checkpointing", expected="a network with blocks of " + ", ".join(sorted(BLOCKS)), found="none"
        )
    return len(blocks)


def _blocks(module: nn.Module) -> list[nn.Module]:
    blocks: dict[int, nn.Module] = {}

    def walk(part: nn.Module) -> None:
        if type(part).__name__ in BLOCKS:
            if any(parameter.requires_grad for parameter in part.parameters()):
                blocks[id(part)] = part  # a stock decoder may register its encoder a second time
            return
        for child in part.children():
            walk(child)

    walk(module)
    return list(blocks.values())
