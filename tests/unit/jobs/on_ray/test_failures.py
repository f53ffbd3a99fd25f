"""Which errors end a trial at once."""

import pytest
from ray.exceptions import RayTaskError
from ray.tune.experiment.trial import Trial

from jobs.on_ray.patches import HANDLE_TASK_ERROR, patch_tune_to_stop_at_final_errors
from ssl_core.train.engine import NonFiniteError
from storage.errors import ConfigError, StoreError


@pytest.mark.parametrize(
    ("cause", "tries"),
    [
        (ConfigError("x"), 1),
        (ValueError("x"), 1),
        (NonFiniteError("step 3"), 1),
        (StoreError("s3"), 3),
        (RuntimeError("a peer has gone"), 3),
    ],
)
def test_a_trial_is_tried_again_only_where_that_can_help(
    cause: Exception, tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trial, "_handle_ray_task_error", HANDLE_TASK_ERROR.original())  # put back afterwards
    patch_tune_to_stop_at_final_errors()
    trial = Trial("train", stub=True, max_failures=2)
    found = 0
    while found == 0 or trial.should_recover():
        trial._handle_ray_task_error(RayTaskError("train", "the traceback", cause))
        found += 1
    assert found == tries
