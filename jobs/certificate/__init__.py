"""The certificate of a pre-training: what it was and what came of each step, signed; and captures of bad steps."""
