"""nnU-Net as it is released, in an environment of its own: `make nnunet-test`."""
