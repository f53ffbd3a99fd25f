"""What every reader returns, and the choices a reader must be told."""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from storage.errors import RefusedInput

Array = npt.NDArray[Any]
Affine = npt.NDArray[np.float64]


class ReadPolicy(BaseModel):
    """What to do with inputs that are not one plain volume on a straight grid.

    The defaults correct what can be corrected without inventing data and refuse the rest.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    four_d: Literal["refuse", "first", "channels"] = Field(
        default="refuse", description="a 4-D series: refuse it, take its first volume, or take its volumes as channels"
    )
    tilt: Literal["correct", "refuse"] = Field(
        default="correct", description="a DICOM gantry tilt: resample onto a straight grid with a note, or refuse"
    )
    shear: Literal["refuse", "correct"] = Field(
        default="refuse",
        description="a sheared affine of another format: refuse, or resample onto a straight grid with a note",
    )
    gaps: Literal["refuse", "resample"] = Field(
        default="refuse",
        description="missing slices and uneven slice gaps: refuse, or interpolate onto even gaps with a note",
    )
    max_gap_mm: float = Field(default=10.0, gt=0, description="a slice gap above this is refused whatever `gaps` says")
    nonfinite: Literal["refuse", "lowest"] = Field(
        default="refuse",
        description="NaN and infinity among the values: refuse, or set to the lowest finite value with a note",
    )
    max_voxels: int = Field(
        default=400_000_000,
        ge=1,
        description="a larger volume is refused; bounds the memory of a task at about 26 bytes a voxel",
    )


@dataclass(slots=True)
class RawVolume:
    """A volume as it was found.

    Args:
        array_CDHW: (C, k, j, i): the file's own axes, slowest first, scale and offset applied.
        affine: 4x4, maps voxel-centre indices (i, j, k, 1) to RAS+ mm.
        modality: DICOM's two letters where the format says it ("CT", "MR", ...), else "".
        reader: Name and version of the reader.
        notes: What was corrected or chosen on the way.
        facts: Acquisition parameters that passed the allow-list.
        series: Volumes in the file, before `ReadPolicy.four_d` chose among them.
        scale, offset: By which stored numbers became the values of the array.
    """

    array_CDHW: Array
    affine: Affine
    reader: str
    modality: str = ""
    notes: list[str] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    series: int = 1
    scale: float = 1.0
    offset: float = 0.0

    @property
    def shape_CDHW(self) -> tuple[int, ...]:
        """Of the array."""
        return self.array_CDHW.shape


@dataclass(frozen=True, slots=True)
class VolumeHeader:
    """What is known of a volume before its voxels are read.

    Args:
        shape_CDHW: (C, k, j, i), after `ReadPolicy.four_d`: the shape of `RawVolume.array_CDHW`.
        affine: As of `RawVolume`.
        modality: As of `RawVolume`.
        notes: What was assumed or chosen.
    """

    shape_CDHW: tuple[int, ...]
    affine: Affine
    modality: str = ""
    notes: tuple[str, ...] = ()


def read_bytes(path: str, most: int | None = None) -> bytes:
    """The whole file or its first `most` bytes, or a refusal that names it."""
    try:
        with open(path, "rb") as file:
            return file.read() if most is None else file.read(most)
    except OSError as error:
        raise RefusedInput(path, expected="a readable file", found=error.strerror or type(error).__name__) from error


def check_size(thing: str, shape: tuple[int, ...], policy: ReadPolicy) -> None:
    """Refuse empty and oversized shapes before anything of their size is allocated."""
    voxels = 1
    for n in shape:
        voxels *= int(n)
    if voxels < 1 or min(shape, default=0) < 1:
        raise RefusedInput(thing, expected="at least one voxel along every axis", found=f"shape {shape}")
    if voxels > policy.max_voxels:
        raise RefusedInput(
            thing,
            expected=f"at most {policy.max_voxels:,} voxels",
            found=f"shape {shape}, {voxels:,} voxels",
            remedy="raise read.max_voxels where a task may use about 26 bytes a voxel",
        )


def pick_series(path: str, array_CDHW: Array, policy: ReadPolicy, notes: list[str]) -> Array:
    """Apply the policy for several volumes in one file."""
    return array_CDHW[: channels_of_series(path, array_CDHW.shape, policy, notes)]


def channels_of_series(path: str, shape_CDHW: tuple[int, ...], policy: ReadPolicy, notes: list[str]) -> int:
    """How many of the volumes in one file, counted by its first axis, the policy takes.

    Raises:
        RefusedInput: there are several, and the policy takes no series.
    """
    series = shape_CDHW[0]
    if series == 1:
        return 1
    if policy.four_d == "refuse":
        raise RefusedInput(
            path,
            expected="one volume",
            found=f"a series of {series}, each of shape {shape_CDHW[1:]}",
            remedy="set read.four_d to first (take the first volume) or channels (take all as channels)",
        )
    if policy.four_d == "first":
        notes.append(f"first of {series} volumes")
        return 1
    notes.append(series_note(series))
    return series


def series_note(series: int) -> str:
    """What the notes of a volume say whose channels are the volumes of a series."""
    return f"{series} volumes taken as channels"


def last_line(error: BaseException) -> str:
    """The last line of a library's message, without the path of its own sources."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if lines else type(error).__name__
    return text.rpartition("ERROR: ")[2][:200]
