"""Volumes that come with the project: a simulated cohort, and the hippocampus data set that it fetches."""
