"""A bundle directory to a function from volumes to masks or features."""

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .card import FORMAT, check_bundle, read_json, with_article
from .errors import ConfigError, RefusedInput
from .geometry import Canonical, back_to_grid
from .grid import spacing_dhw
from .head.settings import read_head
from .inference.components import keep_largest
from .inference.mirror import mirrored
from .inference.settings import merged
from .inference.slabs import Slabs, Source
from .intake import Intake
from .network import build, feature_maps, load, logits
from .nifti import Nifti, read_nifti, write_nifti
from .preprocess import Preprocess
from .safetensors import read_safetensors
from .windows import slide_features, slide_slabs

__all__ = ["FORMAT", "Predictor", "check_bundle", "check_target"]


def _warn(note: str) -> None:
    warnings.warn(note, UserWarning, stacklevel=5)


class Predictor:
    """A model that takes raw volumes.

    Args:
        bundle: Directory written by `ssl_core.bundle.write_bundle`, or pulled from a registry.
        device: `cpu`, `cuda`, `cuda:1`; None takes the accelerator when there is one.
        report: Hears what was assumed of a header, what a scan is a little outside of, and what a bundle does not say;
            None warns (`UserWarning`).
        batch: Windows computed at once.
        mirror: Axes (`D`, `H`, `W`) along which windows are mirrored too, in place of those in the bundle.
        largest_component: Label values of which the largest component alone is left, in place of those in the bundle.

    Attributes:
        kind: One of `card.KINDS`.
        head: Of a classifier and a regressor, see `head.assess`; None of others.
        intake: What it lets in.
        plan: The preprocessing.
        card: The object of `bundle.json`.
        inference: What is done to the network's output.

    Raises:
        RefusedInput: a file is missing, does not match its digest, or names something unknown.
        ConfigError: no window at once, an axis that may not be mirrored, or a label that there is not.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        device: str | None = None,
        report: Callable[[str], None] | None = None,
        *,
        batch: int = 4,
        mirror: Sequence[str] | None = None,
        largest_component: Sequence[int] | None = None,
    ) -> None:
        root = Path(bundle)
        self.card = check_bundle(root)
        self.kind: str = self.card["kind"]
        self.plan = Preprocess.parse(str(root / "preprocess.json"), read_json(root / "preprocess.json"))
        self.architecture = read_json(root / "architecture.json")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        name = str(root / "weights.safetensors")
        network = build(str(root / "architecture.json"), self.architecture)
        self.head = read_head(root, self.kind, self.architecture["levels"])
        keys = None if self.kind == "segmenter" else self.architecture["encoder_keys"]
        load(name, network, read_safetensors(name), keys)
        self.network = network.to(self.device)
        self.dims = int(self.architecture["dims"])
        self._report = report or _warn
        self.intake = Intake(self.plan, self.card.get("name", "the model"), self._report)
        if batch < 1:
            raise ConfigError("batch", expected="windows computed at once, 1 or more", found=str(batch))
        self.batch = batch
        self.inference = merged(self.plan.inference, mirror, largest_component, self.plan.labels)

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        """Logits of a batch of windows, (B, K, D, H, W)."""
        return logits(self.network, self.dims, x_BCDHW)

    def predict(
        self,
        source: str | os.PathLike[str] | NDArray[Any],
        affine: NDArray[Any] | None = None,
        *,
        force: bool = False,
        modality: str = "",
    ) -> NDArray[Any]:
        """Mask of one volume, in the grid of the input.

        Args:
            source: A `.nii` or `.nii.gz` file, or an array (I, J, K) or (I, J, K, C) in file order.
            affine: (4, 4) of an array; voxel-centre indices to RAS+ mm.
            force: Predict what is far from all that the model learned from, with a note instead of a refusal.
            modality: `CT`, `MR`, ... where it is known.

        Returns:
            (I, J, K) of the label values in `preprocess.json`, uint8 where they fit, else int32.

        Raises:
            RefusedInput: the volume cannot be read, has another number of channels, or is far from what the model
                learned from.
            ConfigError: the bundle holds an encoder, or an array came without its affine.
        """
        return self._predict(*self.volume(source, affine), force, modality)[0]

    def predict_probabilities(
        self,
        source: str | os.PathLike[str] | NDArray[Any],
        affine: NDArray[Any] | None = None,
        *,
        force: bool = False,
        modality: str = "",
    ) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """Mask (I, J, K) and probabilities (I, J, K, classes) of one volume; see `predict` and `segmented`."""
        mask, maps = self._predict(*self.volume(source, affine), force, modality, probabilities=True)
        assert maps is not None
        return mask, maps

    def predict_file(
        self,
        source: str | os.PathLike[str],
        target: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        force: bool = False,
    ) -> NDArray[Any]:
        """Mask of a file, also written as NIfTI with the geometry fields of the input; returns the mask.

        Args:
            source: A `.nii` or `.nii.gz` file.
            target: File to write, whole or not at all.
            overwrite: Replace a file that is there; never the source.
            force: As for `predict`.

        Raises:
            ConfigError: see `check_target`.
            RefusedInput: as for `predict`.
        """
        check_target(source, target, overwrite=overwrite)
        image = read_nifti(source)
        self._report_header(source, image)
        mask, _ = self._predict(str(source), image.array, image.affine, force)
        check_target(source, target, overwrite=overwrite)  # again: minutes may have passed
        write_nifti(target, mask, image.affine, like=image)
        return mask

    def features(
        self,
        source: str | os.PathLike[str] | NDArray[Any],
        affine: NDArray[Any] | None = None,
        level: int = -1,
        *,
        force: bool = False,
        modality: str = "",
    ) -> NDArray[np.float32]:
        """Features of one volume on the canonical grid.

        Args:
            source: As for `predict`, like the others.
            level: Level of the pyramid, 0 the finest.

        Returns:
            (E, D/stride, H/stride, W/stride); feature k lies at voxels k * stride onwards of the canonical volume,
            after resampling to the nearest spacing that the model learned from (`Preprocess.target_spacing`).
        """
        name, array, matrix = self.volume(source, affine)
        volume = self.intake.canonical(name, array, matrix)
        prepared = self.intake.prepared(name, volume.values_CDHW, volume.affine, None, modality, force)
        entry = self.architecture["levels"][level]
        if not entry["module"]:
            raise ConfigError(
                f"level {level}",
                expected="a level that is the output of a module of the stock network",
                found="one that the project computes outside of it",
                remedy="load the encoder with `ssl_core.bundle.load_backbone`",
            )
        stride = (int(entry["stride"][0]), int(entry["stride"][1]), int(entry["stride"][2]))

        def one_level(x_BCDHW: Tensor) -> Tensor:
            return feature_maps(self.network, self.dims, [entry["module"]], x_BCDHW)[0]

        image, air, window = prepared.whole(), prepared.air_C, self.plan.patch_DHW
        return slide_features(one_level, image, air, window, stride_DHW=stride, device=self.device).numpy()

    def segment(
        self,
        values_CDHW: NDArray[Any] | Source | Slabs,
        affine: NDArray[np.float64],
        stats: Sequence[dict[str, float]] | None = None,
        *,
        name: str = "volume",
        modality: str = "",
        force: bool = False,
    ) -> NDArray[Any]:
        """Mask (D, H, W) of a canonical volume of values; what `predict` does between reading and re-orienting.

        Args:
            values_CDHW: Intensities after scale and offset, or what reads slabs of them; then no more than a window's
                depth is in memory where `stats` are recorded and the spacing is that of training.
            affine: (4, 4); gives the spacing.
            stats: Recorded foreground statistics of each channel, see `prepare`; None computes them.
            name: What messages call the volume.
            modality: `CT`, `MR`, ... where it is known.
            force: As for `predict`.
        """
        return self.segmented(values_CDHW, affine, stats, name=name, modality=modality, force=force)[0]

    def segmented(
        self,
        values_CDHW: NDArray[Any] | Source | Slabs,
        affine: NDArray[np.float64],
        stats: Sequence[dict[str, float]] | None = None,
        *,
        name: str = "volume",
        modality: str = "",
        force: bool = False,
        probabilities: bool = False,
        on_slab: Callable[[int, int], None] = lambda _done, _of: None,
    ) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
        """Mask of a canonical volume as of `segment`, and where they are asked for the probabilities of the classes.

        Args:
            values_CDHW: As for `segment`, like the others.
            probabilities: Whether to return them.
            on_slab: Hears how many slices along D are done, of how many.

        Returns:
            The mask (D, H, W), and (K, D, H, W) of a softmax in the order of the labels, or None. On a grid that was
            resampled both are those of the nearest voxel, so that the largest probability is always the mask's, but for
            components that were taken away.
        """
        if self.kind != "segmenter":
            raise ConfigError(
                "predict",
                expected="a segmenter bundle",
                found=f"{with_article(self.kind)} bundle",
                remedy="use `features`" if self.head is None else "use `head.assess.assess`",
            )
        prepared = self.intake.prepared(name, values_CDHW, affine, stats, modality, force)
        values = [value for value, _ in self.plan.labels]
        label_of = np.array(values, np.uint8 if max(values) < 256 else np.int32)
        mask = np.empty(prepared.shape_DHW, label_of.dtype)
        maps = np.empty((len(values), *prepared.shape_DHW), np.float32) if probabilities else None
        flips = self.inference.flips
        slabs = slide_slabs(
            mirrored(self.forward, flips),
            prepared.read,
            prepared.shape_DHW,
            prepared.air_C,
            self.plan.patch_DHW,
            device=self.device,
            batch=self.batch,
        )
        on_slab(0, len(mask))
        for start, scores_KDHW in slabs:
            if not torch.isfinite(scores_KDHW).all():  # the largest of numbers that are none would be the background
                raise RefusedInput(
                    name,
                    expected="finite output of the network",
                    found="NaN or infinity",
                    remedy="check the intensities of the volume, and the model on one that it learned from",
                )
            place = slice(start, start + scores_KDHW.shape[1])
            mask[place] = label_of[scores_KDHW.argmax(0).numpy()]
            if maps is not None:
                maps[:, place] = (scores_KDHW if flips else torch.softmax(scores_KDHW, 0)).numpy()
            on_slab(place.stop, len(mask))
        removed = keep_largest(mask, self.inference.largest_component)
        for value, count in removed.items():
            self._report(f"{name}: {count} voxels of {dict(self.plan.labels)[value]!r} beside its largest component")
        target_mm = self.plan.target_spacing(spacing_dhw(affine))
        if target_mm is not None:
            shape, original_mm = Slabs.of(values_CDHW).shape_CDHW[1:], spacing_dhw(affine)
            mask = back_to_grid(mask, target_mm, shape, original_mm)
            if maps is not None:
                maps = np.stack([back_to_grid(channel, target_mm, shape, original_mm) for channel in maps])
        return mask, maps

    def canonical(self, array: NDArray[Any], affine: NDArray[Any], *, name: str = "array") -> Canonical:
        """A scan as `segment` takes it, and how its mask goes back to its grid.

        Args:
            array: (I, J, K) or (I, J, K, C) in file order.
            affine: (4, 4); voxel-centre indices to RAS+ mm.
            name: What messages call it.

        Raises:
            RefusedInput: other channels, values beyond float32, or an affine that is no geometry.
        """
        return self.intake.canonical(name, array, affine)

    def check_values(self, name: str, source: Source) -> Slabs:
        """Slabs of a canonical volume, after one pass over its values.

        Raises:
            RefusedInput: values that are not finite, beyond float32, or not told apart in it.
        """
        slabs = Slabs.of(source)
        self.intake.check_values(name, slabs.ranges)
        return slabs

    def _predict(
        self,
        name: str,
        array: NDArray[Any],
        affine: NDArray[Any],
        force: bool,
        modality: str = "",
        probabilities: bool = False,
    ) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
        volume = self.intake.canonical(name, array, affine)
        mask_DHW, maps_KDHW = self.segmented(
            volume.values_CDHW,
            volume.affine,
            name=name,
            force=force,
            modality=modality,
            probabilities=probabilities,
        )
        if maps_KDHW is None:
            return volume.to_file(mask_DHW), None
        return volume.to_file(mask_DHW), np.stack([volume.to_file(channel) for channel in maps_KDHW], axis=-1)

    def _report_header(self, source: str | os.PathLike[str], image: Nifti) -> None:
        for note in image.notes:
            self._report(f"{source}: {note}")

    def volume(
        self, source: str | os.PathLike[str] | NDArray[Any], affine: NDArray[Any] | None
    ) -> tuple[str, NDArray[Any], NDArray[Any]]:
        """Name, array and affine of a source as `predict` takes it."""
        if isinstance(source, np.ndarray):
            if affine is None:
                expected = "its affine (voxel-centre indices to RAS+ mm)"
                raise ConfigError("array", expected=expected, found="none", remedy="give affine=")
            return "array", source, affine
        image: Nifti = read_nifti(source)
        self._report_header(source, image)
        return str(source), image.array, image.affine


def check_target(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    overwrite: bool,
    endings: tuple[str, ...] = (".nii", ".nii.gz"),
) -> None:
    """Refuse to write a mask where something would be lost.

    Args:
        source: The scan.
        target: Where its mask is to go.
        overwrite: Whether another file may be replaced.
        endings: Those that the target may have.

    Raises:
        ConfigError: another ending, the scan itself under whatever name, a folder, or a file
            or link that is there.
    """
    path = Path(target)
    if not path.name.endswith(endings):
        raise ConfigError(
            "output",
            expected=f"a name that ends in {' or '.join(endings)}",
            found=str(path),
            remedy="give a mask such a name",
        )
    if path.exists() and source and Path(source).exists() and path.samefile(source):
        raise ConfigError(
            str(path),
            expected="another file than the scan",
            found=f"the scan itself, {source}",
            remedy="give the mask a name of its own",
        )
    if path.is_dir():
        raise ConfigError(str(path), expected="a file to write", found="a folder", remedy="name a file in it")
    if os.path.lexists(path) and not overwrite:
        raise ConfigError(
            str(path),
            expected="a new file",
            found="a link" if path.is_symlink() else "a file that is there",
            remedy="give another name, or replace it with `--overwrite` (Python: overwrite=True)",
        )
