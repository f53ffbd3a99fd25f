"""One step, as promised: gradients, accumulation, clipping, rates, errors, and the state that resumes bit for bit."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ssl_core.train import checkpoint
from ssl_core.train.engine import Engine, EngineConfig, NonFiniteError
from ssl_core.train.loop import fit
from ssl_core.train.optim import NamedOptimizer
from ssl_core.views.types import ViewBatch
from storage.errors import ConfigError, TomoscaleError
from tests.kit.toy_method import Toy, batch, views_of

FLAT: dict[str, Any] = {"warmup_steps": 0, "log_every": 1, "weight_decay": 0.0}


def nothing(*_: Any) -> None:
    pass


def run(engine: Engine, first: int, last: int, size: int = 4) -> list[dict[str, float]]:
    return [engine.step(batch(step * size, size, engine.dtype)) for step in range(first, last)]


def assert_equal_state(a: Engine, b: Engine) -> None:
    one, two = a.state_dict(), b.state_dict()
    assert one["engine"] == two["engine"]
    for name, tensor in one["method"].items():
        assert torch.equal(tensor, two["method"][name]), name
    assert list(one["optimizer"]) == list(two["optimizer"])
    for name, entry in one["optimizer"].items():
        assert list(entry) == list(two["optimizer"][name])
        for key, tensor in entry.items():
            assert torch.equal(tensor, two["optimizer"][name][key]), (name, key)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_step_is_the_textbook_step(optimizer: str) -> None:
    config = EngineConfig(steps=8, optimizer=optimizer, lr=0.1, clip=0, precision="fp64", **FLAT)
    engine = Engine(Toy(), config)
    before = {n: p.detach().clone() for n, p in engine.method.online.named_parameters()}
    views = batch(0, 4, torch.float64)
    twin = Toy().double()
    total = twin(views, _context(engine)).total
    total.backward()
    gradients = {n: p.grad for n, p in twin.online.named_parameters()}
    metrics = engine.step(views)
    for name, p in engine.method.online.named_parameters():
        g = gradients[name]
        # AdamW's first step is g / (|g| + eps): both bias corrections cancel.
        move = g if optimizer == "sgd" else g / (g.abs() + 1e-8)
        torch.testing.assert_close(p.detach(), before[name] - 0.1 * move, rtol=0, atol=1e-12)
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-12)
    assert metrics["loss"] == pytest.approx(total.item(), rel=1e-12)
    assert metrics["loss"] == pytest.approx(metrics["loss/fit"] + metrics["loss/size"], rel=1e-12)
    assert set(metrics) == {"loss", "loss/fit", "loss/size", "monitor/truth", "grad_norm", "lr", "weight_decay"}


def test_decay_is_for_kernels_only_and_follows_its_own_curve() -> None:
    config = EngineConfig(
        steps=3, lr=0.1, clip=0, precision="fp64", warmup_steps=0, weight_decay=0.4, final_weight_decay=0.1, log_every=1
    )
    decayed, plain = (
        Engine(Toy(), config),
        Engine(Toy(), EngineConfig(steps=3, lr=0.1, clip=0, precision="fp64", **FLAT)),
    )
    old = {n: p.detach().clone() for n, p in decayed.method.online.named_parameters()}
    assert [m["weight_decay"] for m in run(decayed, 0, 1)] == [0.4]
    run(plain, 0, 1)
    for (name, p), q in zip(decayed.method.online.named_parameters(), plain.method.online.parameters(), strict=True):
        expected = q - 0.1 * 0.4 * old[name] if p.dim() > 1 else q
        torch.testing.assert_close(p, expected, rtol=0, atol=1e-12)
    assert [m["weight_decay"] for m in run(decayed, 1, 3)] == pytest.approx([0.25, 0.1])


def test_a_table_of_biases_is_no_kernel() -> None:
    names = ("attn.relative_position_bias_table", "attn.qkv.weight", "attn.qkv.bias")
    named = {n: torch.nn.Parameter(torch.ones(2) if n.endswith(".bias") else torch.ones(3, 2)) for n in names}
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    NamedOptimizer(named, "adamw").step(lr=0.5, weight_decay=0.5)
    assert [float(p.detach().mean()) for p in named.values()] == [1.0, 0.75, 1.0]


def test_rates_follow_the_schedule() -> None:
    config = EngineConfig(steps=5, lr=0.5, warmup_steps=2, final_lr=0.1, log_every=1)
    rates = [m["lr"] for m in run(Engine(Toy(), config), 0, 5)]
    assert rates == pytest.approx([0.25, 0.5, 0.5, 0.3, 0.1])


def test_clipping_bounds_the_norm_and_keeps_the_direction() -> None:
    settings = {"steps": 4, "optimizer": "sgd", "momentum": 0.0, "lr": 1.0, "precision": "fp64", **FLAT}
    free, bound = (Engine(Toy(), EngineConfig(clip=clip, **settings)) for clip in (0.0, 1e-2))
    start = torch.cat([p.detach().flatten() for p in Toy().double().online.parameters()])
    norm = run(free, 0, 1)[0]["grad_norm"]
    assert run(bound, 0, 1)[0]["grad_norm"] == norm > 1e-2
    move, clipped = (
        torch.cat([p.detach().flatten() for p in e.method.online.parameters()]) - start for e in (free, bound)
    )
    assert float(clipped.norm()) == pytest.approx(1e-2, rel=1e-5)
    torch.testing.assert_close(clipped / clipped.norm(), move / move.norm(), rtol=0, atol=1e-12)


def test_a_loose_clip_changes_nothing() -> None:
    settings = {"steps": 4, "precision": "fp64", **FLAT}
    free, loose = (Engine(Toy(), EngineConfig(clip=clip, **settings)) for clip in (0.0, 1e6))
    run(free, 0, 3), run(loose, 0, 3)
    for a, b in zip(free.method.parameters(), loose.method.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_is_the_larger_batch(parts: int) -> None:
    settings = {"steps": 4, "precision": "fp64", **FLAT}
    whole, cut = (Engine(Toy(), EngineConfig(accumulate=a, **settings)) for a in (1, parts))
    for one, two in zip(run(whole, 0, 4), run(cut, 0, 4), strict=True):
        assert one == pytest.approx(two, rel=1e-10)
    for (name, a), b in zip(whole.method.online.named_parameters(), cut.method.online.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10, msg=name)


def test_a_batch_that_cannot_be_cut_is_refused() -> None:
    engine = Engine(Toy(), EngineConfig(steps=2, accumulate=3, **FLAT))
    with pytest.raises(ConfigError, match="divisor of the rank's batch of 4; found 3"):
        engine.step(batch(0, 4))


def test_an_unused_parameter_is_as_one_with_no_gradient() -> None:
    method = Toy()
    method.unused = torch.nn.Parameter(torch.ones(3))
    engine = Engine(method, EngineConfig(steps=3, **FLAT))
    run(engine, 0, 3)
    assert method.unused.tolist() == [1.0] * 3


def test_a_method_without_anything_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match="trainable"):
        Engine(Toy().requires_grad_(False), EngineConfig())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_not_a_number_names_step_and_samples_and_saves_nothing(bad: float, accumulate: int) -> None:
    config = EngineConfig(steps=6, checkpoint_every=1, accumulate=accumulate, **FLAT)
    engine = Engine(Toy(), config)
    saved: list[int] = []

    def batches() -> Any:
        yield batch(0, 4)
        yield batch(4, 4)
        x = torch.stack([v.roles["whole"][0].image_BCDHW[0] for v in (batch(i, 1) for i in range(8, 12))])
        x[3, 0, 0, 0, 0] = bad
        yield views_of(x, torch.arange(8, 12))

    before: dict[str, torch.Tensor] = {}

    def save(step: int, state: dict[str, Any]) -> None:
        saved.append(step)
        before.update({k: v.clone() for k, v in state["method"].items()})

    named = r"\[8, 9, 10, 11\]" if accumulate == 1 else r"\[10, 11\]"
    with pytest.raises(NonFiniteError, match=rf"step 3; expected a finite loss.*samples {named}"):
        fit(engine, batches(), report=nothing, save=save)
    assert saved == [1, 2]
    assert engine.step_done == 2
    for name, tensor in engine.method.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_an_infinite_loss_with_finite_gradients_is_found() -> None:
    class Odd(Toy):
        def forward(self, views: ViewBatch, ctx: Any) -> Any:
            terms = super().forward(views, ctx)
            return dataclasses.replace(terms, terms={**terms.terms, "flat": torch.tensor(math.inf)})

    with pytest.raises(NonFiniteError, match="step 1"):
        Engine(Odd(), EngineConfig(steps=2, **FLAT)).step(batch(0, 2))


def test_gradients_that_overflow_without_an_infinite_loss_are_found() -> None:
    class Steep(Toy):
        def forward(self, views: ViewBatch, ctx: Any) -> Any:
            terms = super().forward(views, ctx)
            return dataclasses.replace(terms, terms={"steep": terms.total * 1e38 * 100})

    engine = Engine(Steep(), EngineConfig(steps=2, **FLAT))
    with pytest.raises(NonFiniteError, match=r"samples \[0, 1\]"):
        engine.step(batch(0, 2))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("at", [1, 3, 5])
def test_resume_is_bitwise(tmp_path: Path, optimizer: str, at: int) -> None:
    config = EngineConfig(steps=6, warmup_steps=2, optimizer=optimizer, log_every=1, accumulate=2, lr=0.05)
    straight = Engine(Toy(dropout=0.3, norm=True), config)
    logged = run(straight, 0, 6)
    first = Engine(Toy(dropout=0.3, norm=True), config)
    early = run(first, 0, at)
    checkpoint.save(tmp_path / "c", first.state_dict(), {})
    torch.rand(7)  # generators elsewhere move; a run must not care
    second = Engine(Toy(dropout=0.3, norm=True, seed=99), config)
    second.load_state_dict(checkpoint.load(tmp_path / "c")[0])
    late = run(second, at, 6)
    assert early + late == logged
    assert_equal_state(straight, second)


def test_a_loaded_engine_shares_no_memory_with_the_state(tmp_path: Path) -> None:
    config = EngineConfig(steps=6, **FLAT)
    one, two = Engine(Toy(), config), Engine(Toy(), config)
    run(one, 0, 2)
    two.load_state_dict(one.state_dict())
    checkpoint.save(tmp_path / "c", one.state_dict(), {})
    run(two, 2, 4)
    three = Engine(Toy(), config)
    three.load_state_dict(checkpoint.load(tmp_path / "c")[0])
    assert_equal_state(one, three)


def test_channels_last_resumes_bitwise_and_agrees(tmp_path: Path) -> None:
    settings = {"steps": 4, "precision": "fp64", **FLAT}
    plain = Engine(Toy(), EngineConfig(**settings))
    last = Engine(Toy(), EngineConfig(channels_last=True, **settings))
    run(plain, 0, 4), run(last, 0, 2)
    weight = last.method.online[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert weight.grad.stride() == weight.stride()
    again = Engine(Toy(), EngineConfig(channels_last=True, **settings))
    checkpoint.save(tmp_path / "c", last.state_dict(), {})
    again.load_state_dict(checkpoint.load(tmp_path / "c")[0])
    run(last, 2, 4), run(again, 2, 4)
    assert_equal_state(last, again)
    for a, b in zip(plain.method.parameters(), last.method.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_another_configuration_is_refused_unless_told() -> None:
    one = Engine(Toy(), EngineConfig(steps=6, **FLAT))
    run(one, 0, 2)
    other = Engine(Toy(), EngineConfig(steps=8, **FLAT))
    with pytest.raises(ConfigError, match=r"engine settings.*as in this run"):
        other.load_state_dict(one.state_dict())
    other.load_state_dict(one.state_dict(), allow_change=True)
    assert other.step_done == 2


def test_how_often_to_log_is_no_other_configuration() -> None:
    assert EngineConfig(log_every=3, checkpoint_every=7, probe_every=0).digest() == EngineConfig().digest()
    assert EngineConfig(lr=0.5).digest() != EngineConfig().digest()


def test_a_state_of_another_network_is_refused_and_changes_nothing() -> None:
    one, other = Engine(Toy(norm=True), EngineConfig(**FLAT)), Engine(Toy(), EngineConfig(**FLAT))
    before = {k: v.clone() for k, v in other.method.state_dict().items()}
    with pytest.raises(ConfigError, match=r"method tensor 'average\.1\.\w+'"):
        other.load_state_dict(one.state_dict())
    assert all(torch.equal(v, before[k]) for k, v in other.method.state_dict().items())


def test_bf16_is_near_fp32() -> None:
    losses = []
    for precision in ("fp32", "bf16"):
        engine = Engine(Toy(), EngineConfig(steps=6, precision=precision, optimizer="sgd", lr=0.01, **FLAT))
        losses.append([m["loss"] for m in run(engine, 0, 6)])
        assert next(engine.method.parameters()).dtype == torch.float32
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_the_loss_falls() -> None:
    engine = Engine(Toy(), EngineConfig(steps=60, lr=0.02, **FLAT))
    losses = [engine.step(batch(0, 4))["loss"] for _ in range(60)]
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"lr": 0}, {"steps": 10, "warmup_steps": 10}, {"momentum": 1.0}, {"precision": "fp16"}]
)
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(reversed(wrong))):
        EngineConfig(**wrong)


def test_every_setting_is_described() -> None:
    assert all(field.description for field in EngineConfig.model_fields.values())


def test_fit_reports_saves_and_measures(tmp_path: Path) -> None:
    config = EngineConfig(steps=7, log_every=3, checkpoint_every=4, probe_every=2, warmup_steps=1)
    engine = Engine(Toy(), config)
    now = [0.0]
    reports: dict[int, dict[str, float]] = {}
    saves: list[int] = []
    probed: list[int] = []

    def batches() -> Any:
        for step in range(99):
            now[0] += 2.0  # a step takes two seconds, of which half a second was a wait
            yield batch(step * 4, 4), 0.5

    def probe(engine: Engine, views: ViewBatch) -> dict[str, float]:
        probed.append(engine.step_done)
        return {"probe/x": float(len(views))}

    done = fit(
        engine,
        batches(),
        report=lambda step, metrics: reports.update({step: metrics}),
        save=lambda step, _state: saves.append(step),
        probe=probe,
        clock=lambda: now[0],
    )
    assert done == engine.step_done == 7
    assert saves == [4, 7]
    assert probed == [2, 4, 6, 7]
    assert sorted(reports) == [1, 2, 3, 4, 6, 7]
    assert reports[2] == {"probe/x": 4.0}
    assert reports[7]["probe/x"] == 4.0
    for step in (1, 3, 6, 7):
        assert reports[step]["time/step_s"] == pytest.approx(2.0)
        assert reports[step]["time/wait_share"] == pytest.approx(0.25)
        assert reports[step]["time/samples_per_s"] == pytest.approx(2.0)
        assert "loss" in reports[step]


@pytest.mark.parametrize(("every", "expected"), [(100, [3]), (0, [])])
def test_a_short_run_is_probed_at_its_end_unless_probes_are_off(every: int, expected: list[int]) -> None:
    engine = Engine(Toy(), EngineConfig(steps=3, probe_every=every, warmup_steps=1))
    probed: list[int] = []

    def probe(engine: Engine, views: ViewBatch) -> dict[str, float]:
        probed.append(engine.step_done)
        return {}

    fit(engine, (batch(step * 4, 4) for step in range(3)), report=nothing, save=nothing, probe=probe)
    assert probed == expected


def test_without_a_known_wait_the_whole_time_to_the_next_batch_counts() -> None:
    now = [0.0]
    reports: list[dict[str, float]] = []

    def batches() -> Any:
        for step in range(2):
            now[0] += 3.0
            yield batch(step * 4, 4)

    class Slow(Toy):
        def after_step(self, ctx: Any) -> None:
            now[0] += 1.0

    engine = Engine(Slow(), EngineConfig(steps=2, **FLAT))
    fit(engine, batches(), report=lambda _s, m: reports.append(m), save=nothing, clock=lambda: now[0])
    assert [m["time/wait_share"] for m in reports] == pytest.approx([0.75, 0.75])


def test_a_stop_ends_after_the_step_with_a_checkpoint_and_goes_on_bitwise() -> None:
    config = EngineConfig(steps=6, checkpoint_every=100, **FLAT)
    stopped, straight = Engine(Toy(), config), Engine(Toy(), config)
    saves: list[int] = []
    asked = iter([False, False, True])
    source = (batch(step * 4, 4) for step in range(6))
    done = fit(stopped, source, report=nothing, save=lambda s, _: saves.append(s), stop=lambda: next(asked))
    assert (done, saves) == (3, [3])
    assert fit(stopped, source, report=nothing, save=lambda s, _: saves.append(s)) == 6
    assert saves == [3, 6]
    fit(straight, (batch(step * 4, 4) for step in range(6)), report=nothing, save=nothing)
    assert_equal_state(stopped, straight)


@pytest.mark.parametrize("log_every", [1, 99])
def test_a_verdict_that_comes_a_step_later_still_comes_before_any_checkpoint(log_every: int) -> None:
    """As on CUDA, where the host runs ahead of the device."""
    config = EngineConfig(steps=9, warmup_steps=0, checkpoint_every=3, log_every=log_every)
    for bad_step, last_saved in ((4, 3), (5, 3), (8, 6)):
        engine, saves = Engine(Toy(), config), list[int]()
        engine._lag = 1

        def batches(bad_step: int = bad_step) -> Any:
            for step in range(9):
                views = batch(step * 4, 4)
                if step == bad_step:
                    views.roles["whole"][0].image_BCDHW[2] = math.nan
                yield views

        with pytest.raises(NonFiniteError, match=f"^step {bad_step + 1};"):
            fit(engine, batches(), report=nothing, save=lambda step, _, to=saves: to.append(step))
        assert saves[-1] == last_saved


def test_a_stop_that_is_seen_a_step_later_saves_where_it_ends() -> None:
    engine, saves = Engine(Toy(), EngineConfig(steps=9, warmup_steps=0, checkpoint_every=3, log_every=99)), list[int]()
    engine._lag = 1
    for asked_at, end in ((1, 3), (2, 3), (3, 5)):
        engine.step_done = 0
        saves.clear()
        source = (batch(step * 4, 4) for step in range(9))
        stop = (step == asked_at for step in range(9))
        done = fit(engine, source, report=nothing, save=lambda s, _: saves.append(s), stop=lambda a=stop: next(a))
        assert done == end
        assert saves[-1] == end


def test_batches_that_end_early_are_an_error() -> None:
    engine = Engine(Toy(), EngineConfig(steps=5, **FLAT))
    with pytest.raises(TomoscaleError, match="5 steps of them; found the end after step 2"):
        fit(engine, (batch(i, 4) for i in range(2)), report=nothing, save=nothing)


def test_a_finished_run_does_nothing() -> None:
    engine = Engine(Toy(), EngineConfig(steps=2, **FLAT))
    run(engine, 0, 2)
    assert fit(engine, iter(()), report=nothing, save=nothing) == 2


def _context(engine: Engine) -> Any:
    from ssl_core.methods.base import StepContext

    return StepContext(0, engine.config.steps, 0, engine.collectives)
