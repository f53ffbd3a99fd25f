"""Benchmarks of whole jobs; those of reads, streams and steps are in `storage.bench` and `ssl_core.bench`."""
