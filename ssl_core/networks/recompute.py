"""Activation checkpointing (Chen et al. 2016, sublinear memory): of stock networks' blocks, and of parts of a batch.

Only a block's input is kept; its inner activations are computed again when the backward pass needs them. Results are
those without it to the last bit wherever kernels are deterministic, since random state is put back for the second time.

A batch in parts is the same along the other axis: a network without batch norm sees each sample by itself, so its maps
are those of the whole batch, and at no time are there activations of more than one part. What is computed from the
maps, contrasts and norms of heads among it, still sees all samples together.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
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
        if has_batch_norm(block):
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


def in_parts(work: Callable[[list[Tensor]], list[Tensor]], inputs: list[Tensor], parts: int) -> list[Tensor]:
    """`work(inputs)`, a part of the batch after the other; each is computed again in the backward pass.

    Args:
        work: Maps tensors of B samples to tensors of B samples, each sample by itself.
        inputs: Tensors with B samples along axis 0.
        parts: How many, of sizes that differ by one at most; with 1 nothing is computed again.
    """
    parts = min(parts, len(inputs[0]))
    if parts == 1:
        return work(inputs)
    cuts = zip(*(x.tensor_split(parts) for x in inputs), strict=True)
    again = torch.is_grad_enabled()
    maps = [checkpoint(work, list(cut), use_reentrant=False) if again else work(list(cut)) for cut in cuts]
    return [torch.cat(pieces) for pieces in zip(*maps, strict=True)]


def has_batch_norm(module: nn.Module) -> bool:
    """Whether what a module makes of a sample depends on the other samples of the batch."""
    return any(isinstance(part, GlobalBatchNorm | nn.modules.batchnorm._BatchNorm) for part in module.modules())


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
