"""A program of nnU-Net by its entry point: `python program.py nnunetv2.run.run_training:run_training_entry WORDS`.

It runs in nnU-Net's environment and imports nothing of this project. To find a trainer, nnU-Net imports its
transformers, which import timm and so torchvision. torchvision's package on PyPI is built for CUDA's torch and does not
import beside the CPU's, for want of two operators. Nothing computes with them.
"""

import importlib
import sys

import torch


def declare_operators() -> None:
    """Make torchvision importable where its kernels are not those of this torch."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


if __name__ == "__main__":
    module, _, function = sys.argv.pop(1).partition(":")
    declare_operators()
    getattr(importlib.import_module(module), function)()
