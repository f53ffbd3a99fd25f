"""Population based training: who takes over whom, and that neither order nor deaths change it."""

import dataclasses
import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import PopulationBasedTraining, pbt

from jobs.configs.population import PopulationConfig
from jobs.configs.search import TuneConfig
from jobs.configs.space import Dimension
from jobs.tune import population
from jobs.tune.outcome import searched as outcome
from jobs.tune.state import Search
from jobs.tune.suggest import Suggestions
from ssl_core.downstream.search import SearchResult, Trial, lineage, trained_with
from storage.errors import ConfigError
from tests.kit.searches import EPOCHS, play, rates, score, search_config, searched

LR = Dimension("finetune.lr", "loguniform", 1e-5, 5e-2)
SCALE = Dimension("finetune.encoder_lr_scale", "choice", values=(0.1, 0.3, 1.0))
SPACE = {"finetune.lr": {"loguniform": [1e-5, 5e-2]}}


def config(**changes: Any) -> TuneConfig:
    return search_config(
        **{"scheduler": "pbt", "space": SPACE, "trials": 9, "population": {"interval": 2}}
        | {"finetune": {"epochs": 8}}
        | changes
    )


@pytest.mark.parametrize(("members", "quantile"), [(2, 0.25), (3, 0.5), (7, 0.25), (8, 0.25), (9, 0.4), (1, 0.5)])
def test_the_worst_and_the_best_are_those_of_ray(members: int, quantile: float) -> None:
    values = random.Random(members)
    scores = {number: values.random() for number in range(members)}
    scheduler = PopulationBasedTraining(
        time_attr="epoch", metric="dice", mode="max", hyperparam_mutations={"lr": [1, 2]}, quantile_fraction=quantile
    )
    for number, value in scores.items():
        trial: Any = type("T", (), {"number": number, "is_finished": lambda self: False})()
        scheduler._trial_state[trial] = SimpleNamespace(last_score=value)  # type: ignore[assignment]
    low, high = scheduler._quantiles()
    assert population.worst_and_best(scores, quantile) == ([t.number for t in low], [t.number for t in high])


@pytest.mark.parametrize("resample", [0.0, 0.4, 1.0])
def test_settings_change_as_rays_do(resample: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's function with the same draws; where a number would leave its range, ours stays at the end."""
    own = PopulationConfig(resample=resample, factors=(0.5, 1.2, 3.0))
    explore = population.perturbed((LR, SCALE), own)
    for seed in range(60):
        settings = {"finetune.lr": 10 ** -(1.4 + seed / 20), "finetune.encoder_lr_scale": 0.3, "finetune.batch": 4}
        draws = random.Random(seed)
        monkeypatch.setattr(pbt, "random", draws)
        mutations = {
            LR.path: lambda: population.drawn(LR, draws.random()),  # noqa: B023  called at once
            SCALE.path: list(SCALE.values),
        }
        theirs, _ = pbt._explore(settings, mutations, resample, own.factors, None)
        theirs[LR.path] = min(max(theirs[LR.path], LR.low), LR.high)
        assert explore(population.Standing(0, 0.5, settings), random.Random(seed)) == theirs


def test_numbers_that_are_drawn_again_are_spread_as_the_space_says() -> None:
    shares = [(i + 0.5) / 1000 for i in range(1000)]
    logs = [math.log(population.drawn(LR, share)) for share in shares]
    assert sum(logs) / 1000 == pytest.approx((math.log(LR.low) + math.log(LR.high)) / 2)
    steps = Dimension("finetune.class_balance", "quniform", 0.1, 0.9, 0.2)
    values = [round(population.drawn(steps, share), 6) for share in shares]
    assert {value: values.count(value) for value in values} == dict.fromkeys((0.1, 0.3, 0.5, 0.7, 0.9), 200)


def test_a_setting_in_steps_moves_by_one_at_least_and_stays_inside() -> None:
    steps = Dimension("finetune.class_balance", "quniform", 0.1, 0.9, 0.2)
    for factor, expected in ((1.2, [0.3, 0.5, 0.7, 0.9, 0.9]), (0.8, [0.1, 0.1, 0.3, 0.5, 0.7])):
        explore = population.perturbed((steps,), PopulationConfig(resample=0, factors=(factor,)))
        moved = [
            explore(population.Standing(0, 0.5, {steps.path: 0.1 + 0.2 * i}), random.Random(0))[steps.path]
            for i in range(5)
        ]
        assert moved == pytest.approx(expected)


@dataclasses.dataclass
class Member:
    """Of the reference: a member's weights are the rates that they were trained with."""

    rate: float
    weights: tuple[float, ...] = ()

    @property
    def dice(self) -> float:
        gains = [score({"finetune.lr": r}, e) - score({"finetune.lr": r}, e - 1) for e, r in enumerate(self.weights, 1)]
        return sum(gains)


def reference(own: TuneConfig, starts: list[float]) -> list[Member]:
    """The same training with nothing but a list of members that copy weights: step, sort, copy, change."""
    members = [Member(rate) for rate in starts]
    settings = own.population
    for epoch in range(1, own.finetune.epochs + 1):
        for member in members:
            member.weights += (member.rate,)
        if epoch % settings.interval or epoch == own.finetune.epochs:
            continue
        count = math.ceil(len(members) * settings.quantile)
        order = sorted(range(len(members)), key=lambda n: (members[n].dice, -n))
        for number in order[:count]:
            draws = population.draws_of(own.seed, number, epoch)
            source = members[draws.choice(order[-count:])]
            if draws.random() < settings.resample:
                rate = 1e-5 * (5e-2 / 1e-5) ** draws.random()
            else:
                rate = source.rate * draws.choice(settings.factors)
            members[number] = Member(min(max(rate, 1e-5), 5e-2), source.weights)
    return members


def weights_of(search: Search) -> list[tuple[float, ...]]:
    return [rates(search.settings_of(entry), search.epochs) for entry in search.entries]


@pytest.mark.parametrize("seed", range(4))
def test_decisions_are_those_of_a_reference_that_copies_weights(seed: int) -> None:
    own = config(seed=seed, population={"interval": 2, "quantile": 0.34, "resample": 0.3})
    search = searched(own, seed, concurrent=1 + 2 * seed)
    expected = reference(own, [entry.settings["finetune.lr"] for entry in search.entries])
    assert weights_of(search) == [member.weights for member in expected]
    assert [entry.scores[-1] for entry in search.entries] == pytest.approx([member.dice for member in expected])
    assert sum(len(entry.takeovers) for entry in search.entries) == 3 * math.ceil(9 * 0.34)


def test_a_member_that_fails_leaves_the_population() -> None:
    own = config(trials=4, population={"interval": 2, "quantile": 0.5})
    doomed = max((Suggestions(own)(n, 0, ())["finetune.lr"] for n in range(4)), key=lambda lr: score({LR.path: lr}, 2))

    def fails(settings: dict[str, Any], epoch: int) -> float:
        if epoch == 3 and set(rates(settings, 3)) == {doomed}:
            raise ArithmeticError("a loss of nan")
        return score(settings, epoch)

    search = Search(own, 4, Suggestions(own))
    play(search, 0, score_of=fails)
    (failed,) = [entry for entry in search.entries if entry.error]
    takeovers = [t for entry in search.entries for t in entry.takeovers]
    assert failed.number in {t.source for t in takeovers if t.epoch == 2}, "its weights of before are as good as any"
    assert failed.number not in {t.source for t in takeovers if t.epoch > 2}
    assert [len(entry.scores) for entry in search.entries if entry is not failed] == [8, 8, 8]


def test_each_start_is_a_population_of_its_own() -> None:
    own = config(compare_scratch=True, encoders=["models:/e/1", "none"], trials=5)
    search = searched(own)
    takeovers = [(e, t) for e in search.entries for t in e.takeovers]
    assert takeovers
    assert all(search.entries[t.source].arm == e.arm for e, t in takeovers)
    assert all(t.settings["encoder"] == e.settings["encoder"] for e, t in takeovers)


def test_what_is_taken_over_is_spent_by_who_trained_it() -> None:
    """A member's seconds go on where they were, whatever the clock of the weights that it takes over says."""
    own = config(trials=2, population={"interval": 4, "quantile": 0.5}, space=SPACE)
    search = Search(own, 2, Suggestions(own))
    for number, pace in ((0, 10.0), (1, 30.0)):
        assert search.next() is not None
        for epoch in range(1, 5):
            search.reported(number, epoch, {}, 0.1 * number + 0.01 * epoch, pace * epoch)
    taker, source = search.entries
    assert [t.source for t in taker.takeovers] == [1]
    assert search.source_of(taker) is source
    assert search.source_of(source) is source
    assert search.next() is taker
    for epoch in range(1, 5):  # of the state that it goes on from
        assert search.reported(0, epoch, {}, 0.1 + 0.01 * epoch, 30.0 * epoch, again=True)
    assert (taker.epochs_spent, taker.seconds_spent, taker.scores[3]) == (4, 40.0, pytest.approx(0.04))
    search.reported(0, 5, {}, 0.2, 127.0)
    assert (taker.epochs_spent, taker.seconds_spent, taker.seconds) == (5, 47.0, 47.0)


def test_the_best_is_a_schedule_that_names_whose_weights_it_had() -> None:
    own = config(seed=3, population={"interval": 2, "quantile": 0.5})
    trials = searched(own).trials()
    result = outcome(own, trials, run_id="r", seconds=1.0)
    again = SearchResult.from_json(result.to_json())
    assert again == result
    number = next(t.trial for t in trials if t.takeovers)
    stretches = lineage(trials, number, 8)
    assert stretches[0].first == 1
    assert stretches[-1].trial == number
    taken = trials[number].takeovers[-1]
    assert stretches[-2].trial in {taken.source, *(t.source for t in trials[taken.source].takeovers)}
    settings = trained_with(trials, number, 8)
    assert settings["finetune.lr"] == trials[stretches[0].trial].settings["finetune.lr"]
    assert [c["epoch"] for c in settings["finetune.schedule"]] == [s.first for s in stretches[1:]]
    assert all(set(change["settings"]) == {"lr"} for change in settings["finetune.schedule"])


def test_results_of_before_populations_are_read() -> None:
    trial = Trial(0, {"encoder": "none"}, (0.5,), False, None)
    data = trial.to_json()
    del data["takeovers"]
    assert Trial.from_json(data) == trial


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"algorithm": "tpe"}, "algorithm random"),
        ({"algorithm": "grid", "space": {"finetune.lr": {"grid": [1e-3, 1e-4]}}, "trials": 2}, "algorithm random"),
        ({"trials": 1}, "trials to be 2 or more"),
        ({"population": {"interval": 3}}, "interval .3. to divide finetune.epochs .8."),
        ({"population": {"interval": 8}}, "into two parts or more"),
        ({"grace_epochs": 2}, "no grace_epochs"),
        ({"reduction": 3}, "no reduction"),
        ({"finetune": {"epochs": 8, "patience": 2}}, "no finetune.patience"),
        ({"space": SPACE | {"finetune.patience": {"choice": [1, 2]}}}, "no finetune.patience in the space"),
        ({"objectives": ["dice", "seconds"]}, "scheduler none with two objectives"),
        ({"population": {"factors": [1.0]}}, "not only 1"),
        ({"population": {"change": ["finetune.clip"]}}, "no key of `space`"),
        (
            {"space": SPACE | {"finetune.batch": {"choice": [1, 2]}}, "population": {"change": ["finetune.batch"]}},
            "a training that runs cannot change it",
        ),
        ({"space": {"finetune.batch": {"choice": [1, 2]}}}, "finetune.batch: a training that runs cannot change"),
        (
            {"space": SPACE | {"finetune.encoder_lr_scale": {"choice": [0.0, 1.0]}}}
            | {"population": {"change": ["finetune.encoder_lr_scale"]}},
            "0 freezes the encoder",
        ),
        ({"scheduler": "asha", "population": {"quantile": 0.5}}, "scheduler pbt or pb2 with population"),
        (
            {
                "scheduler": "asha",
                "population": {},
                "finetune": {"epochs": 8, "schedule": [{"epoch": 2, "settings": {"lr": 1e-3}}]},
            },
            "no fin",
        ),
    ],
)
def test_what_a_population_cannot_do_is_refused_before_it_begins(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config(**changes)


def test_settings_that_a_running_training_cannot_change_come_with_the_weights() -> None:
    own = config(space=SPACE | {"finetune.batch": {"choice": [2, 4]}}, trials=6)
    assert [dim.path for dim in own.changing] == ["finetune.lr"]
    search = searched(own)
    for entry in search.entries:
        stretches = lineage(search.entries, entry.number, EPOCHS)
        assert len({stretch.settings["finetune.batch"] for stretch in stretches}) == 1
