"""Bytes: object stores, the Zarr volume format, ingest, the manifest, crop reads, cache and verification.

Knows nothing of torch or Ray. Arrays are `(C, D, H, W)`: D inferior to superior, H posterior to anterior, W left to
right.
"""
