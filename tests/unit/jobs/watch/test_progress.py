"""Progress in a log: written, read back, and how long the rest takes."""

import pytest

from jobs.output import duration
from jobs.watch.progress import Pace, Progress, progress_in


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (45.4, "45 s"), (700, "12 min"), (11100, "3 h 05 min"), (188000, "2 d 4 h"), (-3, "0 s")],
)
def test_a_duration_has_two_units_at_most(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_the_rest_is_told_from_the_speed_after_the_first_count() -> None:
    now = [0.0]
    pace = Pace(100, clock=lambda: now[0])
    now[0] = 50.0  # compiled, caches filled
    assert pace.at(1) == Progress(1, 100)
    now[0] = 60.0
    assert pace.at(11) == Progress(11, 100, "89 s")
    now[0] = 300.0  # a checkpoint was waited for
    assert pace.at(61).left == duration(250 / 60 * 39)
    assert pace.at(100) == Progress(100, 100)


def test_a_start_from_a_checkpoint_counts_its_own_steps() -> None:
    now = [0.0]
    pace = Pace(1000, clock=lambda: now[0])
    assert pace.at(900).left == ""
    now[0] = 10.0
    assert pace.at(910).left == "90 s"


_OF_A_CELL = "  pre-training a seed 0: step 200/550 (36.4 %, 5 min left)  loss 0.1"


@pytest.mark.parametrize(
    ("log", "progress"),
    [
        (
            "step 1/9 (11.1 %)  loss 1.0\nstep 4/9 (44.4 %, 3 h 05 min left)  loss 0.5\nsaved",
            Progress(4, 9, "3 h 05 min"),
        ),
        ("\x1b[36m(RayTrainWorker pid=7)\x1b[0m step 5/120 (4.2 %, 45 s left)  loss 1.0", Progress(5, 120, "45 s")),
        ("step 5/120  loss 1.0  of a release before", Progress(5, 120)),
        ("step 3/9 (33.3 %)  loss 1\nresumed at step 2\nstep 2/9 (22.2 %)  loss 1", Progress(2, 9)),
        ("ingest: 3/16 volumes, 5 s left, 1.2 MB/s", Progress(3, 16, "5 s")),
        ("ingest: 3/16 volumes, 3 h 05 min left, 1.2 MB/s", Progress(3, 16, "3 h 05 min")),
        ("lrc seed 1: test Dice 0.731, 12 s (3/8)", Progress(3, 8)),
        (f"search a: validation Dice 0.535, 37 s (43/70, about 34 min left)\n{_OF_A_CELL}", Progress(43, 70, "34 min")),
        (f"{_OF_A_CELL}\n\x1b[36m(perform pid=7)\x1b[0m {_OF_A_CELL}", None),
        (
            "pre-training a: loss 0.4, 9 s (5/9, 31 min left and more: how long test take is not known yet)",
            Progress(5, 9),
        ),
        ("network: 2 s (1/9; how long pretrain, test take is not known yet)", Progress(1, 9)),
        ("test a 1 label draw 0 seed 0: test Dice 0.545, 119 s (9/9)", Progress(9, 9)),
        ("used 12 of 16 volumes (split train)\nhttp://127.0.0.1:80/a/1/2", None),
        ("2026/11/29 05:00:00 INFO mlflow: something", None),
        ("", None),
    ],
)
def test_the_last_progress_of_a_log_is_read(log: str, progress: Progress | None) -> None:
    assert progress_in(log) == progress


def test_what_is_written_is_what_is_read() -> None:
    for progress in (Progress(1, 9), Progress(4, 9, "2 min"), Progress(9, 9), Progress(7, 2000, "2 d 4 h")):
        assert progress_in(f"step {progress}  loss 0.1") == progress
    assert str(Progress(4, 9, "2 min")) == "4/9 (44.4 %, 2 min left)"
    assert Progress(4, 9).to_json() == {"done": 4, "total": 9, "percent": 44.4, "left": None}
