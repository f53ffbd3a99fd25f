"""A scan on its way into the network: its grid, its intensities, and the refusal of what the model cannot take."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import RefusedInput
from .geometry import Canonical, to_canonical
from .grid import spacing_dhw
from .inference.slabs import Range, Slabs, Source
from .intensity_stats import channel_foreground
from .preprocess import LEAST_SPREAD, Prepared, Preprocess, prepare
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
        values_CDHW: NDArray[Any] | Source | Slabs,
        affine: NDArray[np.float64],
        stats: Sequence[dict[str, float]] | None,
        modality: str,
        force: bool,
    ) -> Prepared:
        """The network's input, slab by slab, of a scan that is like those of training."""
        slabs = Slabs.of(values_CDHW)
        channels, *shape = slabs.shape_CDHW
        if channels != self.plan.channels:
            raise RefusedInput(
                name,
                expected=f"a volume of {self.plan.channels} channel(s)",
                found=str(channels),
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
            return self._told_apart(name, prepare(slabs, affine, self.plan, stats), force)
        refused, noted = training.check_geometry(shape, spacing_dhw(affine))
        if refused and not force:  # before the intensities of what may be no scan at all are measured
            raise refuse(name, refused)
        if stats is None:
            stats = channel_foreground(slabs.whole())[1]
        absolute = self.plan.intensity["kind"] in ("ct", "none")
        far, near = training.check_intensities(slabs.ranges, stats, modality, absolute)
        if far and not force:
            raise refuse(name, far)
        for note in (*refused, *far, *noted, *near):
            self._report(f"{name}: {note}")
        return self._told_apart(name, prepare(slabs, affine, self.plan, stats), force)

    def _told_apart(self, name: str, prepared: Prepared, force: bool) -> Prepared:
        """What `prepare` gave, where the network can see anything in it; one empty channel of several is noted."""
        empty = [str(c) for c, spread in enumerate(prepared.spread_C()) if spread < LEAST_SPREAD]
        if not empty:
            return prepared
        every = len(empty) == len(prepared.tables)
        reason = "after normalisation each voxel has one value" + ("" if every else f" in channel {', '.join(empty)}")
        if every and not force:
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
        if array.size == 0:
            raise RefusedInput(name, expected="voxels", found=f"shape {array.shape}", remedy="convert the file again")
        self.check_values(name, [Range(float(array.min()), float(array.max()))])
        if array.dtype.kind == "u" and array.dtype.itemsize == 8:  # which statistics cannot count in
            array = array.astype(np.float64)
        return to_canonical(name, array, affine)

    def check_values(self, name: str, values: Sequence[Range]) -> None:
        """Refuse values that networks cannot compute with.

        Args:
            name: What messages call the scan.
            values: Lowest and highest, of each channel or of all.

        Raises:
            RefusedInput: NaN, infinity, values beyond float32, or such as it does not tell apart.
        """
        if not all(channel.finite for channel in values):
            raise RefusedInput(
                name, expected="finite voxels", found="NaN or infinity", remedy="replace them before predicting"
            )
        low, high = min(channel.low for channel in values), max(channel.high for channel in values)
        largest = max(abs(low), abs(high))
        if largest > LARGEST:
            raise RefusedInput(
                name,
                expected=f"values that float32 can compute with, up to {LARGEST:g}",
                found=f"{largest:g}",
                remedy="replace outliers, or scale the volume down",
            )
        if 0 < high - low < LEVELS * float(np.finfo(np.float32).eps) * largest:
            raise RefusedInput(
                name,
                expected=f"values that float32, in which networks compute, tells apart in {LEVELS} steps",
                found=f"{low:g} to {high:g}, {high - low:g} apart",
                remedy="subtract the offset that all voxels share",
            )
