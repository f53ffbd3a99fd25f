"""Steps of a pre-training done again: to check its certificate, or to look at a capture."""
