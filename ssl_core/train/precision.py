"""In which floating type a device trains."""

import torch


def resolve_precision(setting: str, device: torch.device) -> str:
    """`fp32`, `bf16` or `fp64`: what `auto` means on a device."""
    if setting != "auto":
        return setting
    # bf16 has the exponents of fp32, so there is no loss scaling and no scaler to keep.
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
