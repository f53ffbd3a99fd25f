"""A trainer of nnU-Net for the test: four iterations, and the weights that it begins with in a file.

nnU-Net finds it by `nnUNet_extTrainer`; it runs in nnU-Net's environment and imports nothing of this project.
"""

from pathlib import Path

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

BEGINNING = "beginning.pth"


class ShortTrainer(nnUNetTrainer):
    """One epoch of four iterations."""

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 4, 1

    def on_train_start(self) -> None:
        """Weights were loaded before."""
        super().on_train_start()
        torch.save(self.network.state_dict(), Path(self.output_folder) / BEGINNING)
