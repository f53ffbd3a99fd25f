"""`bench learn`: the read-out reads what is there, rows start alike, and verdicts follow the figures."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from jobs.bench.learning import arms, learn, voxel_probe
from jobs.bench.learning import rows as learn_rows
from jobs.bench.learning.voxel_probe import Case
from jobs.cli import main as cli
from ssl_core.config import parse
from ssl_core.methods.base import method_names
from ssl_core.methods.parts.points import sample_features
from ssl_core.networks.backbone import Level
from ssl_core.networks.batch_norm import GlobalBatchNorm
from ssl_core.testing.method import tiny_config, tiny_method
from ssl_core.testing.views import synthetic_views
from ssl_core.train.engine import Engine, EngineConfig
from storage.datasets import simulated as cohort
from storage.errors import ConfigError

TINY = arms.Size(view_DHW=(16, 16, 16), batch=2, steps=2, seeds=(0,), fitted=3, scored=2, filters=(4, 8, 8), lr=1e-9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A handful of simulated subjects where the hippocampus data set would be."""
    root = tmp_path_factory.mktemp("datasets")
    cohort.ensure(root / "msd_hippocampus", subjects=6)
    return root


@pytest.fixture
def network() -> learn.Pyramid:
    torch.manual_seed(0)
    return learn.network(TINY).eval()


def bright_cases(seed: int, count: int = 3) -> list[Case]:
    """Blocks of two intensities on noise; each intensity is a class."""
    rng = np.random.default_rng(seed)
    cases = []
    for _ in range(count):
        classes = np.zeros((16, 20, 16), np.int64)
        for k in (1, 2):
            a, b, c = rng.integers(0, 8, 3)
            classes[a : a + 7, b : b + 7, c : c + 7] = k
        image = rng.normal(0, 0.1, (1, 1, 16, 20, 16)) + np.array([0.0, 3.0, -3.0])[classes]
        cases.append(Case(torch.from_numpy(image).float(), classes))
    return cases


class Intensity:
    """A backbone whose features are the image and its average over cells of 2 x 2 x 2."""

    levels = (Level(1, (1, 1, 1), (0.5, 0.5, 0.5)), Level(1, (2, 2, 2), (1.0, 1.0, 1.0)))

    def features(self, x_BCDHW: torch.Tensor) -> list[torch.Tensor]:
        return [x_BCDHW, torch.nn.functional.avg_pool3d(x_BCDHW, 2)]


def test_the_read_out_finds_what_the_features_hold_and_nothing_else() -> None:
    network: Any = Intensity()
    probe = voxel_probe.fit(network, bright_cases(0), 3)
    assert min(voxel_probe.evaluate(network, probe, bright_cases(1))) > 0.97
    rng = np.random.default_rng(2)
    mixed = [Case(c.image_1CDHW, rng.permuted(c.class_DHW.ravel()).reshape(16, 20, 16)) for c in bright_cases(0, 6)]
    chance = voxel_probe.fit(network, mixed[:3], 3)
    assert max(voxel_probe.evaluate(network, chance, mixed[3:])) < 0.25


def test_reading_out_before_interpolation_is_reading_out_after(network: learn.Pyramid) -> None:
    (case, *_) = bright_cases(0)
    probe = voxel_probe.fit(network, bright_cases(0), 3)
    points = torch.tensor([[[0.5, 0.5, 0.5], [3.5, 18.5, 7.5], [15.5, 9.5, 2.5]]], dtype=torch.float64)
    with torch.no_grad():
        maps = network.features(case.image_1CDHW)
        parts = [sample_features(m, level, points)[0][0] for m, level in zip(maps, network.levels, strict=True)]
    slow = torch.cat(parts, 1) @ torch.cat(probe.weights, 1).T + probe.bias_K
    fast = voxel_probe.scores(network, probe, case)
    where = points[0].long().unbind(1)
    assert torch.allclose(fast[:, *where].T, slow, atol=1e-4)


def test_a_class_that_is_in_no_case_is_refused(network: learn.Pyramid) -> None:
    with pytest.raises(ConfigError, match="no 3"):
        voxel_probe.fit(network, bright_cases(0), 4)


def test_every_method_has_a_row_and_lrc_one_for_each_base() -> None:
    rows = [arm.name for arm in arms.arms([], arms.FULL)]
    assert {re.split("[+:]", name)[0] for name in rows} == set(method_names())
    assert {"aligned", "aligned:restoration", "aligned:consistency"} <= set(rows)
    (part,) = arms.arms(["aligned:restoration"], arms.FULL)
    assert (part.method, part.settings["w_consistency"]) == ("aligned", 0.0)
    assert {"lrc+mocov2", "lrc+byol", "lrc+simclr"} <= set(rows)
    (arm,) = arms.arms(["aligned"], arms.FULL, {"crops": {"min_overlap": 0.5}, "ratio": 0.5})
    assert arm.settings["crops"]["size_DHW"] == arms.FULL.view_DHW
    assert (arm.settings["crops"]["min_overlap"], arm.settings["ratio"]) == (0.5, 0.5)
    for wrong in ("pgl+byol", "none_such", "aligned:nothing"):
        with pytest.raises(ConfigError, match="none_such|byol|nothing"):
            arms.arms([wrong], arms.FULL)
    with pytest.raises(ConfigError, match="did you mean 'ratio'"):
        arms.arms(["mae"], arms.FULL, {"rato": 0.5})


@pytest.mark.parametrize("norm", arms.NORMS)
def test_the_network_has_the_norms_that_were_asked_for(norm: str) -> None:
    kinds = {"instance": torch.nn.InstanceNorm3d, "batch": GlobalBatchNorm, "group": torch.nn.GroupNorm}
    found = {type(layer) for layer in learn.network(replace(TINY, norm=norm)).modules()}
    assert found & set(kinds.values()) == {kinds[norm]}


def test_without_learning_a_row_is_its_random_features(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the weights they start from are the same, and subjects, voxels and read-out too."""
    monkeypatch.setenv("TOMOSCALE_DATASETS", str(folder))
    result = learn.bench_learn(["mae", "lrc+byol"], TINY, say=lambda _line: None)
    random = result["runs"]["random"][0]["dice"]
    for name in ("mae", "lrc+byol"):
        (run,) = result["runs"][name]
        assert run["dice"] == pytest.approx(random, abs=1e-3)
        assert run["rank"] > 1
    assert 0 < np.mean(list(random.values())) < 1
    assert set(result["runs"]["lrc+byol"][0]["terms"]) == {"prediction", "region"}
    assert result["data"]["simulated"] is True
    assert len(result["data"]["scored"]) == len(random)
    assert "SIMULATED" in learn_rows.format_learn(result)
    # Seeds that were measured apart make one table.
    other = json.loads(json.dumps(result))
    for runs in other["runs"].values():
        runs[0]["seed"] = 1
    both = learn_rows.joined([result, other])
    assert {row["seeds"] for row in both["rows"]} == {2}
    assert [row["dice"] for row in both["rows"]] == pytest.approx([row["dice"] for row in result["rows"]])
    with pytest.raises(ConfigError, match="each once"):
        learn_rows.joined([result, result])
    other["settings"]["mae"]["ratio"] = 0.5
    with pytest.raises(ConfigError, match="settings"):
        learn_rows.joined([result, other])


def test_subjects_of_the_read_out_are_disjoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOMOSCALE_DATASETS", str(folder))
    seen = {}
    for part in ("val", "test"):
        with learn.dataset(TINY, part, lambda _line: None) as data:
            seen[part] = set(data.scored)
            train = {data.store.manifest.record(i).volume_id for i in data.store.manifest.select(split="train")}
            assert not seen[part] & train
    assert not seen["val"] & seen["test"]


def test_losses_are_compared_once_the_queue_is_full() -> None:
    values = [0.0] * 10 + [5.0, 4.0] + [3.0] * 7 + [1.0]
    assert learn._ends(values) == (0.0, 2.0)
    assert learn._ends(values, after=10) == (4.5, 2.0)
    assert learn._ends(values, after=99) == (2.0, 2.0)
    queues = {arm.name: arms.queue_of(arm) for arm in arms.arms(["mocov2", "lrc", "mae"], arms.FULL)}
    assert queues == {"mocov2": 128, "lrc+mocov2": 128, "lrc+byol": 0, "lrc+simclr": 0, "mae": 0}


def test_the_loss_on_fixed_views_is_that_of_the_weights_alone() -> None:
    """A queue's negatives are made by the same weights, nothing is learned, and no state is touched."""
    config = tiny_config("mocov2")
    plain = {"queue": 4, "norm": "none", "pool": "last"}
    method = tiny_method("mocov2", parse(type(config), config.model_dump() | plain))
    engine = Engine(method, parse(EngineConfig, {"steps": 10, "warmup_steps": 0, "precision": "fp64"}))
    spec = type(method).view_spec(method.config)
    views = [synthetic_views(spec, [2 * i, 2 * i + 1], torch.float64) for i in range(4)]
    kept = copy.deepcopy(method.state_dict())
    found = learn.on_fixed_views(engine, views, filling=2)
    assert found == learn.on_fixed_views(engine, views, filling=2)
    assert all(torch.equal(value, kept[name]) for name, value in method.state_dict().items())
    # By hand: the keys of the first two batches are the negatives of the others.
    twin = copy.deepcopy(method)
    keys, losses, first = [], [], []
    with torch.no_grad():
        for number, batch in enumerate(views):
            query, key = (
                functional.normalize(twin.projector(twin.backbone.features(v.image_BCDHW)[-1].mean((2, 3, 4))))
                for v in batch.roles["global"]
            )
            if number < 2:
                keys.append(key)
                continue
            positive, negative = (query * key).sum(1), query @ torch.cat(keys).T
            losses.append(
                functional.cross_entropy(torch.cat([positive[:, None], negative], 1) / 0.2, torch.zeros(2).long())
            )
            first.append((positive > negative.amax(1)).double().mean())
    assert found["loss"] == pytest.approx(torch.stack(losses).mean().item(), abs=1e-9)
    assert found["monitor/accuracy"] == pytest.approx(torch.stack(first).mean().item())


def runs(dice: float, loss: tuple[float, float], *, collapsed: bool = False, seeds: int = 5) -> list[learn_rows.Run]:
    """Trainings whose Dice differ a little by seed and by subject."""
    return [
        learn_rows.Run(
            seed,
            (1.0, 2.0),
            {},
            {"loss": loss},
            5.0,
            0.9,
            collapsed,
            {f"case{i}": dice + 0.001 * i * (seed + 1) * (dice > 0.5) for i in range(12)},
            1.0,
        )
        for seed in range(seeds)
    ]


def untrained(seeds: int = 5) -> list[learn_rows.Run]:
    return [replace(run, loss=None) for run in runs(0.5, (0.0, 0.0), seeds=seeds)]


FACTS = {"name": "x", "simulated": False, "pretrained_on": 1, "fitted": 1, "scored": ["a"], "part": "test"}


def test_verdicts_follow_the_figures() -> None:
    random = untrained()
    good = learn_rows.summary("good", runs(0.6, (2.0, 1.0)), random)
    assert (good["falls"], good["no_collapse"], good["beats_random"]) == (True, True, True)
    assert good["difference"] == pytest.approx(0.1165)
    bad = learn_rows.summary("bad", runs(0.4, (1.0, 1.1), collapsed=True), random)
    assert (bad["falls"], bad["no_collapse"], bad["beats_random"]) == (False, False, False)
    parts = {"good": runs(0.6, (2.0, 1.0)), "good:part": runs(0.5, (2.0, 1.0))}
    rows = [learn_rows.summary("random", random, random), good, bad]
    text = learn_rows.format_learn({"rows": rows, "ablations": learn_rows.ablations(parts), "data": FACTS})
    assert "bad: not a falling loss, not free of collapse, not better than random features." in text
    assert "good: not" not in text
    assert "In these 5 trainings of each start, good scored higher than good:part: +0.116 Dice" in text


def test_a_gain_that_trainings_do_not_share_is_no_gain_over_random_features() -> None:
    """Seeds that differ by more than the mean: over subjects alone, p would be below 1e-3."""
    random = untrained()
    shifts = (0.167, -0.006, -0.346, 0.3, 0.2)
    chance = [
        replace(run, dice={case: value + shift for case, value in run.dice.items()})
        for run, shift in zip(runs(0.501, (2.0, 1.0)), shifts, strict=True)
    ]
    row = learn_rows.summary("chance", chance, random)
    assert row["difference"] > 0.05
    assert row["low"] < 0 < row["high"]
    assert not row["beats_random"]
    assert row["p"] > 0.3


@pytest.mark.parametrize("seeds", [1, 4])
def test_few_trainings_say_nothing_of_random_features(seeds: int) -> None:
    random = untrained(seeds)
    row = learn_rows.summary("few", runs(0.6, (2.0, 1.0), seeds=seeds), random)
    assert row["beats_random"] is None
    assert (row["p"] is None) == (seeds == 1)
    text = learn_rows.format_learn({"rows": [row], "ablations": [], "data": FACTS})
    assert "Fewer than 5 trainings of a row cannot show that it beats random features." in text
    assert "Every row" not in text


def test_the_page_shows_what_was_measured() -> None:
    docs = Path(__file__).parents[4] / "docs"
    result, *others = (
        json.loads((docs / f"benchmarks/{name}.json").read_text(encoding="utf-8"))
        for name in ("learning", "learning-pcrlv2", "learning-padding")
    )
    page = (docs / "benchmarks-learning.md").read_text(encoding="utf-8")
    assert all(learn_rows.format_learn(one).partition("\n\n")[0] in page for one in (result, *others))
    again = learn_rows.joined([result])["rows"]
    assert [row["dice"] for row in again] == pytest.approx([row["dice"] for row in result["rows"]], abs=1e-5)
    assert {re.split("[+:]", row["method"])[0] for row in again} <= {"random", *method_names()}


def test_the_verb_writes_what_it_prints(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TOMOSCALE_DATASETS", str(folder))
    monkeypatch.setattr(arms, "QUICK", TINY)
    out = tmp_path / "learn.json"
    asked = ["bench", "learn", "--quick", "--methods", "aligned", "--part", "val", "--first-seed", "7"]
    asked += ["--out", str(out)]
    assert cli.main([*asked, "--json", "crops.intensity=none", "ratio=0.5"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text())
    assert printed["data"]["part"] == "val"
    assert printed["settings"]["aligned"]["ratio"] == 0.5
    assert [r["seed"] for r in printed["runs"]["aligned"]] == [7]
    assert cli.main([*asked, "rato=0.5"]) == 2
    assert "did you mean 'ratio'" in capsys.readouterr().err
