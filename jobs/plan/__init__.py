"""What a pre-training job would cost, measured on a few of its steps before it is submitted."""
