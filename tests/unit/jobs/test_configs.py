"""Configurations: closed to unknown keys, with a hint; stable digests; checked before anything is sent."""

from pathlib import Path
from typing import Any

import pytest

from jobs.cli import main as cli
from jobs.configs import FinetuneJobConfig, IngestConfig, PretrainConfig, TuneConfig
from jobs.demo import presets
from ssl_core.config import Config, digest, dump_yaml, load, parse, resolved
from storage.errors import ConfigError


def plan(**changes: Any) -> dict[str, Any]:
    return {"name": "n", "data": "memory://x", **changes}


@pytest.mark.parametrize(
    ("data", "hint"),
    [
        (plan(metod={"name": "pgl"}), "did you mean 'method'"),
        (plan(engine={"stepz": 3}), "did you mean 'steps'"),
        (plan(steps=3), "did you mean 'engine.steps'"),
        (plan(engine={"steps": "many"}), "engine.steps; expected a valid integer; found 'many'"),
        (plan(method={"name": "pgl", "hiden": 3}), "did you mean 'hidden'"),
        (plan(method={"name": "pgk"}), "one of"),
        (plan(method={}), "the name of a method"),
        (plan(engine={"lr": "fast"}), "lr"),
        (plan(stream={"global_batch": 9}), "multiples of cluster.workers"),
        (plan(name="../x"), "name"),
        (plan(backbone={"name": "unett"}), "backbone.name; expected one of basic_unet, dynunet"),
        (plan(cluster={"workers": 2, "min_workers": 3}), "min_workers (3) to be at most workers (2)"),
        (plan(model="team:encoder"), "model; expected a name without any of"),
        ({"data": "x"}, "name"),
    ],
)
def test_an_unknown_or_wrong_key_is_refused_with_its_name(data: dict[str, Any], hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(PretrainConfig, data)
    assert hint in str(caught.value)
    assert caught.value.exit_code == 2


def test_overrides_replace_single_settings_and_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("name: n\ndata: memory://x\n")
    found = load(PretrainConfig, path, ["engine.steps=77", "method.name=simclr", "cluster.gpu=true"])
    assert (found.engine.steps, found.method_name, found.cluster.gpu) == (77, "simclr", True)
    for bad in ("engine.stepz=1", "engine", "name.x=1", "engine.steps=[", "=3"):
        with pytest.raises(ConfigError):
            load(PretrainConfig, path, [bad])


@pytest.mark.parametrize("text", ["- a", "{", "\x00", None])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        load(PretrainConfig, path)


def test_presets_are_valid_and_resolved_forms_come_back_equal() -> None:
    best = {"lr": 1e-3, "encoder_lr_scale": 0.3}
    for kind, data in (
        (PretrainConfig, presets.pretrain("a", "memory://x", "memory://r")),
        (TuneConfig, presets.tune("a", "memory://x", "label", "memory://r", "models:/e@candidate")),
        (FinetuneJobConfig, presets.finetune("a", "memory://x", "label", "memory://r", "models:/e@candidate", best)),
    ):
        config = parse(kind, data)
        again = parse(kind, resolved(config))
        assert again == config
        assert digest(again) == digest(config)


def test_the_digest_changes_with_a_setting() -> None:
    one, two = parse(PretrainConfig, plan()), parse(PretrainConfig, plan(engine={"seed": 1}))
    assert digest(one) != digest(two)
    assert "seed: 1" in dump_yaml(two)


def test_the_command_line_checks_before_it_sends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("name: n\ndata: memory://x\nmetod: {}\n")
    assert cli.main(["pretrain", str(path), "--dry-run"]) == 2
    assert "did you mean 'method'" in capsys.readouterr().err
    path.write_text("name: n\ndata: memory://x\n")
    assert cli.main(["pretrain", str(path), "--dry-run", "engine.steps=60"]) == 0
    assert "steps: 60" in capsys.readouterr().out


def test_a_method_page_lists_every_setting_with_its_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["methods"]) == 0
    assert "pgl" in capsys.readouterr().out
    assert cli.main(["methods", "pgl"]) == 0
    page = capsys.readouterr().out
    assert "feature_level" in page
    assert "our choice" in page
    assert cli.main(["methods", "nope"]) == 2


LABELLED = {"data": "memory://x"}


@pytest.mark.parametrize(
    ("kind", "data", "hint"),
    [
        (TuneConfig, {"encoders": ["models:/e@candidate"], "space": {"lr": [0.1, 0.01]}}, "the lower first"),
        (TuneConfig, {"encoders": ["models:/e@candidate"], "space": {"lr": [0, 0.01]}}, "above 0"),
        (TuneConfig, {"encoders": ["models:/e@candidate"], "space": {"encoder_lr_scale": []}}, "at least one choice"),
        (TuneConfig, {"encoders": []}, "at least one model URI"),
        (TuneConfig, {"encoders": ["models:/e@candidate"], "grace_epochs": 11}, "at most finetune.epochs"),
        (TuneConfig, {"encoders": ["models:/e@candidate"], "finetune": {"lr": 0.1}}, "draws from space.lr"),
        (FinetuneJobConfig, {"starts": {"a": "models:/e@candidate"}, "model": "a/b"}, "without any of"),
        (FinetuneJobConfig, {"starts": {"a": "models:/e@candidate"}, "seeds": [0, 0]}, "several different ones"),
        (FinetuneJobConfig, {"starts": {"a": "models:/e@candidate"}, "seeds": []}, "one seed"),
        (FinetuneJobConfig, {"starts": {"a": "models:/e@candidate"}, "seeds": [-1]}, "from 0 on"),
        (TuneConfig, {"encoders": ["models:/e@candidate"], "seed": 2**32}, "less than 4294967296"),
    ],
)
def test_what_would_fail_in_the_middle_of_a_job_is_refused_before(
    kind: type[TuneConfig] | type[FinetuneJobConfig], data: dict[str, Any], hint: str
) -> None:
    with pytest.raises(ConfigError, match=hint):
        parse(kind, {"name": "n", "labelled": LABELLED, **data})


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (PretrainConfig, {"data": "https://me:hush-hush@host/store"}),
        (PretrainConfig, {"data": "memory://x", "runs": "s3://KEY:hush-hush@bucket"}),
        (TuneConfig, {"encoders": ["models:/e@candidate"], "labelled": {"data": "s3://KEY:hush-hush@b"}}),
        (IngestConfig, {"source": "simulated", "data": "s3://KEY:hush-hush@b"}),
        (PretrainConfig, {"data": "memory://x", "source": "s3://KEY:hush-hush@b"}),
    ],
)
def test_a_password_in_a_url_is_refused_and_not_repeated(kind: type[Config], data: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="without credentials") as caught:
        parse(kind, {"name": "n", **data})
    assert "hush" not in str(caught.value)
