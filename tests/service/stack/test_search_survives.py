"""Search and fine-tuning on the real cluster: early stops, the death of a driver, and what is registered after it."""

import os
import signal
import threading
from typing import Any

import psutil
import pytest

from cluster.stack_info import StackInfo
from jobs import driver, submit
from jobs.configs import FinetuneJobConfig
from jobs.configs.search import TuneConfig
from jobs.tracking import models as registry
from jobs.tracking import runs as tracking
from jobs.tune.live import METRIC
from jobs.tune.population import Standing, perturbed, takeovers
from ssl_core.bundle import write_bundle
from ssl_core.config import parse
from ssl_core.downstream.search import SearchResult, lineage
from storage.objects import open_store
from tests.kit.ahead import Ahead
from tests.kit.bundles import facts, network

pytestmark = [pytest.mark.service, pytest.mark.chaos, pytest.mark.timeout(1200)]
EPOCHS = 4


@pytest.fixture(scope="module")
def encoder(local_stack: StackInfo, tmp_path_factory: pytest.TempPathFactory) -> str:
    bundle = write_bundle(tmp_path_factory.mktemp("bundle") / "encoder", "encoder", network(), facts(labels=()))
    registry.register(bundle, "search-encoder")
    return "models:/search-encoder@candidate"


def common(name: str, data: str) -> dict[str, Any]:
    return {
        "name": name,
        "labelled": {"data": data, "label": "labels", "subjects": 4, "inner": 2, "test_limit": 2},
        "finetune": {"epochs": EPOCHS, "steps_per_epoch": 4, "batch": 2, "patch_DHW": [32, 32, 32]},
    }


def run_and_kill_the_driver(info: StackInfo, module: str, job: Any, sign: str) -> tuple[str, list[str]]:
    """Submit, SIGKILL the driver once a line with the pattern `sign` was written, and see the job through.

    Returns its name and its log. Where this process was held up so long that the job had ended before the signal, one
    of another name is tried.
    """
    for attempt in range(3):
        named = job.model_copy(update={"name": f"{job.name}-{attempt}"})
        lines = _run_and_kill(info, module, named, sign)
        if any("submitting again" in line for line in lines):
            return named.name, lines
    raise AssertionError("\n".join(lines))


def _run_and_kill(info: StackInfo, module: str, job: Any, sign: str) -> list[str]:
    lines: list[str] = []
    ahead, ended = Ahead(info.state_dir), threading.Event()

    def kill() -> None:
        ahead.wait(sign, lambda: not ended.is_set())
        state = os.environ["TOMOSCALE_STATE"]
        for process in psutil.process_iter():
            try:
                words = process.cmdline()
                ours = any(state in value for value in process.environ().values())
            except psutil.Error:
                continue
            if ours and module in words and "python" in words[0]:
                process.send_signal(signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    try:
        submit.run(info.jobs_address, module, job, job.name, show=lines.append)
    finally:
        ended.set()
        killer.join()
    return lines


@pytest.fixture(scope="module")
def searched(local_stack: StackInfo, phantoms: str, encoder: str) -> tuple[dict[str, Any], list[str]]:
    """Result and log of a search whose driver was killed."""
    job = parse(TuneConfig, common("search", phantoms) | {"encoders": [encoder, "none"], "trials": 5, "concurrent": 2})
    name, lines = run_and_kill_the_driver(local_stack, "jobs.tune", job, r"epoch 1:")
    result = driver.read_result("s3://runs", name)
    print(result["trials"])
    return result, lines


def test_asha_stops_trials_early(searched: tuple[dict[str, Any], list[str]]) -> None:
    result, _ = searched
    # Each goes on only where it is no worse than half of those before it: with five, some are not.
    assert any(trial["stopped_early"] for trial in result["trials"]), "ASHA has heard of every epoch"
    assert any(trial["epochs"] == EPOCHS for trial in result["trials"])


def test_a_search_goes_on_after_its_drivers_death(searched: tuple[dict[str, Any], list[str]]) -> None:
    result, lines = searched
    assert any("continuing the search" in line for line in lines), lines
    assert not [line for line in lines if line.startswith("[I ") or " INFO " in line]
    assert len(result["trials"]) == 5
    for trial in result["trials"]:
        assert trial["status"] == "done", trial
        assert 1 <= trial["epochs"] <= EPOCHS, trial
    api = tracking.client()
    run = api.get_run(result["run_id"])
    assert run.info.status == "FINISHED"
    children = api.search_runs([run.info.experiment_id], f"tags.mlflow.parentRunId = '{run.info.run_id}'")
    assert len(children) == 5
    require_its_own_points(result, children)


def require_its_own_points(result: dict[str, Any], children: list[Any]) -> None:
    """Each child has the parameters and the points of one trial, and its id."""
    api = tracking.client()
    by_id = {trial["id"]: trial for trial in result["trials"]}
    assert sorted(child.data.tags["tomoscale.trial"] for child in children) == sorted(by_id)
    for child in children:
        trial = by_id[child.data.tags["tomoscale.trial"]]
        assert child.info.run_name.endswith(f"-{trial['trial']}")
        assert float(child.data.params["finetune.lr"]) == trial["lr"]
        points = api.get_metric_history(child.info.run_id, METRIC)
        assert [p.value for p in sorted(points, key=lambda p: p.step)] == pytest.approx(trial["scores"])


def test_a_search_sent_again_mixes_no_trials(
    local_stack: StackInfo, phantoms: str, encoder: str, searched: tuple[dict[str, Any], list[str]]
) -> None:
    """It was continued after a death, and has ended: a second start lists its trials in another order."""
    before, _ = searched
    api = tracking.client()
    run = api.get_run(before["run_id"])
    job = parse(TuneConfig, common("search", phantoms) | {"encoders": [encoder, "none"], "trials": 5, "concurrent": 2})
    job = job.model_copy(update={"name": run.data.tags["tomoscale.job"]})
    submit.run(local_stack.jobs_address, "jobs.tune", job, job.name, show=lambda _: None)
    again = driver.read_result("s3://runs", job.name)
    assert again["trials"] == before["trials"]
    assert again["chosen"] == before["chosen"]
    children = api.search_runs([run.info.experiment_id], f"tags.mlflow.parentRunId = '{run.info.run_id}'")
    assert len(children) == 5
    require_its_own_points(again, children)


def test_a_population_decides_alike_after_its_drivers_death(
    local_stack: StackInfo, phantoms: str, encoder: str
) -> None:
    """What is decided follows from the scores on record; a member goes on from weights that another had."""
    space = {"finetune.lr": {"loguniform": [1e-4, 1e-2]}, "finetune.class_balance": {"uniform": [0.2, 0.8]}}
    plan = {"scheduler": "pbt", "space": space, "trials": 3, "concurrent": 2, "population": {"quantile": 0.34}}
    job = parse(TuneConfig, common("population", phantoms) | {"encoders": [encoder]} | plan)
    name, lines = run_and_kill_the_driver(local_stack, "jobs.tune", job, r"epoch 2:")
    assert any("continuing the search" in line for line in lines), lines
    result = SearchResult.from_json(driver.read_result("s3://runs", name))
    assert [len(trial.scores) for trial in result.trials] == [EPOCHS] * 3
    assert not any(trial.error or trial.stopped_early for trial in result.trials)
    for epoch in range(1, EPOCHS):
        standings = [
            Standing(t.trial, t.scores[epoch - 1], lineage(result.trials, t.trial, epoch)[-1].settings)
            for t in result.trials
        ]
        expected = takeovers(
            standings, epoch, quantile=0.34, seed=job.seed, explore=perturbed(job.changing, job.population)
        )
        assert {t.trial: o for t in result.trials for o in t.takeovers if o.epoch == epoch} == expected
    api = tracking.client()
    run = api.get_run(result.run_id)
    children = api.search_runs([run.info.experiment_id], f"tags.mlflow.parentRunId = '{run.info.run_id}'")
    by_id = {child.data.tags["tomoscale.trial"]: child for child in children}
    assert len(by_id) == len(children) == 3
    for trial in result.trials:
        tags = by_id[trial.id].data.tags
        words = ", ".join(f"trial {o.source} at epoch {o.epoch}" for o in trial.takeovers)
        assert tags.get("tomoscale.exploited", "") == words
        points = api.get_metric_history(by_id[trial.id].info.run_id, METRIC)
        assert [p.value for p in sorted(points, key=lambda p: p.step)] == pytest.approx(trial.scores)
    assert not list(open_store(f"s3://runs/{name}/checkpoints").list())


def test_the_best_of_a_search_is_confirmed_and_registered(local_stack: StackInfo, phantoms: str, encoder: str) -> None:
    """Trainings of the confirmation run as tasks of the cluster; the reference is the start as it was."""
    plan = {"encoders": [encoder], "trials": 2, "concurrent": 2, "scheduler": "none", "confirm": {"draws": 2}}
    data = common("confirmed", phantoms) | plan
    data["finetune"] = data["finetune"] | {"epochs": 1}
    job = parse(TuneConfig, data)
    lines: list[str] = []
    submit.run(local_stack.jobs_address, "jobs.tune", job, job.name, show=lines.append)
    result = SearchResult.from_json(driver.read_result("s3://runs", job.name))
    confirmation = result.confirmation
    assert confirmation is not None, lines
    assert confirmation.draws == (1, 2)
    assert len(confirmation.best.by_draw) == len(confirmation.reference.by_draw) == 2
    assert any(confirmation.statement in line for line in lines), lines
    (version,) = registry.list_models("confirmed")
    assert version.version == confirmation.version
    api = tracking.client()
    tags = api.get_model_version("confirmed", confirmation.version).tags
    assert tags["tomoscale.confirmed.statement"] == confirmation.statement
    assert float(tags["tomoscale.confirmed.mean"]) == pytest.approx(confirmation.best.mean, abs=1e-6)
    run = api.get_run(result.run_id)
    children = api.search_runs([run.info.experiment_id], f"tags.mlflow.parentRunId = '{run.info.run_id}'")
    kinds = sorted(child.data.tags["tomoscale.kind"] for child in children)
    assert kinds == ["confirmation"] * 4 + ["trial"] * 2
    assert {child.info.status for child in (run, *children)} == {"FINISHED"}
    submit.run(local_stack.jobs_address, "jobs.tune", job, job.name, show=lines.append)
    assert [v.version for v in registry.list_models("confirmed")] == [version.version], "sent again: nothing twice"
    assert any("0 of 4 trainings to do" in line for line in lines)


def test_fine_tuning_keeps_what_was_done_before_its_drivers_death(
    local_stack: StackInfo, phantoms: str, encoder: str
) -> None:
    starts = {"pre-trained": encoder, "from scratch": "none"}
    job = parse(FinetuneJobConfig, common("tuned", phantoms) | {"starts": starts, "seeds": [0, 1], "concurrent": 1})
    name, lines = run_and_kill_the_driver(local_stack, "jobs.finetune", job, r"\(2/4\)")
    assert any("of 4 trainings were done before" in line for line in lines), lines
    assert not [line for line in lines if " INFO " in line]
    assert len([line for line in lines if "seed 0: test Dice" in line and line.startswith("pre-trained")]) == 1
    result = driver.read_result("s3://runs", name)
    assert len(result["cases"]) == 2 * 2 * 2, "starts, seeds and test cases, each once"
    assert {c["label"] for c in result["cases"]} == {"labels-1"}
    versions = registry.list_models(name)
    assert [v.version for v in versions] == [result["version"]]
    assert "candidate" in versions[0].aliases
    keys = sorted(open_store(f"s3://runs/{name}/trainings").list())
    assert len(keys) == 4
    artifacts = tracking.client().list_artifacts(versions[0].run_id)
    assert {"examples.png", "scores.png"} <= {item.path for item in artifacts if item.file_size > 1000}
