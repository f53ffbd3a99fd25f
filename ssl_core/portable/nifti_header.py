"""The reader of NIfTI headers that ingest uses; in a bundle, `storage/nifti_header.py` itself stands here."""

from storage.nifti_header import DATATYPES, MOST_BYTES, NIFTI1, glimpse, parse_header, scaled

__all__ = ["DATATYPES", "MOST_BYTES", "NIFTI1", "glimpse", "parse_header", "scaled"]
