"""Benchmarks of what methods learn, on volumes whose structure is known."""
