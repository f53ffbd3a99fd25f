"""What a pre-training job or a study would cost, measured on a few of its steps before it is submitted."""
