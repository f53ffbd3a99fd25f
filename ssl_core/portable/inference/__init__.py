"""What a prediction does around the network: slabs of a volume, mirrored windows, largest components."""
