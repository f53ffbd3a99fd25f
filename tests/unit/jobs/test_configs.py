"""Configurations: closed to unknown keys, with a hint; stable digests; checked before anything is sent."""

import inspect
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import ssl_core.config as config_module
from jobs.cli import main as cli
from jobs.configs import FinetuneJobConfig, PretrainConfig, registrable
from jobs.configs.search import TuneConfig
from jobs.demo import presets
from jobs.ingest_config import IngestConfig
from ssl_core.config import Config, digest, dump_yaml, load, parse, resolved
from ssl_core.networks import registry
from storage.errors import ConfigError
from tests.kit import pretraining


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
        (plan(data=""), "the place of a store"),
        (plan(data="s3://b/a/../c"), "without empty parts"),
        (plan(intensity={"kind": "ct", "low": 300, "high": -300}), "intensity; expected low (300) below high (-300)"),
        (plan(intensity={"kind": "ct", "std": 0}), "intensity; expected std (0)"),
        (plan(intensity={"kind": "ct", "std": -5}), "intensity; expected std (-5)"),
        (plan(intensity={"kind": "ct", "mean": 1e9}), "intensity; expected mean"),
        (plan(intensity={"kind": "ct", "high": 1e30}), "intensity; expected low"),
        (plan(intensity={"kind": "ct", "low": float("nan")}), "intensity.low; expected a finite number; found nan"),
        (plan(intensity={"kind": "ct", "std": "inf"}), "intensity.std; expected a finite number"),
        (plan(engine={"lr": float("inf")}), "engine.lr; expected a finite number; found inf"),
        (plan(engine={"lr": "nan"}), "engine.lr"),
        (plan(engine={"betas": [0.9, float("nan")]}), "engine.betas.1; expected a finite number"),
        (plan(engine={"betas": [0.9, 1.5]}), "betas from 0 to below 1"),
        (plan(engine={"steps": True, "warmup_steps": 0}), "engine.steps; expected no true or false here; found true"),
        (plan(engine={"final_weight_decay": False}), "engine.final_weight_decay; expected no true or false"),
        (plan(engine={"betas": [True, 0.9]}), "engine.betas.0; expected no true or false"),
        (plan(engine={"seed": 2**70}), "engine.seed"),
        (plan(method={"name": "pgl", "hidden": True}), "method pgl: hidden; expected no true or false"),
        (plan(method={"name": "pgl", "crops": {"size_DHW": [0, 32, 32]}}), "crops.size_DHW; expected edges from 1"),
        (plan(method={"name": "pgl", "crops": {"size_DHW": [-8, 32, 32]}}), "crops.size_DHW; expected edges from 1"),
        (plan(method={"name": "pgl", "crops": {"size_DHW": [4000, 4000, 4000]}}), "crops.size_DHW; expected edges"),
        (plan(method={"name": "pgl", "crops": {"flip": [0.5, 0.5, 1.5]}}), "three probabilities"),
        (plan(method={"name": "pgl", "crops": {"scale": [1.2, 0.8]}}), "the lower first"),
        (plan(method={"name": "pgl", "crops": {"flip": [0, 0, float("nan")]}}), "crops.flip.2; expected a finite"),
        (plan(backbone={"arguments": {"featurs": [8] * 6}}), "did you mean 'features'?"),
        (plan(backbone={"name": "unet", "arguments": {"features": [8] * 6}}), "backbone.arguments.features"),
        (plan(backbone={"arguments": {"features": []}}), "backbone.arguments.features; expected whole numbers"),
        (plan(backbone={"arguments": {"features": [8, 8, 0, 8, 8, 8]}}), "backbone.arguments.features"),
        (plan(backbone={"arguments": {"in_channels": -1}}), "backbone.arguments.in_channels"),
        (plan(backbone={"arguments": {"in_channels": True}}), "backbone.arguments.in_channels"),
        (plan(backbone={"arguments": {"dropout": float("nan")}}), "backbone.arguments.dropout; expected a finite"),
        (plan(backbone={"arguments": {"spatial_dims": 4}}), "backbone.arguments.spatial_dims"),
        (plan(stream={"threads": 10**9}), "stream.threads"),
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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "engine: {lr: 0.01, steps: 50}\nstream: {global_batch: 4}\nengine: {steps: 70}\n",
            "'engine' twice, on lines 3",
        ),
        ("engine:\n  lr: 0.01\n  lr: 0.5\n", "key 'lr' twice, on lines 4 and 5"),
        ("engine: {lr: 0.01, 'lr': 0.5}\n", "key 'lr' twice, on lines 3 and 3"),
        ("data: memory://y\n", "key 'data' twice, on lines 2 and 3"),
        ("method: {name: pgl, crops: {flip: [0, 0, 0], flip: [1, 1, 1]}}\n", "key 'flip' twice"),
        ("engine: {steps: 1:30}\n", "engine.steps; expected a valid integer; found '1:30'"),
        ("engine: {lr: .inf}\n", "engine.lr; expected a finite number"),
        ("intensity: {kind: ct, low: .nan}\n", "intensity.low; expected a finite number"),
        ("backbone: {arguments: {dropout: .NaN}}\n", "backbone.arguments.dropout; expected a finite number"),
    ],
)
def test_what_yaml_drops_or_takes_for_another_number_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("name: n\ndata: memory://x\n" + text)
    assert cli.main(["plan", "pretrain", str(path)]) == 2
    with pytest.raises(ConfigError) as caught:
        load(PretrainConfig, path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_an_override_names_a_key_once() -> None:
    with pytest.raises(ConfigError, match="key 'lr' twice"):
        load(PretrainConfig, plan(), ["engine={lr: 1, lr: 2}"])


def test_numbers_are_read_as_people_mean_them(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "name: n\ndata: memory://x\nengine: &e {lr: 1e-3, final_lr: 2.5E-4, steps: 1_000, clip: .5, seed: 010}\n"
        "method: {name: pgl, w_global: 3}\nbackbone: {arguments: {dropout: 1e-1}}\n"
    )
    config = load(PretrainConfig, path)
    assert (config.engine.lr, config.engine.final_lr, config.engine.steps) == (1e-3, 2.5e-4, 1000)
    assert (config.engine.clip, config.engine.seed) == (0.5, 10)
    assert config.backbone.arguments == {"dropout": 0.1}
    path.write_text("name: n\ndata: memory://x\nbase: &b {lr: 1}\nengine: {<<: *b, lr: 2}\n")
    with pytest.raises(ConfigError, match="unknown key 'base'"):
        load(PretrainConfig, path)


def test_known_arguments_of_a_backbone_are_those_of_its_class() -> None:
    nnunet = "dynamic_network_architectures"
    packages = {"swin_unetr": "einops", "plain_unet": nnunet, "resenc": nnunet}
    for name, arguments in registry._ARGUMENTS.items():
        if name in packages:
            pytest.importorskip(packages[name])
        stock = type(registry.build(name).net)
        expected = {p for p in inspect.signature(stock.__init__).parameters if p != "self"}
        if packages.get(name) == nnunet:
            expected = expected - {"input_channels", "num_classes"} | ({"preset"} if name == "resenc" else set())
        assert set(arguments) == expected | {"spatial_dims", "in_channels", "out_channels"}, name
    every = {key for arguments in registry._ARGUMENTS.values() for key in arguments}
    assert every >= registry._COUNTS | registry._SHARES | registry._WHOLE | registry._FLAGS


@pytest.mark.parametrize("name", ["pgl-v1.2", "a.b"])
def test_a_job_whose_model_could_not_be_registered_is_refused_before_it_runs(name: str, tmp_path: Path) -> None:
    labelled = {"starts": {"a": "models:/e@candidate"}, "labelled": LABELLED}
    for kind, data in ((PretrainConfig, {"data": "memory://x"}), (FinetuneJobConfig, labelled)):
        with pytest.raises(ConfigError, match="set `model`"):
            parse(kind, {"name": name, **data})
        with pytest.raises(ConfigError, match="model; expected a name"):
            parse(kind, {"name": "n", "model": name, **data})
        assert parse(kind, {"name": name, "model": "encoder", **data}).model == "encoder"
    path = tmp_path / "c.yaml"
    path.write_text(f"name: {name}\ndata: memory://x\n")
    assert cli.main(["plan", "pretrain", str(path)]) == 2


def test_names_of_models_are_those_that_mlflow_takes() -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.utils.validation import _validate_logged_model_name, _validate_model_name

    for name in [f"a{chr(code)}b" for code in range(1, 0x180)] + ["", " ", ".", "..", "a/../b", "a%20b", "encoder.v2"]:
        try:
            _validate_logged_model_name(name)
            _validate_model_name(name)
        except MlflowException:
            assert not registrable(name), name
    assert registrable("pgl-2024_small encoder")


def test_presets_are_valid_and_resolved_forms_come_back_equal() -> None:
    best = {"encoder": "models:/e/1", "finetune.lr": 1e-3, "finetune.encoder_lr_scale": 0.3}
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
    path.write_text(dump_yaml(pretraining.config("memory://x", "simclr")))
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
        (PretrainConfig, {"data": "https://host/store?X-Amz-Signature=hush-hush"}),
        (PretrainConfig, {"data": "memory://x", "runs": "s3://b/r?versionId=1&x-amz-security-token=hush-hush"}),
        (PretrainConfig, {"data": "abfs://c/store?sv=2024&sig=hush-hush"}),
        (TuneConfig, {"encoders": ["https://host/e?AWSAccessKeyId=A&Signature=hush-hush"]}),
        (FinetuneJobConfig, {"starts": {"e": "https://host/e?access_token=hush-hush"}}),
    ],
)
def test_a_password_in_a_url_is_refused_and_not_repeated(kind: type[Config], data: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="without credentials") as caught:
        parse(kind, {"name": "n", **data})
    assert "hush" not in str(caught.value)


NESTED_ALIASES = "a: &a [1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 8)}]\n" for before, name in pairwise("abcdefgh")
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("engine: {steps: !!int 1:30}\n", "'1:30' tagged as a number"),
        ("engine: {lr: !!float 1:30}\n", "'1:30' tagged as a number"),
        ("engine: {steps: !!int 010}\n", "'010' tagged as a number"),
        ("engine: {<<: {steps: 70}, <<: {steps: 80}}\n", "key '<<' twice"),
        ("engine: {<<: {steps: 70, steps: 90}}\n", "key 'steps' twice"),
        ("method: &m {name: pgl, crops: *m}\n", "an alias of the value that it lies in"),
        (NESTED_ALIASES, "with all aliases written out"),
        ("engine: " + "[" * 3000 + "\n", "expected a YAML mapping"),
    ],
)
def test_aliases_merges_and_tags_of_yaml_hide_nothing(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("name: n\ndata: memory://x\n" + text)
    with pytest.raises(ConfigError) as caught:
        load(PretrainConfig, path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_an_override_changes_one_place_of_an_aliased_value(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "name: n\nstarts: {a: 'models:/e/1'}\nlabelled: &l {data: 'memory://x', subjects: 5}\n"
        "finetune: {flip: &f [0, 0, 0], scale: [1, 1]}\n"
    )
    assert load(FinetuneJobConfig, path, ["labelled.subjects=7"]).labelled.subjects == 7
    path.write_text(
        "name: n\ndata: memory://x\nmethod: {name: compose, parts: {one: &p {name: simclr, weight: 1}, two: *p}}\n"
    )
    raw = load_raw(path, ["method.parts.one.weight=3"])
    assert [raw["method"]["parts"][key]["weight"] for key in ("one", "two")] == [3, 1]


def load_raw(path: Path, overrides: list[str]) -> dict[str, Any]:
    data: dict[str, Any] = config_module._yaml(path.read_text())
    for item in overrides:
        config_module._override(data, item, PretrainConfig)
    return data


def test_an_override_of_a_group_leaves_the_settings_that_it_does_not_name(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "name: n\ndata: memory://x\nengine: {lr: 0.01}\nmethod: {name: pgl, hidden: 64}\n"
        "backbone: {name: unet, arguments: {channels: [8, 8], strides: [2]}}\n"
    )
    config = load(PretrainConfig, path, ["engine={steps: 70}", "engine.clip=2", "engine={seed: 3}"])
    assert (config.engine.lr, config.engine.steps, config.engine.clip, config.engine.seed) == (0.01, 70, 2, 3)
    config = load(PretrainConfig, path, ["method={name: simclr}", "backbone={arguments: {norm: batch}}"])
    assert config.method_name == "simclr"  # another method has other settings
    assert (config.backbone.name, config.backbone.arguments) == ("unet", {"norm": "batch"})
    with pytest.raises(ConfigError, match="without a comment"):
        load(PretrainConfig, path, ["source=file:///data/set #2"])
    assert load(PretrainConfig, path, ["source='/data/set #2'"]).source == "/data/set #2"


@pytest.mark.parametrize(
    ("data", "hint"),
    [
        (plan(intensity={"low": -100}), "no intensity.low with intensity.kind percentile"),
        (plan(intensity={"kind": "zscore", "std": 0}), "no intensity.std with intensity.kind zscore"),
        (plan(intensity={"kind": "ct", "low": 0, "high": 1e-9, "mean": 0, "std": 1e-9}), "1 to 1e+06 apart"),
        (plan(engine={"accumulate": 3}), "engine.accumulate (3) to divide the batch of a worker (4)"),
        (plan(cluster={"workers": 4, "min_workers": 3}), "stream.lanes and engine.accumulate evenly: 1, 2, 4"),
        (plan(cluster={"labels": {"zone": "a b"}}), "labels as KEY: VALUE"),
        (plan(checkpoints={"register_best": True}), "best_by to be set with register_best"),
        (plan(checkpoints={"best_by": "probe/x"}, engine={"probe_every": 0}), "is never measured"),
        (plan(init="none"), "models:/NAME@ALIAS"),
        (plan(engine={"steps": 10**30}), "engine.steps; expected a number of at most 64 bits"),
        (plan(engine={"lr": 1e300}), "engine.lr; expected a number of at most 1e+15"),
        (plan(stream={"lanes": 10**12}), "stream.lanes"),
        (plan(experiment=""), "experiment; expected a name of 1 to 500"),
        (plan(experiment="x" * 501), "experiment; expected a name of 1 to 500"),
        (plan(name="x" * 4000, model="m"), "name"),
        (plan(experiment="https://u:secret@h/"), "without credentials"),
        (plan(source="https://h/x?%58-Amz-Signature=secret"), "without credentials"),
        (plan(source="https://h/x?X-Amz-Signature%3Dsecret"), "without credentials"),
        (plan(source="https://h/x#access_token=secret"), "without credentials"),
        (plan(source="https://h/x?Policy=a&Key-Pair-Id=secret"), "without credentials"),
        (plan(backbone={"arguments": {"bias": "no"}}), "backbone.arguments.bias; expected true or false"),
        (
            plan(backbone={"name": "unet", "arguments": {"num_res_units": True}}),
            "num_res_units; expected whole numbers",
        ),
        (plan(backbone={"name": "unet", "arguments": {"num_res_units": 10**9}}), "at most 128 layers of a level"),
        (plan(backbone={"name": "unet", "arguments": {"num_res_units": -1}}), "num_res_units; expected whole numbers"),
        (plan(backbone={"name": "segresnet", "arguments": {"dropout_prob": "x"}}), "dropout_prob; expected shares"),
    ],
)
def test_what_would_be_left_out_or_is_beyond_all_bounds_is_refused(data: dict[str, Any], hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(PretrainConfig, data)
    assert hint in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("starts", "hint"),
    [
        ({"": "models:/e/1"}, "names of 1 to"),
        ({" a": "models:/e/1"}, "names of 1 to"),
        ({"x" * 500: "models:/e/1"}, "names of 1 to"),
        ({"ü" * 50: "models:/e/1"}, "names of 1 to"),
        ({"a\nb": "models:/e/1"}, "names of 1 to"),
        ({"""a"b'c""": "models:/e/1"}, "one kind of quotes"),
        ({"a": ""}, "models:/NAME@ALIAS"),
        ({"a": "models:/", "b": "models:/e/1"}, "models:/NAME@ALIAS"),
        ({"a": "models:/e/x y"}, "models:/NAME@ALIAS"),
    ],
)
def test_starts_that_would_fail_when_all_is_trained_are_refused(starts: dict[str, str], hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(FinetuneJobConfig, {"name": "n", "labelled": LABELLED, "starts": starts})
    assert hint in str(caught.value)


def test_a_warm_up_that_never_ends_is_refused() -> None:
    data = {"name": "n", "labelled": LABELLED, "starts": {"a": "models:/e/1"}}
    with pytest.raises(ConfigError, match=r"warmup_steps \(100\) below all 100 steps"):
        parse(FinetuneJobConfig, {**data, "finetune": {"warmup_steps": 100}})
    assert parse(FinetuneJobConfig, {**data, "finetune": {"warmup_steps": 99}}).finetune.warmup_steps == 99


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("stream.split=''", "stream.split"),
        ("stream.split=' train'", "stream.split"),
        ("fingerprint=''", "fingerprint"),
        ("fingerprint=../x", "fingerprint"),
        ("source='  '", "source"),
        ("data=''", "data"),
        ("runs=''", "runs"),
        ("model=''", "model"),
        ("experiment=''", "experiment"),
        ("probe.label=''", "probe.label"),
        ("backbone.arguments={act: ''}", "backbone.arguments.act"),
        ("backbone.arguments={'': 1}", "backbone.arguments"),
        ("method={name: supervised, label: ''}", "method supervised: label"),
        ("method={name: pgl, crops: {scale: [1.0e-9, 1.0e-9]}}", "crops"),
        ("method={name: simclr, temperature: 1.0e-9}", "temperature"),
        ("backbone={name: unet, arguments: {strides: [2, 2, 2, 2], channels: [8, 8]}}", "backbone.arguments.channels"),
        ("backbone={name: dynunet, arguments: {filters: [8, 8, 8], strides: [1, 2]}}", "backbone.arguments.strides"),
    ],
)
def test_a_text_that_is_empty_or_leads_elsewhere_and_lists_cut_in_silence_are_refused(override: str, key: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load(PretrainConfig, {"name": "a", "data": "s3://volumes/a"}, [override])
    assert key in str(refused.value)


def test_every_text_setting_refuses_an_empty_one_unless_that_is_its_default() -> None:
    """Also those that are added later."""

    def texts(kind: Any, path: str = "") -> Iterator[tuple[str, bool]]:
        for name, field in kind.model_fields.items():
            place = f"{path}.{name}" if path else name
            leaves = config_module._leaves(field.annotation)
            models = [leaf for leaf in leaves if isinstance(leaf, type) and issubclass(leaf, BaseModel)]
            for model in models:
                yield from texts(model, place)
            if not models and str in leaves:
                yield place, field.default == ""

    needed: dict[Any, dict[str, Any]] = {
        PretrainConfig: plan(),
        TuneConfig: {"name": "n", "encoders": ["models:/a@b"], "labelled": {"data": "memory://x"}},
        FinetuneJobConfig: {"name": "n", "starts": {"a": "models:/a@b"}, "labelled": {"data": "memory://x"}},
        IngestConfig: {"name": "n", "source": "memory://x", "data": "memory://y"},
    }
    for kind, data in needed.items():
        parse(kind, data)
        for place, may_be_empty in texts(kind):
            if may_be_empty:
                load(kind, data, [f"{place}=''"])
                continue
            with pytest.raises(ConfigError) as refused:
                load(kind, data, [f"{place}=''"])
            assert place.rpartition(".")[2] in str(refused.value)
