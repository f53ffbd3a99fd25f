"""Prediction with a bundle and nothing else: numpy, torch, monai, scipy and the standard library.

This package is copied into every bundle (as `tomoscale_portable`) and is what `tomoscale predict` runs, so that a
model pulled into an environment without this project gives the same mask, voxel for voxel. Its modules import one
another relatively, and nothing else of the project except the four leaf files of `storage` that are copied beside
them (`errors.py`, `intensity_stats.py`, `nifti_header.py`, and `geometry.py` as `grid.py`).

Arrays given by callers are in file order `(I, J, K)` with a NIfTI affine (voxel-centre indices to RAS+ mm), as
nibabel reads them; inside, volumes are canonical `(C, D, H, W)`, D inferior to superior, H posterior to anterior,
W left to right.
"""

from .predictor import Predictor

__all__ = ["Predictor"]
