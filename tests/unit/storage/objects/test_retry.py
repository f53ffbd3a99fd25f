"""Retries: bounded by the deadline, jittered, and only for what may pass."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import ConfigError, NotFound, StoreError
from storage.objects.retry import OutOfTime, RetryPolicy, TransientError, repeat, retry


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


def _fail() -> None:
    raise KeyError("gone")


def test_a_repetition_asks_which_errors_pass_and_says_that_it_waits() -> None:
    clock, waits = Clock(), []
    policy = RetryPolicy(deadline_s=10, attempt_s=0)
    with pytest.raises(OutOfTime, match="failed attempts in 10.0 s, the last: 'gone'") as caught:
        repeat(
            _fail,
            policy,
            lambda error: isinstance(error, KeyError),
            lambda error, spent_s: waits.append((str(error), spent_s)),
            clock=lambda: clock.now,
            sleep=clock.sleep,
            uniform=lambda _low, high: high,
        )
    assert isinstance(caught.value.last, KeyError)
    assert [spent for _, spent in waits] == [0.0, *(sum(clock.waits[:n]) for n in range(1, len(clock.waits)))]
    assert clock.now == 10
    with pytest.raises(KeyError):
        repeat(_fail, policy, lambda _: False, sleep=lambda _: pytest.fail("no wait expected"))


def test_tries_end_what_no_deadline_ends() -> None:
    clock, policy = Clock(), RetryPolicy(deadline_s=math.inf, attempt_s=0, tries=3)
    with pytest.raises(OutOfTime) as caught:
        repeat(_fail, policy, lambda _: True, sleep=clock.sleep)
    assert caught.value.tries == 3
    assert len(clock.waits) == 2


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
