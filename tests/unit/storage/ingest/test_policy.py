"""Settings of an ingest: finite, known, and part of the version where they change voxels."""

import pytest
from pydantic import ValidationError

from storage.ingest.policy import IngestPolicy
from storage.ingest.readers.raw import ReadPolicy


@pytest.mark.parametrize(
    "wrong",
    [{"spacing_mm": -1}, {"split": (0.5, 0.2, 0.2)}, {"crop_DHW": (0, 1, 1)}, {"spacing": 1}, {"read": {"gap": 1}}],
)
def test_wrong_settings_are_refused(wrong):
    from pydantic import ValidationError

    with pytest.raises(ValidationError):
        IngestPolicy.model_validate(wrong)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), "nan", "inf", "-inf", "NaN"])
def test_numbers_of_a_policy_are_finite_whether_given_as_numbers_or_as_text(number):
    for field in ({"spacing_mm": number}, {"spacing_mm": (1, number, 1)}, {"split": (number, 0, 1)}):
        with pytest.raises(ValidationError):
            IngestPolicy.model_validate(field)
    for field in ({"max_failed": number}, {"read": {"max_gap_mm": number}}, {"read": {"max_voxels": number}}):
        with pytest.raises(ValidationError):
            IngestPolicy.model_validate(field)


def test_policies_name_what_changes_voxels():
    assert IngestPolicy().version == IngestPolicy(seed=3, max_failed=0).version
    assert IngestPolicy().version != IngestPolicy(read=ReadPolicy(gaps="resample")).version
    assert IngestPolicy(spacing_mm=(3, 1, 2)).target_spacing((9, 9, 9)) == (3, 1, 2)
    assert IngestPolicy(spacing_mm=1.5).target_spacing((9, 9, 9)) == (1.5, 1.5, 1.5)
