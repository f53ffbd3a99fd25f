"""A network that cannot be built, or cannot take the crops, is refused by the check that sends nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from jobs.cli import main as cli
from jobs.configs import FinetuneJobConfig, PretrainConfig
from jobs.configs.study import StudyConfig, merged
from jobs.plan.buildable import require_buildable
from ssl_core.bundle import write_bundle
from ssl_core.bundle_card import BundleFacts
from ssl_core.config import parse
from ssl_core.methods.base import method_names
from ssl_core.networks import build
from ssl_core.views.intensity import IntensityPolicy
from storage.errors import ConfigError
from tests.kit import ROOT

WRONG = [
    ("basic_unet", {"act": "foo"}, "act"),
    ("basic_unet", {"norm": "foo"}, "norm"),
    ("basic_unet", {"features": [16, 16]}, "features"),
    ("basic_unet", {"features": [8, 8, 8, 8, 8, 8], "upsample": "foo"}, "upsample"),
    ("dynunet", {"kernel_size": [4, 4, 4, 4]}, "kernel_size"),
    ("dynunet", {"kernel_size": [3, 2, 3, 3]}, "kernel_size"),
    ("dynunet", {"norm_name": "foo"}, "norm_name"),
    ("dynunet", {"deep_supervision": True}, "deep_supervision"),
    ("segresnet", {"init_filters": 7}, "init_filters"),
    ("segresnet", {"upsample_mode": "foo"}, "upsample_mode"),
    ("unet", {"kernel_size": 4}, "kernel_size"),
    ("unet", {"act": "foo"}, "act"),
    ("unet", {"adn_ordering": "XYZ"}, "adn_ordering"),
    ("swin_unetr", {"feature_size": 25}, "feature_size"),
    ("swin_unetr", {"feature_size": 12, "norm_name": "foo"}, "norm_name"),
    ("resenc", {"preset": "X"}, "preset"),
    ("resenc", {"features_per_stage": [8, 8]}, "features_per_stage"),
]


def job(backbone: str, arguments: dict[str, Any], method: dict[str, Any] | None = None) -> PretrainConfig:
    method = method or {"name": "simclr", "crops": {"size_DHW": [64, 64, 64]}}
    network = {"name": backbone, "arguments": arguments}
    return parse(PretrainConfig, {"name": "x", "data": "s3://a/b", "method": method, "backbone": network})


@pytest.mark.parametrize(("backbone", "arguments", "key"), WRONG, ids=lambda value: str(value)[:40])
def test_arguments_that_build_no_network_are_refused_by_their_key(
    backbone: str, arguments: dict[str, Any], key: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^backbone\.arguments\.{key}; expected .*; found .*; change") as raised:
        require_buildable(job(backbone, arguments))
    assert repr(arguments[key]) in raised.value.found


def test_every_example_can_be_built() -> None:
    for path in sorted((ROOT / "examples/configs").glob("pretrain*.yaml")):
        require_buildable(parse(PretrainConfig, yaml.safe_load(path.read_text(encoding="utf-8"))))
    for path in sorted((ROOT / "examples/configs").glob("study*.yaml")):
        require_buildable(parse(StudyConfig, yaml.safe_load(path.read_text(encoding="utf-8"))))


@pytest.mark.parametrize("name", method_names())
def test_every_method_is_seen_without_numbers(name: str) -> None:
    settings = {"label": "label", "values": [1, 2]} if name == "supervised" else {}
    arguments = {"filters": [8, 8, 16], "strides": [1, 2, 2], "kernel_size": [3, 3, 3]}
    method = {"name": name, "crops": {"size_DHW": [32, 32, 32]}, **settings}
    state = torch.random.get_rng_state()
    require_buildable(job("dynunet", arguments, method))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("backbone", ["swin_unetr", "resenc", "segresnet", "unet"])
def test_the_defaults_of_every_network_can_be_built(backbone: str) -> None:
    require_buildable(job(backbone, {"feature_size": 12} if backbone == "swin_unetr" else {}))


def test_crops_that_the_strides_do_not_divide_are_refused_by_their_key() -> None:
    odd = {"name": "simclr", "crops": {"size_DHW": [20, 48, 32]}}
    with pytest.raises(ConfigError, match=r"^method\.crops\.size_DHW with .*multiples of \(16, 16, 16\).*20, 48, 32"):
        require_buildable(job("basic_unet", {}, odd))


def test_a_level_that_the_network_lacks_is_refused_by_its_key() -> None:
    with pytest.raises(ConfigError, match=r"^method\.feature_level; expected 0 to 4; found 7"):
        require_buildable(job("basic_unet", {}, {"name": "pgl", "feature_level": 7}))


def test_a_patch_that_the_network_of_a_bundle_cannot_take_is_refused(tmp_path: Path) -> None:
    network = build("unet", channels=[4, 8, 8], strides=[2, 2])
    facts = BundleFacts(name="e", patch_DHW=(16, 16, 16), intensity=IntensityPolicy())
    bundle = write_bundle(tmp_path / "encoder", "encoder", network, facts)
    settings = {"name": "x", "starts": {"a": str(bundle), "scratch": "none"}, "labelled": {"data": "s3://a/b"}}
    require_buildable(parse(FinetuneJobConfig, {**settings, "finetune": {"patch_DHW": [16, 24, 32]}}))
    with pytest.raises(ConfigError, match=r"^finetune\.patch_DHW; expected sizes that are multiples of \(4, 4, 4\)"):
        require_buildable(parse(FinetuneJobConfig, {**settings, "finetune": {"patch_DHW": [16, 22, 32]}}))


ODD = {"pretrain": {"method": {"local": {"size_DHW": [12, 16, 16]}}}}
AT = r"method\.local\.size_DHW with .*multiples of \(8, 8, 8\); found \(12, 16, 16\)"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"finetune": {"patch_DHW": [8, 18, 16]}}, r"^finetune\.patch_DHW; expected sizes that are multiples of \(8"),
        ({"finetune": {"deep_supervision": 5}}, r"^finetune\.deep_supervision"),
        (ODD, f"^pretrain: {AT}"),
        ({"starts": {"p": ODD}}, rf"^starts\.p\.pretrain: {AT}"),
    ],
    ids=["patch", "levels", "crops of all", "crops of one"],
)
def test_every_pretraining_of_a_study_is_asked_before_its_first(
    wrong: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"size_DHW": [16, 16, 16]}
    network = {"filters": [4, 8, 8, 8], "strides": [1, 2, 2, 2], "kernel_size": [3, 3, 3, 3]}
    method = {"name": "pcrlv2", "crops": sizes, "local": sizes}
    study = {
        "name": "x",
        "data": "s3://a/b",
        "label": "label",
        "pretrain": {"method": method, "backbone": {"name": "dynunet", "arguments": network}},
        "starts": {"scratch": {}, "p": {"pretrain": {}}},
        "labels": [1],
        "finetune": {"patch_DHW": [16, 16, 16]},
    }
    require_buildable(parse(StudyConfig, study))
    with pytest.raises(ConfigError, match=message) as raised:
        require_buildable(parse(StudyConfig, merged(study, wrong)))
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(merged(study, wrong)), encoding="utf-8")
    assert cli.main(["study", str(path), "--dry-run"]) == 2
    assert str(raised.value) in capsys.readouterr().err


@pytest.mark.parametrize("verb", [["plan", "pretrain"], ["plan"], ["pretrain"]], ids=" ".join)
def test_every_verb_that_takes_a_job_refuses_it(
    verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("name: x\ndata: s3://a/b\nbackbone: {name: unet, arguments: {act: foo}}\n", encoding="utf-8")
    assert cli.main([*verb, str(path)]) == 2
    assert "backbone.arguments.act" in capsys.readouterr().err
