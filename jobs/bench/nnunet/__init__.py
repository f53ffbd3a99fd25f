"""A training of this project beside one of nnU-Net: same volumes, same minutes, same scores."""
