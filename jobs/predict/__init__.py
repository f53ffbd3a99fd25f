"""Prediction of a whole folder on a cluster."""
