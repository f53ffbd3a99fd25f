"""Kits that other backends and streams are tested with. Only tests and benchmarks enter."""
