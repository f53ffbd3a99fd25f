"""Models for other tools, and checkpoints of other tools for this one."""
