"""Readers: a file or a series of files in, one `RawVolume` out, or a refusal that says why."""

from storage.ingest.readers.raw import RawVolume, ReadPolicy
from storage.ingest.readers.read import read_any, read_item, read_label

__all__ = ["RawVolume", "ReadPolicy", "read_any", "read_item", "read_label"]
