"""nnU-Net in an environment of its own: a data set for it, its plan, a training, and masks of test cases."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from jobs.bench.nnunet.config import NnUnetConfig
from storage.errors import StackError
from storage.reading.slabs import StoredSlabs
from storage.reading.volume_store import VolumeStore

OUTSIDE = Path(__file__).parent / "outside"
DATASET, PLANS, CONFIGURATION, TRAINER = "Dataset900_Compared", "nnUNetPlans", "3d_fullres", "TimedTrainer"
_TRAIN = "nnunetv2.run.run_training:run_training_entry"
_PREDICT = "nnunetv2.inference.predict_from_raw_data:predict_entry_point"
_PLAN = "nnunetv2.experiment_planning.plan_and_preprocess_entrypoints:plan_and_preprocess_entry"
_LAST_CHARACTERS = 2000


@dataclass(frozen=True)
class NnUnet:
    """A released nnU-Net.

    Attributes:
        python: Interpreter of the environment that has it.
        folder: Holds its folders, which are made.
        say: Hears progress.
    """

    python: Path
    folder: Path
    say: Callable[[str], None]

    def run(self, program: str, *words: str, **variables: str) -> str:
        """What a program printed, by its entry point.

        Raises:
            StackError: it failed.
        """
        places = {f"nnUNet_{name}": str(self.folder / name) for name in ("raw", "preprocessed", "results")}
        own = {"nnUNet_extTrainer": str(OUTSIDE), "nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1"}
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        environment |= places | own | {"nnUNet_compile": "f"} | variables
        began = time.monotonic()
        done = subprocess.run(
            [self.python, str(OUTSIDE / "program.py"), program, *words],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.say(f"nnU-Net: {program.rpartition(':')[2]} in {time.monotonic() - began:.0f} s")
        if done.returncode != 0:
            raise StackError(
                f"nnU-Net's {program}",
                expected="exit code 0",
                found=f"{done.returncode}: {done.stdout[-_LAST_CHARACTERS:]}",
                remedy="see what it said; `make nnunet-test` tries the environment",
            )
        return done.stdout

    def write_cases(self, store: VolumeStore, train: Sequence[int], test: Sequence[int], label: str,
                    values: Mapping[int, int]) -> None:  # fmt: skip
        """Stored volumes as its raw data set.

        Args:
            store: Of the volumes.
            train: Manifest indices of those with labels to learn.
            test: Of those to predict.
            label: Name of the label map.
            values: Of each label value the one that nnU-Net is given, from 1 without gaps.
        """
        raw = self.folder / "raw" / DATASET
        for name in ("imagesTr", "labelsTr", "imagesTs"):
            (raw / name).mkdir(parents=True)
        for index in (*train, *test):
            record = store.manifest.record(index)
            affine = np.array(record.affine).reshape(4, 4)
            image_CDHW = StoredSlabs(store, record.volume_id, np.float32).read(0, record.shape_DHW[0])
            part = "Tr" if index in train else "Ts"
            for channel, values_DHW in enumerate(image_CDHW):
                _write(raw / f"images{part}" / f"{case(index)}_{channel:04d}.nii.gz", values_DHW, affine)
            if part == "Tr":
                truth_DHW = store.read_volume(record.volume_id, label=label)[0]
                mask_DHW = np.zeros_like(truth_DHW)
                for value, number in values.items():
                    mask_DHW[truth_DHW == value] = number
                _write(raw / "labelsTr" / f"{case(index)}.nii.gz", mask_DHW, affine)
        modality = store.manifest.record(train[0]).modality
        described = {
            "channel_names": {str(channel): modality for channel in range(image_CDHW.shape[0])},
            "labels": {"background": 0} | {f"label{value}": number for value, number in values.items()},
            "numTraining": len(train),
            "file_ending": ".nii.gz",
        }
        (raw / "dataset.json").write_text(json.dumps(described), encoding="utf-8")

    def plan(self, cut: NnUnetConfig) -> dict[str, Any]:
        """Plan and preprocess; returns the configuration that is trained, cut."""
        self.run(_PLAN, "-d", "900", "-c", CONFIGURATION, "-np", "1", "-npfp", "1")
        path = self.folder / "preprocessed" / DATASET / f"{PLANS}.json"
        plans = json.loads(path.read_text(encoding="utf-8"))
        chosen: dict[str, Any] = plans["configurations"][CONFIGURATION]
        if cut.patch_DHW is not None:
            chosen["patch_size"] = list(cut.patch_DHW)
        if cut.batch is not None:
            chosen["batch_size"] = cut.batch
        if cut.features is not None:
            network = chosen["architecture"]["arch_kwargs"]
            stages = len(cut.features)
            network |= {"n_stages": stages, "features_per_stage": list(cut.features)}
            for key in ("kernel_sizes", "strides", "n_conv_per_stage"):
                network[key] = network[key][:stages]
            network["n_conv_per_stage_decoder"] = network["n_conv_per_stage_decoder"][: stages - 1]
        path.write_text(json.dumps(plans), encoding="utf-8")
        return chosen

    def train(self, seconds: float) -> dict[str, float]:
        """Train on all cases for so long; returns how many steps were done and how long they took."""
        options = ("-p", PLANS, "-tr", TRAINER, "-device", "cpu")
        self.run(_TRAIN, "900", CONFIGURATION, "all", *options, TOMOSCALE_SECONDS=f"{seconds:.1f}")
        done: dict[str, float] = json.loads((self._model / "fold_all/timed.json").read_text(encoding="utf-8"))
        return done

    def predict(self) -> None:
        """Masks of the test cases, mirrored windows included as it does by itself."""
        options = ("-d", "900", "-c", CONFIGURATION, "-p", PLANS, "-tr", TRAINER, "-f", "all", "-device", "cpu")
        images = self.folder / "raw" / DATASET / "imagesTs"
        self.run(_PREDICT, "-i", str(images), "-o", str(self.folder / "masks"), *options, "-npp", "1", "-nps", "1")

    def mask(self, index: int, values: Mapping[int, int]) -> NDArray[np.int32]:
        """The mask of a case, (D, H, W) of the label values."""
        image: Any = nib.load(self.folder / "masks" / f"{case(index)}.nii.gz")
        written = np.asanyarray(image.dataobj).transpose(2, 1, 0)
        mask_DHW = np.zeros(written.shape, np.int32)
        for value, number in values.items():
            mask_DHW[written == number] = value
        return mask_DHW

    @property
    def _model(self) -> Path:
        return self.folder / "results" / DATASET / f"{TRAINER}__{PLANS}__{CONFIGURATION}"


def case(index: int) -> str:
    """Its name of a volume."""
    return f"case{index:05d}"


def _write(path: Path, values_DHW: NDArray[Any], affine: NDArray[np.float64]) -> None:
    nib.save(nib.Nifti1Image(values_DHW.transpose(2, 1, 0), affine), path)
