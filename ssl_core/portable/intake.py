"""A scan on its way into the network: its grid, its intensities, and the refusal of what the model cannot take."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import RefusedInput
from .geometry import Canonical, to_canonical
from .grid import spacing_dhw
from .intensity_stats import channel_foreground
from .preprocess import LEAST_SPREAD, Preprocess, prepare
from .training_data import refuse

LARGEST = 1e38
"""Of a voxel's value: float32, in which networks compute, holds the difference of two such."""
LEVELS = 256
"""Steps of float32 between the lowest and the highest voxel, at least; our choice."""


class Intake:
    """What a model lets in.

    Args:
        plan: Its preprocessing.
        model: What messages call it.
        report: Hears what a scan is a little outside of, and what the plan does not say.
    """

    def __init__(self, plan: Preprocess, model: str, report: Callable[[str], None]) -> None:
        self.plan, self.model, self._report = plan, model, report
        self._silent = plan.training is None

    def prepared(
        self,
        name: str,
        values_CDHW: NDArray[Any],
        affine: NDArray[np.float64],
        stats: Sequence[dict[str, float]] | None,
        modality: str,
        force: bool,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The network's input and its value of air, of a scan that is like those of training."""
        if values_CDHW.shape[0] != self.plan.channels:
            raise RefusedInput(
                name,
                expected=f"a volume of {self.plan.channels} channel(s)",
                found=str(values_CDHW.shape[0]),
                remedy="use a model of as many channels",
            )
        training = self.plan.training
        if training is None:
            if self._silent:
                self._silent = False
                self._report(
                    f"{self.model}: its bundle, written by an earlier version, does not say"
                    " which spacing, field of view, modality and intensities it learned from: scans are taken as they"
                    " are; train it again for a bundle that does"
                )
            return self._told_apart(name, prepare(values_CDHW, affine, self.plan, stats), force)
        refused, noted = training.check_geometry(values_CDHW.shape[1:], spacing_dhw(affine))
        if refused and not force:  # before the intensities of what may be no scan at all are measured
            raise refuse(name, refused)
        if stats is None:
            stats = channel_foreground(values_CDHW)[1]
        absolute = self.plan.intensity["kind"] in ("ct", "none")
        far, near = training.check_intensities(values_CDHW, stats, modality, absolute)
        if far and not force:
            raise refuse(name, far)
        for note in (*refused, *far, *noted, *near):
            self._report(f"{name}: {note}")
        return self._told_apart(name, prepare(values_CDHW, affine, self.plan, stats), force)

    def _told_apart(
        self, name: str, prepared: tuple[NDArray[np.float32], NDArray[np.float32]], force: bool
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """What `prepare` gave, where the network can see anything in it; one empty channel of several is noted."""
        empty = [str(c) for c, channel in enumerate(prepared[0]) if np.ptp(channel) < LEAST_SPREAD]
        if not empty:
            return prepared
        whole = len(empty) == len(prepared[0])
        reason = "after normalisation each voxel has one value" + ("" if whole else f" in channel {', '.join(empty)}")
        if whole and not force:
            raise refuse(name, [f"{reason}: an empty scan, a mask, or values outside the window of the model"])
        self._report(f"{name}: {reason}")
        return prepared

    def canonical(self, name: str, array: NDArray[Any], affine: NDArray[Any]) -> Canonical:
        """A scan in the canonical frame, after its shape and its values were found to be what networks compute with.

        Args:
            name: What messages call it.
            array: (I, J, K) or (I, J, K, C) in file order.
            affine: (4, 4); voxel-centre indices to RAS+ mm.

        Raises:
            RefusedInput: other channels, values beyond float32, or an affine that is no geometry.
        """
        channels = array.shape[3] if array.ndim == 4 else 1
        if array.ndim not in (3, 4) or channels != self.plan.channels:
            raise RefusedInput(
                name,
                expected=f"a volume of {self.plan.channels} channel(s), (I, J, K) or (I, J, K, C)",
                found=f"shape {array.shape}",
                remedy="give one volume of a series, or use a model of as many channels",
            )
        if not np.isfinite(array).all():
            raise RefusedInput(
                name, expected="finite voxels", found="NaN or infinity", remedy="replace them before predicting"
            )
        largest = max(abs(float(array.max())), abs(float(array.min()))) if array.size else 0.0
        if largest > LARGEST:
            raise RefusedInput(
                name,
                expected=f"values that float32 can compute with, up to {LARGEST:g}",
                found=f"{largest:g}",
                remedy="replace outliers, or scale the volume down",
            )
        span = float(array.max()) - float(array.min()) if array.size else 0.0
        if 0 < span < LEVELS * float(np.finfo(np.float32).eps) * largest:
            raise RefusedInput(
                name,
                expected=f"values that float32, in which networks compute, tells apart in {LEVELS} steps",
                found=f"{float(array.min()):g} to {float(array.max()):g}, {span:g} apart",
                remedy="subtract the offset that all voxels share",
            )
        if array.dtype.kind == "u" and array.dtype.itemsize == 8:  # which statistics cannot count in
            array = array.astype(np.float64)
        return to_canonical(name, array, affine)
