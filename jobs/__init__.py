"""What a user submits: ingest, pre-training, fine-tuning, search, evaluation, prediction; tracking and the command line."""
