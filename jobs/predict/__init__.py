"""Prediction: of scans in this process, and of a whole folder on a cluster."""
