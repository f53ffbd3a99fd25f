"""What a user submits: ingest, pre-training, fine-tuning, search, evaluation, prediction.

Also tracking with MLflow and the command line.
"""
