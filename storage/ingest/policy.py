"""The choices of an ingest, and which of them change the stored voxels."""

import hashlib
import json
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from storage.ingest.readers.raw import ReadPolicy

VERSION = 1
"""Raised, from the first release on, when the same source and policy would give other voxels or facts than before."""

_OUTSIDE = {"split", "seed", "min_subjects", "max_failed", "subject_pattern", "subject_table", "label_maps"}


class IngestPolicy(BaseModel):
    """How volumes are brought into a store. Frozen, closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    spacing_mm: Literal["native"] | float | tuple[float, float, float] = Field(
        default="native", description="voxel size kept: native, one number for isotropic mm, or three along D, H, W"
    )
    image_interpolation: Literal["linear", "bspline"] = Field(default="linear", description="where the spacing changes")
    label_interpolation: Literal["nearest", "onehot"] = Field(
        default="nearest", description="where the spacing changes"
    )
    dtype: Literal["auto", "float32"] = Field(
        default="auto",
        description="auto: int16, exact or in steps that are fine enough, else float32; float32: as read",
    )
    modality: str = Field(
        default="", pattern=r"^[A-Z]{0,4}$", description="CT, MR, ...; what the format says when empty"
    )
    label_name: str = Field(
        default="label", pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", description="name of the label arrays"
    )
    label_affine: Literal["check", "ignore"] = Field(
        default="check",
        description="a label whose affine differs from its image's: refuse it, or trust the shape alone",
    )
    identifiers: Literal["auto", "hash", "keep"] = Field(
        default="auto",
        description="auto: DICOM patients, studies, series and paths as salted hashes, file names kept; hash: both",
    )
    subject_pattern: str | None = Field(default=None, description="regular expression that finds the subject in a path")
    subject_table: str | None = Field(
        default=None,
        description="CSV or participants.tsv that says whose a file or subject is (column person); absolute, or below "
        "the ingested folder",
    )
    label_maps: Literal["refuse", "keep"] = Field(
        default="refuse",
        description="an image of a few values in patches, as label maps are: refuse it, or publish it as an image",
    )
    crop_DHW: tuple[int, int, int] = Field(default=(96, 96, 96), description="usual crop; chunks are chosen for it")
    split: tuple[float, float, float] = Field(
        default=(0.7, 0.1, 0.2), description="shares of subjects: train, val, test"
    )
    seed: int = Field(default=0, ge=0, description="of the split")
    min_subjects: int = Field(default=2, ge=1, description="fewer are refused: they cannot be split")
    max_failed: float = Field(default=0.5, ge=0, le=1, description="a larger share of refused volumes fails the job")
    read: ReadPolicy = Field(default_factory=ReadPolicy, description="what to do with unusual inputs")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        sizes = self.spacing_mm if isinstance(self.spacing_mm, tuple) else (self.spacing_mm,)
        if any(not isinstance(s, str) and not 0.05 <= s <= 50 for s in sizes):
            raise ValueError(f"spacing_mm between 0.05 and 50 mm, not {self.spacing_mm}")
        if any(share < 0 for share in self.split) or abs(sum(self.split) - 1) > 1e-6:
            raise ValueError(f"split shares that sum to 1, not {self.split}")
        if any(edge < 1 for edge in self.crop_DHW):
            raise ValueError(f"crop edges of at least 1, not {self.crop_DHW}")
        return self

    @property
    def version(self) -> str:
        """Names everything that decides the stored voxels and facts; splits and thresholds are not part of it."""
        fields = json.dumps(self.model_dump(mode="json", exclude=_OUTSIDE), sort_keys=True)
        return f"{VERSION}-{hashlib.sha256(fields.encode()).hexdigest()[:12]}"

    def target_spacing(self, native: tuple[float, float, float]) -> tuple[float, float, float]:
        """The spacing a volume of `native` spacing is stored with, in mm along D, H, W."""
        if self.spacing_mm == "native":
            return native
        if isinstance(self.spacing_mm, tuple):
            return self.spacing_mm
        return (float(self.spacing_mm),) * 3
