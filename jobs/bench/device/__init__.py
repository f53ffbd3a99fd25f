"""Benchmarks of what runs on the training device."""
