"""Pictures of a fine-tuning for MLflow: test cases as the registered segmenter sees them, scores of all trainings."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssl_core.downstream.comparison import Training
from ssl_core.downstream.finetune import TrainedSegmenter
from ssl_core.downstream.scores import CaseScore, CaseSlice, dice_by_volume
from storage.objects import ByteStore

# `jobs.pages` is imported in functions: it draws with matplotlib, which a job's start need not wait for.

EXAMPLES = "examples.png"
"""In the job's folder; written before the result of the training that it shows."""


def examples(
    trained: TrainedSegmenter, label: str, cases: Sequence[CaseScore], slices: Mapping[str, CaseSlice]
) -> bytes | None:
    """PNG of the worst, the middle and the best test case by mean Dice; None without test cases.

    Args:
        trained: The segmenter, its store open.
        label: Name of the label map.
        cases: Scores of the test cases.
        slices: Of each case the slice that is shown.
    """
    from jobs.pages.pictures import compared_slice, comparison_picture

    dice = dice_by_volume(cases)
    order = sorted(dice, key=lambda name: (dice[name], name))
    if not order:
        return None
    rows = []
    for name in dict.fromkeys((order[0], order[len(order) // 2], order[-1])):
        shown = slices[name]
        predictions = [(f"Dice {dice[name]:.2f}", shown.classes_HW)]
        rows.append(compared_slice(trained.store, label, name, shown.at, name, predictions))
    return comparison_picture(rows)


def log(api: Any, run_id: str, store: ByteStore, trainings: Sequence[Training]) -> None:
    """Send the pictures to the job's run.

    Args:
        api: MLflow's client.
        run_id: The run.
        store: The job's folder.
        trainings: All of them; of several draws of subjects their scores are not one picture.
    """
    from jobs.pages.report import dice_figure

    pictures = {EXAMPLES: store.get(EXAMPLES)} if store.exists(EXAMPLES) else {}
    if all(training.draw is None and training.cases for training in trainings):
        pictures["scores.png"] = dice_figure(trainings)
    with tempfile.TemporaryDirectory(prefix="tomoscale-pictures-") as folder:
        for name, content in pictures.items():
            path = Path(folder) / name
            path.write_bytes(content)
            api.log_artifact(run_id, str(path))
