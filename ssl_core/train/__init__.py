"""The training loop: engine, gradients, optimizers, schedules, determinism, checkpoints."""
