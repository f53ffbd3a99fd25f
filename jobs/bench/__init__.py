"""Benchmarks, of storage, of the training device, of learning and of Ray. Only the command line and tests enter."""
