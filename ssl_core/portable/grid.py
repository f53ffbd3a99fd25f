"""The geometry that ingest uses; in a bundle, `storage/geometry.py` itself stands here."""

from storage.geometry import canonicalise, check_affine, nearest_axes, resample, shear, spacing_dhw

__all__ = ["canonicalise", "check_affine", "nearest_axes", "resample", "shear", "spacing_dhw"]
