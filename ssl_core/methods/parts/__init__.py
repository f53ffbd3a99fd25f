"""What methods share that is neither a loss nor a network."""
