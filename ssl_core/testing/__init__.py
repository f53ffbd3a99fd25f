"""Kits that methods, views and devices are tested with. Only tests and benchmarks enter."""
