"""What a user submits: ingest, pre-training, fine-tuning, search, evaluation, prediction.

Also tracking with MLflow and the command line.
"""

import os

# Ray drops lines that differ in their numbers only, which is what progress looks like; read when ray is imported.
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # escape codes about each worker's name; a job's log is a file
# MLflow sets its loggers to what this says when it is imported, whatever `jobs.driver.quiet` said before.
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
