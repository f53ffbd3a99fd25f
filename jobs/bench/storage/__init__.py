"""Benchmarks of reading: ours and its peers in one run on the same data, voxels compared before anything is timed."""
