"""Transforms of MONAI around the preprocessing of training; in a bundle of MONAI this file is `tomoscale_monai`."""

import json
import warnings
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config.type_definitions import KeysCollection
from monai.data.meta_tensor import MetaTensor
from monai.transforms.transform import MapTransform

from ssl_core.portable.geometry import back_to_grid, to_canonical
from ssl_core.portable.inference.components import keep_largest
from ssl_core.portable.intake import Intake
from ssl_core.portable.nifti import write_nifti
from ssl_core.portable.preprocess import Preprocess
from ssl_core.portable.windows import padded


class PrepareVolumed(MapTransform):
    """A volume as LoadImaged gives it, (C, I, J, K), to the network's input, (C, D, H, W) of at least one window.

    Args:
        keys: Of volumes.
        plan: Path of `preprocess.json`.
        force: Take what is far from all that the model learned from, with a warning instead of an error.
    """

    def __init__(self, keys: KeysCollection, plan: str, force: bool = False) -> None:
        super().__init__(keys)
        self.plan, self.force = _plan(plan), force
        self._intake = Intake(self.plan, plan, lambda note: warnings.warn(note, UserWarning, stacklevel=2))

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The input keeps the affine of the file, whose grid the mask will have; its own grid is another."""
        result = dict(data)
        for key in self.key_iterator(data):
            image = result[key]
            array = np.moveaxis(np.asarray(image), 0, -1)
            name, affine = str(image.meta.get("filename_or_obj", key)), np.asarray(image.affine, np.float64)
            volume = self._intake.canonical(name, array[..., 0] if array.shape[-1] == 1 else array, affine)
            prepared = self._intake.prepared(name, volume.values_CDHW, volume.affine, None, "", self.force)
            values, _ = padded(prepared.whole(), self.plan.patch_DHW, prepared.air_C)
            meta = {"filename_or_obj": name, "spatial_shape": np.array(array.shape[:3]), "original_affine": affine}
            result[key] = MetaTensor(torch.from_numpy(values), affine=torch.from_numpy(affine), meta=meta)
        return result


class FinishMaskd(MapTransform):
    """Logits (K, D, H, W) to the mask on the grid of the file, (1, I, J, K).

    Args:
        keys: Of logits.
        plan: Path of `preprocess.json`.
    """

    def __init__(self, keys: KeysCollection, plan: str) -> None:
        super().__init__(keys)
        self.plan = _plan(plan)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Each mask has the label values of `preprocess.json`."""
        result = dict(data)
        for key in self.key_iterator(data):
            logits_KDHW = result[key]
            affine = np.asarray(logits_KDHW.meta["original_affine"], np.float64)
            shape = tuple(int(n) for n in logits_KDHW.meta["spatial_shape"])
            volume = to_canonical(str(key), np.broadcast_to(np.uint8(0), shape), affine)  # for its axes
            old_mm, new_DHW = volume.spacing_mm, volume.values_CDHW.shape[1:]
            target_mm = self.plan.target_spacing(old_mm)
            grid = new_DHW
            if target_mm is not None:
                grid = tuple(
                    max(1, round(n / (new / old))) for n, old, new in zip(new_DHW, old_mm, target_mm, strict=True)
                )
            classes = np.asarray(logits_KDHW.argmax(0).cpu())
            start = [(m - n) // 2 for m, n in zip(classes.shape, grid, strict=True)]
            classes = classes[tuple(slice(s, s + n) for s, n in zip(start, grid, strict=True))]
            values = [value for value, _ in self.plan.labels]
            mask = np.array(values, np.uint8 if max(values) < 256 else np.int32)[classes]
            keep_largest(mask, self.plan.inference.largest_component)
            if target_mm is not None:
                mask = back_to_grid(mask, target_mm, new_DHW, old_mm)
            mask = volume.to_file(mask)
            meta = {"filename_or_obj": logits_KDHW.meta["filename_or_obj"], "original_affine": affine}
            result[key] = MetaTensor(torch.from_numpy(mask)[None], affine=torch.from_numpy(affine), meta=meta)
        return result


class SaveMaskd(MapTransform):
    """Masks of `FinishMaskd` to `NAME_mask.nii.gz`, each whole or not at all.

    Args:
        keys: Of masks.
        output_dir: Folder; made where there is none.
    """

    def __init__(self, keys: KeysCollection, output_dir: str) -> None:
        super().__init__(keys)
        self.folder = Path(output_dir)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The data, unchanged."""
        for key in self.key_iterator(dict(data)):
            mask = data[key]
            name = Path(str(mask.meta["filename_or_obj"])).name
            self.folder.mkdir(parents=True, exist_ok=True)
            target = self.folder / f"{name.removesuffix('.gz').removesuffix('.nii')}_mask.nii.gz"
            write_nifti(target, np.asarray(mask[0]), np.asarray(mask.meta["original_affine"], np.float64))
        return dict(data)


def _plan(path: str) -> Preprocess:
    return Preprocess.parse(path, json.loads(Path(path).read_text(encoding="utf-8")))
