"""Tests of the local stack and of what runs on it, in one process so that there is one stack at a time."""
