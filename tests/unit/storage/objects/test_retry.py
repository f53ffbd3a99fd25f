"""Retries: bounded by the deadline, jittered, and only for what may pass."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import ConfigError, NotFound, StoreError
from storage.objects.retry import RetryPolicy, TransientError, retry


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.waits: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds


def test_returns_after_transient_failures() -> None:
    clock, left = Clock(), [TransientError("503"), TransientError("reset")]

    def attempt() -> str:
        if left:
            raise left.pop()
        return "bytes"

    assert retry(attempt, RetryPolicy(), "k", clock=lambda: clock.now, sleep=clock.sleep) == "bytes"
    assert len(clock.waits) == 2


def test_other_errors_pass_at_once() -> None:
    def attempt() -> None:
        raise NotFound("k")

    with pytest.raises(NotFound):
        retry(attempt, RetryPolicy(), "k", sleep=lambda _: pytest.fail("no wait expected"))


@settings(deadline=None)
@given(
    deadline=st.floats(0.5, 300),
    share=st.floats(0.05, 1),
    slow=st.floats(0, 1),
    luck=st.floats(0, 1),
)
def test_the_deadline_is_never_passed(deadline: float, share: float, slow: float, luck: float) -> None:
    policy, clock = RetryPolicy(deadline_s=deadline, attempt_s=deadline * share), Clock()

    def attempt() -> None:
        clock.now += max(0.01, policy.attempt_s * slow)
        raise TransientError("timed out")

    with pytest.raises(StoreError, match="the-key.*timed out"):
        retry(
            attempt,
            policy,
            "the-key",
            clock=lambda: clock.now,
            sleep=clock.sleep,
            uniform=lambda low, high: low + luck * (high - low),
        )
    assert clock.now <= deadline + 0.011
    for n, wait in enumerate(clock.waits):
        assert 0 <= wait <= min(policy.cap_s, policy.first_s * 2.0 ** min(n, 60)) + 1e-9


def test_the_environment_sets_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOMOSCALE_STORE_DEADLINE_S", "6")
    policy = RetryPolicy.from_environment()
    assert (policy.deadline_s, policy.attempt_s) == (6.0, 2.0)
    for seconds, attempt in ((90, 30), (120, 30), (600, 150)):
        monkeypatch.setenv("TOMOSCALE_STORE_DEADLINE_S", str(seconds))
        assert RetryPolicy.from_environment().attempt_s == attempt
    for text in ("soon", "-1", "inf", "nan"):
        monkeypatch.setenv("TOMOSCALE_STORE_DEADLINE_S", text)
        with pytest.raises(ConfigError, match="TOMOSCALE_STORE_DEADLINE_S"):
            RetryPolicy.from_environment()


def test_an_attempt_longer_than_the_deadline_is_refused() -> None:
    with pytest.raises(ConfigError, match="attempt_s"):
        RetryPolicy(deadline_s=1, attempt_s=2)
