"""What a configuration of heads may say, what is refused before anything is sent, and what jobs of before keep."""

from pathlib import Path
from typing import Any

import pytest

from jobs.configs import FinetuneJobConfig, LabelledConfig
from jobs.configs.search import TuneConfig
from jobs.configs.study import StudyConfig
from jobs.labelled import draw, target, target_notes
from jobs.plan.starts import require_starts
from ssl_core.config import digest, load, parse
from ssl_core.downstream.settings import FinetuneConfig
from storage.errors import ConfigError, RefusedInput, TomoscaleError
from tests.kit import ROOT
from tests.kit.cohorts import write_cohort
from tests.kit.small_models import encoder_bundle

URL = "memory://heads-configuration"
EXAMPLES = ROOT / "examples" / "configs"


def job(finetune: dict[str, Any] | None = None, **labelled: Any) -> dict[str, Any]:
    own = {"data": URL, "column": "large", "subjects": 8, "inner": 2} | labelled
    settings = {"task": "classification", "patch_DHW": [16, 16, 16]} | (finetune or {})
    return {"name": "n", "starts": {"a": "models:/e/1"}, "labelled": own, "finetune": settings}


def test_settings_of_heads_are_not_in_the_digest_of_a_segmentation() -> None:
    """What version 0.1.0 began is gone on from, once it says that it takes the encoder alone, as was then the default.

    The numbers are those of before there were heads.
    """
    sizes: dict[str, Any] = {"epochs": 3, "steps_per_epoch": 3, "batch": 2, "patch_DHW": (16, 16, 16)}
    small = FinetuneConfig(**sizes, warmup_steps=2, transfer="encoder")
    assert digest(small) == "454ed460d2a58591"
    example = load(
        FinetuneJobConfig,
        EXAMPLES / "finetune.yaml",
        ["finetune.transfer=encoder", "starts.pre-trained=models:/pgl-simulated-encoder@candidate"],
    )
    assert digest(example) == "380c63636c301da7"
    heads = FinetuneConfig(task="classification")
    assert digest(heads) != digest(FinetuneConfig())
    assert digest(FinetuneConfig(task="classification", head={"frozen": True})) != digest(heads)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"finetune": {"task": "segmentation"}}, "labelled.column with finetune.task classification or regression"),
        ({"column": None}, "labelled.column with finetune.task classification or regression"),
        ({"label": "liver"}, "label .'liver'. or column .'large'., not both"),
        ({"finetune": {"deep_supervision": 2}}, "no deep_supervision with task=classification"),
        ({"finetune": {"transfer": "encoder_decoder"}}, "no transfer with task=classification"),
        ({"finetune": {"inference": {"mirror": ["D"]}}}, "no inference with task=classification"),
        ({"finetune": {"head": {"loss": "mse"}}}, "no head.loss with task=classification"),
        ({"finetune": {"task": "regression", "head": {"class_weights": "balanced"}}}, "no head.class_weights"),
        ({"finetune": {"head": {"frozen": True}, "geometry": "nnunet"}}, "no geometry with head.frozen"),
        ({"finetune": {"head": {"frozen": True}, "encoder_lr_scale": 0.1}}, "no encoder_lr_scale with head.frozen"),
        ({"finetune": {"task": "segmentation", "head": {"levels": 2}}}, "no head with task=segmentation"),
    ],
)
def test_settings_without_an_effect_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(FinetuneJobConfig, job(**changes))
    parse(FinetuneJobConfig, job())


def test_a_search_and_a_study_say_that_they_compare_segmenters_only() -> None:
    only = "a search compares segmenters only"
    for override in ("finetune.task=classification", "labelled.column=age"):
        with pytest.raises(ConfigError, match=only):
            load(TuneConfig, EXAMPLES / "tune.yaml", ["labelled.label=label", override])
    with pytest.raises(ConfigError, match=f"finetune.head.frozen.*{only}"):
        load(TuneConfig, EXAMPLES / "tune.yaml", ["space={finetune.head.frozen: {choice: [true, false]}}"])
    with pytest.raises(ConfigError, match="a study compares segmenters only"):
        load(StudyConfig, EXAMPLES / "study_hippocampus.yaml", ["finetune.task=regression"])


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    write_cohort(URL, 24, {0: {"large": "", "size": "large"}, 5: {"large": "n/a"}, 8: {"size": ""}})
    return encoder_bundle(tmp_path_factory.mktemp("start") / "encoder")


def planned(encoder: Path, settings: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    require_starts(parse(FinetuneJobConfig, settings | {"starts": {"own": str(encoder)}}), lines.append)
    return lines


def refused(encoder: Path, settings: dict[str, Any], kind: type[TomoscaleError], *parts: str) -> None:
    with pytest.raises(kind) as raised:
        planned(encoder, settings)
    assert all(part in str(raised.value) for part in parts), raised.value


def test_volumes_without_a_value_are_left_out_and_named_before_anything_is_sent(encoder: Path) -> None:
    assert planned(encoder, job()) == [
        "1 volume of the train split without a value in column 'large', left out: v000",
        "1 volume of the test split without a value in column 'large', left out: v005",
    ]


def test_a_column_that_cannot_be_learned_is_refused_before_anything_is_sent(encoder: Path) -> None:
    number = {"task": "regression"}
    refused(encoder, job(number, column="size"), ConfigError, "labelled.column 'size'", "'large' of v000")
    columns = "its columns are 'large', 'size'"
    refused(encoder, job(column="age"), RefusedInput, "a value in column 'age' in the train split", columns)
    refused(encoder, job({"head": {"levels": 4}}), ConfigError, "finetune.head.levels", "at most 3")
    refused(
        encoder, job(subjects=16), RefusedInput, "16 with a value in column 'large'", "(by split: test 7, train 15)"
    )


def test_several_draws_are_looked_at_each(encoder: Path) -> None:
    """Of a segmentation too, which was refused here as if one seed were meant."""
    assert len(planned(encoder, job(subjects_seed=[0, 1, 2]))) == 2
    twins = job(subjects_seed=[0, 1], subjects=15, inner=0)
    refused(encoder, twins, ConfigError, "labelled.subjects_seed", "draws of different training subjects")


def test_a_class_that_a_draw_lacks_is_said_with_the_draw(encoder: Path) -> None:
    few = job(subjects=3, inner=2, subjects_seed=[0, 1, 2])["labelled"]
    manifest = write_cohort("memory://heads-draws", 24)
    labelled = parse(LabelledConfig, few | {"data": "memory://heads-draws"})
    lines = target_notes(manifest, labelled, "classification")
    assert len(lines) == 3, "of each draw, which has one training subject"
    assert all("is of no training volume: nothing of it is learned (draw " in line for line in lines)
    with_one = labelled.of_draw(0)
    learned = target(manifest, with_one, "classification", draw(manifest, with_one).train)
    assert learned.classes == ("no", "yes"), "whatever a draw shows"
