"""Fine-tuning as a Ray job: `python -m jobs.finetune CONFIG [key=value ...]`."""

from jobs.finetune.driver import compared as compared
from jobs.finetune.driver import main as main
from jobs.finetune.training import device_for as device_for
from jobs.finetune.training import score_test as score_test
from jobs.finetune.training import train_from as train_from
