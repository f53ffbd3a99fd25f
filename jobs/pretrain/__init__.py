"""Pre-training: the driver of its Ray job, what each worker runs, and the loop of one rank, which needs no Ray."""
