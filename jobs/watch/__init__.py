"""How far a job is and why it ended: written into its log by who works, read from there by who asks."""
