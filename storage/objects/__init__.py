"""Named bytes: one small interface over local files, memory, S3, HTTP and fsspec. Knows no voxel."""

from storage.objects.open import open_store
from storage.objects.protocol import ByteStore, join

__all__ = ["ByteStore", "join", "open_store"]
