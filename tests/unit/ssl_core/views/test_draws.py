import numpy as np
import pytest
import torch

from ssl_core.views.augment.draws import generators, philox, uniforms, words


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # known answers of the Random123 distribution, philox4x32 with 10 rounds
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, expected):
    assert tuple(int(w) for w in philox(np.array([counter], np.uint64), np.array([key], np.uint64))[0]) == expected


def test_draws_depend_on_seed_sample_and_purpose_only():
    samples = np.array([0, 1, 2**32, 2**40 + 5])
    whole = words(3, samples, ("a", 1), 9)
    assert whole.shape == (4, 9)
    assert np.array_equal(words(3, samples[2:], ("a", 1), 9), whole[2:])
    assert np.array_equal(words(3, samples, ("a", 1), 5), whole[:, :5])
    for other in (words(4, samples, ("a", 1), 9), words(3, samples, ("a", 2), 9), words(3, samples + 1, ("a", 1), 9)):
        assert not (other == whole).any()


def test_turns_of_several_samples_are_those_of_each_alone():
    samples, turns = np.array([4, 9, 9, 2**40]), np.array([1, 0, 1, 7])
    together = words(3, samples, ("a",), 9, turns)
    for row, sample, turn in zip(together, samples, turns, strict=True):
        assert np.array_equal(row, words(3, np.array([sample]), ("a", int(turn)), 9)[0])


def test_uniforms_are_uniform_and_open():
    u = uniforms(0, np.arange(2000), ("x",), 8)
    assert u.min() > 0
    assert u.max() < 1
    assert u.mean() == pytest.approx(0.5, abs=0.01)
    assert np.abs(np.corrcoef(u.T) - np.eye(8)).max() < 0.1
    assert np.histogram(u, 10, (0, 1))[0] == pytest.approx(1600, rel=0.1)


def test_generators_repeat():
    a, b = (generators(1, np.array([5, 6]), ("n",), torch.device("cpu")) for _ in range(2))
    assert torch.equal(torch.randn(4, generator=a[0]), torch.randn(4, generator=b[0]))
    assert not torch.equal(torch.randn(4, generator=a[0]), torch.randn(4, generator=a[1]))
