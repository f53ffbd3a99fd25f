"""Named bytes: one small interface over local files, memory, S3, HTTP and fsspec. Knows no voxel."""
