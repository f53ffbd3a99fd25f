"""The chain of a run: a function of what was done, and of nothing else; each change of it is named."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_core.train.chain import ROW, Chain, Difference, first_difference, weights_digest
from ssl_core.train.spikes import WINDOW, Spikes

FACTS = {"world": 1, "code": "c"}


def chain(steps: int, every: int = 3, starts: tuple[int, ...] = (), **change: Any) -> Chain:
    """A chain of `steps`; `change` gives the samples, loss or norm of a step another value."""
    result = Chain({"configuration": "a", "manifest": "b"}, every)
    go_on(result, steps, steps, starts, **change)
    return result


def go_on(result: Chain, steps: int, last: int, starts: tuple[int, ...] = (), **change: Any) -> None:
    result.start(FACTS)
    for step in range(result.steps + 1, steps + 1):
        if step - 1 in starts:
            result.start({**FACTS, "world": step})
        result.sampled(step, f"{change.get('samples', step) if step == change.get('at') else step:064x}")
        loss = change.get("loss", 0.5) if step == change.get("at") else 0.5
        result.stepped(step, loss / step, 1.0)
        if result.is_due(step, last):
            result.weights[step] = f"{change.get('weights', step) if step == change.get('at') else step:064x}"


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 12), st.data())
def test_a_chain_that_goes_on_has_the_head_of_the_undisturbed_one(steps: int, data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.integers(0, steps), max_size=4).map(sorted))
    whole, parts = chain(steps), chain(0)
    for cut in [*cuts, steps]:
        state = parts.state()
        facts = json.loads(json.dumps({key: value for key, value in state.items() if key != "rows"}))
        parts = Chain.from_state({**facts, "rows": state["rows"]})
        assert parts.head() == facts["head"]
        go_on(parts, cut, steps)
    assert parts.head() == whole.head()
    assert len(parts.rows) == ROW * steps


def test_a_step_that_is_left_out_or_comes_twice_is_refused() -> None:
    links = chain(3)
    for step in (3, 5):
        links.sampled(step, f"{step:064x}")
        with pytest.raises(ValueError, match=f"step {step} after step 3"):
            links.stepped(step, 1.0, 1.0)


@pytest.mark.parametrize(
    ("change", "part"),
    [({"samples": 99}, "samples"), ({"loss": 0.7}, "loss"), ({"weights": 99}, "weights")],
)
def test_each_other_link_changes_the_head_and_is_named(change: dict[str, Any], part: str) -> None:
    plain, other = chain(9), chain(9, at=6, **change)
    assert plain.head() != other.head()
    difference = first_difference(plain, other, 9)
    assert isinstance(difference, Difference)
    assert (difference.step, difference.part) == (6, part)
    assert first_difference(plain, other, 5) is None
    assert first_difference(plain, chain(9), 9) is None


def test_another_way_to_go_on_is_a_link_and_the_same_way_is_none() -> None:
    assert chain(6, starts=(4,)).head() != chain(6).head()
    assert [item.step for item in chain(6, starts=(2, 4)).starts] == [0, 2, 4]
    again = chain(6)
    again.start(FACTS)
    assert len(again.starts) == 1


def test_a_flipped_bit_a_name_a_shape_and_a_type_change_the_digest_of_weights() -> None:
    tensor = torch.arange(6, dtype=torch.float32)
    plain = weights_digest({"a": tensor, "b": torch.tensor(3)})
    assert plain == weights_digest({"b": torch.tensor(3), "a": tensor.clone()})
    flipped = tensor.clone()
    flipped.view(torch.int32)[2] ^= 1
    others = [{"a": flipped}, {"c": tensor}, {"a": tensor.reshape(2, 3)}, {"a": tensor.view(torch.int32)}]
    digests = {weights_digest({"b": torch.tensor(3), **other}) for other in others}
    assert len(digests | {plain}) == 5


def test_a_spike_is_what_noise_does_not_reach() -> None:
    noise = (torch.randn(2000, generator=torch.Generator().manual_seed(0)) * 0.3 + 2).tolist()
    spikes = Spikes()
    assert not spikes.is_spike(1e9), "not warm"
    assert not any(spikes.is_spike(loss) for loss in noise)
    assert spikes.is_spike(12.0)
    flat = Spikes()
    assert not any(flat.is_spike(-1.0) for _ in range(WINDOW))
    assert not flat.is_spike(-1.0 + 1e-6)
    assert flat.is_spike(-0.5)
