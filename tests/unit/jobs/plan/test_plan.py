"""`tomoscale plan`: its figures beside those of the run that it is of, and what follows from them."""

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from jobs.cli import main as cli
from jobs.configs import PretrainConfig
from jobs.plan import page
from jobs.plan.dry_run import dry_run
from jobs.plan.estimate import COMPUTE, DATA, NETWORK, Links, Prices, estimate
from jobs.plan.make import make
from jobs.plan.measure import Measured, measure
from jobs.pretrain.loop import Hooks, Take, build_engine, run
from ssl_core.config import dump_yaml, parse, resolved
from ssl_core.methods.base import method_class
from storage.errors import ConfigError
from tests.kit.phantoms import write_phantoms
from tests.kit.pretraining import CPU, config

NOTHING = Links(), Prices()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = f"file://{tmp_path_factory.mktemp('store')}"
    write_phantoms(url, 8)
    return url


def seconds_of_a_run(job: PretrainConfig, clock: Callable[[], float]) -> float:
    """From nothing to the last checkpoint."""

    def publish(_step: int, take: Take | None, _metrics: dict[str, float]) -> None:
        assert take is not None
        take()

    began = clock()
    run(job, Hooks(publish=publish), restore=None, device=CPU)
    return clock() - began


def ratio(job: PretrainConfig, clock: Callable[[], float]) -> float:
    """Planned over real seconds, the median of three; a plan before and after each run, as machines drift."""
    rounds = []
    for _ in range(3):
        plans = [measure(job, steps=20, clock=clock)]
        real = seconds_of_a_run(job, clock)
        plans.append(measure(job, steps=20, clock=clock))
        hours = statistics.mean(estimate(job, plan, *NOTHING).hours for plan in plans)
        rounds.append(hours * 3600 / real)
    return statistics.median(rounds)


def test_the_hours_of_a_plan_are_within_a_tenth_of_the_run(data: str) -> None:
    job = config(data, "simclr", steps=40, warmup_steps=2, probe_every=20, checkpoint_every=20)
    job = job.model_copy(update={"cluster": job.cluster.model_copy(update={"workers": 1})})
    tries = []
    for _ in range(3):
        # Others at work on the machine make a clock on the wall useless, and the processor time of this process not.
        is_busy = os.getloadavg()[0] > len(os.sched_getaffinity(0))
        tries.append(ratio(job, time.process_time if is_busy else time.perf_counter))
        print(f"planned / real{' by processor time, as the machine is busy' if is_busy else ''}: {tries[-1]:.3f}")
        if abs(tries[-1] - 1) <= 0.1:
            return
    raise AssertionError(f"planned / real: {tries}")


def test_each_number_of_workers_is_measured_or_says_why_not(data: str) -> None:
    columns = make(config(data, "simclr", probe_every=100), (1, 3, 4), steps=2, links=Links(), prices=Prices(2.0))
    assert [column.workers for column in columns] == [1, 2, 3, 4], "the job's own two are among them"
    done = {c.workers: c.measured for c in columns if c.measured is not None}
    assert {workers: m.samples for workers, m in done.items()} == {1: 4, 2: 2, 4: 1}
    assert "multiples of cluster.workers (3)" in columns[2].reason
    sizes = {(m.gradient_bytes, m.parameters, m.checkpoint_bytes) for m in done.values()}
    assert len(sizes) == 1, "the network is the same"
    method = build_engine(config(data, "simclr"), CPU).method
    assert {m.parameters for m in done.values()} == {sum(p.numel() for p in method.parameters() if p.requires_grad)}
    for measured in done.values():
        assert measured.gradient_bytes == 4 * measured.parameters
        assert measured.checkpoint_bytes >= 3 * measured.gradient_bytes, "weights, and AdamW's two moments"
        assert min(measured.compute_s, measured.checkpoint_s) > 0
        assert measured.requests > 0
        assert measured.read_bytes > 0
        assert measured.resident_bytes > 5e7
        assert measured.gpu_bytes is None
    text = page.text(config(data, "simclr"), columns, Links(), Prices(2.0))
    for line in text.splitlines()[6:22]:
        assert ("measured" in line) != ("estimated" in line) or line.startswith("samples"), line


def test_a_worker_reads_its_share_and_all_workers_together_the_same(data: str) -> None:
    by_workers = {
        c.workers: c.estimated
        for c in make(config(data, "simclr"), (1, 4), steps=8, links=Links(), prices=Prices())
        if c.estimated is not None
    }
    one, four = by_workers[1].read_bytes, by_workers[4].read_bytes
    assert 0.5 < four / one < 2, "crops that lie side by side are read together on one worker only"


MEASURED = Measured(
    workers=4,
    device="x",
    samples=2,
    steps=20,
    compute_s=0.5,
    wait_s=0.01,
    start_s=36.0,
    read_bytes=5e6,
    requests=3,
    gradient_bytes=400_000_000,
    parameters=100_000_000,
    checkpoint_s=1.0,
    checkpoint_bytes=1_200_000_000,
    probe_s=2.0,
    labels_s=0.0,
    resident_bytes=1,
    gpu_bytes=None,
)


def job_of(steps: int) -> PretrainConfig:
    return config("memory://x", "simclr", steps=steps, warmup_steps=2, probe_every=30, checkpoint_every=40)


def test_what_follows_from_the_figures() -> None:
    job = job_of(100)
    result = estimate(job, MEASURED, Links(gradients_gbit=8.0), Prices(3.0, 0.1, 0.5, workers_per_node=3))
    assert result.reduce_s == pytest.approx(2 * 3 / 4 * 0.4)
    assert result.step_s == pytest.approx(0.51 + 0.6)
    seconds = 36 + 100 * 1.11 + 4 * 2 + 3 * 1  # probes at 30, 60, 90 and 100, checkpoints at 40, 80 and 100
    assert result.hours == pytest.approx(seconds / 3600)
    assert result.read_bytes == pytest.approx(100 * 4 * 5e6)
    assert result.requests == 100 * 4 * 3 + 3 * 4
    assert result.nodes == 2
    assert result.money == pytest.approx(3 * 2 * seconds / 3600 + 0.1 * 2 + 0.5 * 1.212)
    assert estimate(job, MEASURED, Links(), Prices()).money is None


def test_what_bounds_a_run_is_what_would_have_to_be_faster() -> None:
    def bound(links: Links, **changes: float) -> str:
        return estimate(job_of(100), Measured(**{**vars(MEASURED), **changes}), links, Prices()).bound

    assert bound(Links(100.0)) == COMPUTE
    assert bound(Links(1.0)) == NETWORK
    assert bound(Links(100.0), wait_s=0.05) == DATA
    assert bound(Links(100.0, store_gbit=0.1)) == DATA, "20 MB a step of all workers take longer than the step"
    assert bound(Links(1.0), workers=1) == COMPUTE, "one worker averages nothing"


def test_a_plan_is_json_and_settings_are_printed_as_before(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOMOSCALE_STATE", str(tmp_path / "none"))
    path = tmp_path / "c.yaml"
    path.write_text(dump_yaml(config(data, "simclr")))
    assert cli.main(["plan", str(path), "--workers", "1", "--steps", "2", "--json", "engine.steps=50"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["steps"] == 50
    assert [item["workers"] for item in plan["workers"]] == [1, 2]
    assert all(item["estimated"]["hours"] > 0 for item in plan["workers"])
    assert cli.main(["plan", "pretrain", str(path), "engine.steps=50"]) == 0
    assert "steps: 50" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for wrong in (["plan", "pretrain"], ["plan", "fly", str(path)], ["plan", str(path), "cluster.gpu=true"]):
        assert cli.main(wrong) == 2, wrong
    assert "run `plan` on a node that has one" in capsys.readouterr().err


def test_a_dry_run_builds_everything_and_takes_one_step(data: str) -> None:
    said = dry_run(config(data, "simclr"))
    assert "the first of 2 worker(s)" in said
    assert "2 samples" in said
    assert f"on {data}\nnothing was sent" in said


@pytest.mark.parametrize("method", ["simclr", "lrc"])
def test_a_dry_run_without_its_data_steps_on_noise_and_says_so(method: str) -> None:
    job = config("memory://nothing-here", "simclr")
    if method == "lrc":  # asks for super-pixels
        tiny = {**method_class(method).Config.TINY, "crops": {"size_DHW": [16, 32, 16]}}
        job = parse(PretrainConfig, {**resolved(job), "method": {"name": method, **tiny}})
    said = dry_run(job)
    assert "on noise, not on memory://nothing-here: no object 'latest'; ingest into it" in said
    assert "the job will ingest simulated" in dry_run(job.model_copy(update={"source": "simulated"}))


def test_a_dry_run_refuses_what_the_job_would_refuse(data: str) -> None:
    job = config(data, "simclr")
    backbone = job.backbone.model_copy(update={"arguments": {**job.backbone.arguments, "in_channels": 2}})
    with pytest.raises(ConfigError, match="2 channel"):
        dry_run(job.model_copy(update={"backbone": backbone}))
