"""What makes two runs equal, bit for bit.

On CPU a run is reproducible for a fixed number of threads, since sums are split by thread. On CUDA the deterministic
kernels are asked for, and torch warns where it has none. Of what the methods and networks here use, that is the
backward pass of max pooling (`basic_unet`) and of average pooling (`resenc`), whose windows do not overlap, so that
every voxel gets one addend and no order matters; and the value, not the gradient, of a map's cross entropy
(`supervised`). A test finds these on a pretended device; no run on CUDA has confirmed it.
"""

import os

import numpy as np
import torch


def apply(deterministic: bool) -> None:
    """Set torch's process-wide switches: deterministic kernels, or the fastest ones for fixed shapes."""
    if deterministic:
        # cuBLAS reads this when its handle is made; a user's own value stays.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    # Else torch fills every new tensor with NaN first, against programs that read what they never wrote: about a tenth
    # of a step on a CPU. Results are the same without.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic


def seed_step(seed: int, step: int, rank: int, micro: int) -> None:
    """Seed torch's global generators (dropout, drop path) as a function of where the run is.

    Seeding every step makes the generators part of the schedule: a resumed run needs no stored generator state, and a
    probe or a preview that draws in between changes nothing.
    """
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank, micro)).generate_state(1, np.uint64)[0]))
