import itertools
import math

import pytest

from ssl_core.train.schedule import cosine, warmup_cosine


def test_warmup_is_linear_and_wastes_no_step() -> None:
    rates = [warmup_cosine(s, steps=20, warmup=4, peak=0.8, final=0.1) for s in range(4)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8])


def test_after_warmup_closed_form() -> None:
    for s in range(4, 20):
        expected = 0.1 + 0.7 * (1 + math.cos(math.pi * (s - 4) / 15)) / 2
        assert warmup_cosine(s, steps=20, warmup=4, peak=0.8, final=0.1) == pytest.approx(expected, rel=1e-14)


def test_ends_and_middle_are_exact() -> None:
    assert warmup_cosine(0, steps=11, warmup=0, peak=2.0, final=1.0) == 2.0
    assert warmup_cosine(10, steps=11, warmup=0, peak=2.0, final=1.0) == 1.0
    assert warmup_cosine(5, steps=11, warmup=0, peak=2.0, final=1.0) == pytest.approx(1.5)


def test_outside_the_run_is_constant() -> None:
    assert cosine(-3, steps=5, start=1.0, end=0.0) == 1.0
    assert cosine(99, steps=5, start=1.0, end=0.25) == 0.25


@pytest.mark.parametrize("steps", [1, 2])
def test_shortest_runs(steps: int) -> None:
    assert warmup_cosine(0, steps=steps, warmup=0, peak=1.0, final=0.0) == 1.0


def test_never_rises_after_warmup() -> None:
    rates = [cosine(s, steps=100, start=1.0, end=0.0) for s in range(100)]
    assert all(a >= b for a, b in itertools.pairwise(rates))
