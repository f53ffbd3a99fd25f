"""A trainer of nnU-Net that has so many seconds: all else is as nnU-Net does it.

nnU-Net finds it by `nnUNet_extTrainer`; it runs in nnU-Net's environment and imports nothing of this project.
"""

import json
import os
import time
from pathlib import Path

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class TimedTrainer(nnUNetTrainer):
    """Trains for `TOMOSCALE_SECONDS`; the learning rate falls by the same power law, over time in place of epochs."""

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.seconds = float(os.environ["TOMOSCALE_SECONDS"])
        self.num_iterations_per_epoch = 25

    def run_training(self) -> None:
        """Iterations until the time is over."""
        self.on_train_start()
        began, steps = time.monotonic(), 0
        while (elapsed := time.monotonic() - began) < self.seconds:
            rate = self.initial_lr * (1 - elapsed / self.seconds) ** 0.9
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.network.train()
            for _ in range(self.num_iterations_per_epoch):
                loss = self.train_step(next(self.dataloader_train))["loss"]
                steps += 1
            self.print_to_log_file(f"{elapsed:.0f} of {self.seconds:.0f} s, {steps} iterations, loss {loss:.4f}")
        done = {"steps": steps, "seconds": time.monotonic() - began}
        self.on_train_end()  # writes the checkpoint, ends the processes that load data
        (Path(self.output_folder) / "timed.json").write_text(json.dumps(done), encoding="utf-8")

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Test cases are predicted afterwards, like those of the other side."""
