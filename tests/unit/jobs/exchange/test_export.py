"""Each exported form, opened by the tool that it is for, computes what the bundle computes."""

import importlib.util
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from pydoc import locate

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from jobs.cli.main import main
from jobs.exchange import nnunet
from jobs.exchange.export import export
from jobs.exchange.model import Model, open_model
from ssl_core.bundle import write_bundle
from ssl_core.networks.registry import build as build_backbone
from ssl_core.portable import Predictor
from ssl_core.portable.network import build
from storage.errors import ConfigError
from tests.kit.bundles import facts, scan
from tests.kit.networks import SMALL
from tests.kit.small_models import WINDOW, encoder_bundle, resenc, segmenter_bundle

Bundle = Callable[[str], Path]
RESIDUAL = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("bundles")
    paths = {"segmenter": segmenter_bundle(folder / "segmenter"), "encoder": encoder_bundle(folder / "encoder")}
    return paths.__getitem__


def _expected(model: Model, x_BCDHW: torch.Tensor) -> list[np.ndarray]:
    with torch.no_grad():
        return [output.numpy() for output in model.outputs(x_BCDHW)]


@pytest.mark.parametrize("kind", ["segmenter", "encoder"])
def test_safetensors_holds_the_weights_under_the_stock_names(bundle: Bundle, kind: str, tmp_path: Path) -> None:
    assert main(["models", "export", str(bundle(kind)), str(tmp_path / "out"), "--to", "safetensors"]) == 0
    card = json.loads((tmp_path / "out/card.json").read_text())
    tensors = load_file(tmp_path / "out/model.safetensors")  # the package's own reader
    network = build("x", card["network"])
    own = network.state_dict()
    assert tensors
    assert set(tensors) <= set(own)
    network.load_state_dict({**own, **tensors})
    model = open_model(bundle(kind))
    again = type(model.outputs)(network, card["dims"], model.outputs.modules_)
    x_BCDHW = model.window()
    with torch.no_grad():
        pairs = zip(again(x_BCDHW), _expected(model, x_BCDHW), strict=True)
        assert all(np.array_equal(one.numpy(), two) for one, two in pairs)
    assert card["preprocess"] == json.loads((bundle(kind) / "preprocess.json").read_text())
    assert "0.5" not in card["outputs"]
    assert card["outputs"] == (["logits"] if kind == "segmenter" else ["level0", "level1", "level2"])


@pytest.mark.parametrize("kind", ["segmenter", "encoder"])
def test_torchscript_runs_without_our_code(bundle: Bundle, kind: str, tmp_path: Path) -> None:
    export(bundle(kind), tmp_path / "out", "torchscript")
    extra = {"card.json": ""}
    network = torch.jit.load(tmp_path / "out/model.ts", _extra_files=extra)
    model = open_model(bundle(kind))
    x_BCDHW = model.window(2) * 3
    for one, two in zip(network(x_BCDHW), _expected(model, x_BCDHW), strict=True):
        assert np.allclose(one.numpy(), two, rtol=1e-5, atol=1e-5)
    assert json.loads(extra["card.json"])["outputs"] == list(model.names)
    if kind == "encoder":  # what no output needs is left out: the decoder has no trained weights
        assert not any("decoder" in name for name, _ in network.named_parameters())
        size = sum(p.numel() for p in model.predictor.network.encoder.parameters()) * 4  # type: ignore[union-attr, operator]
        assert (tmp_path / "out/model.ts").stat().st_size < 2 * size + 100_000


@pytest.mark.parametrize("kind", ["segmenter", "encoder"])
def test_onnx_is_run_by_onnxruntime(bundle: Bundle, kind: str, tmp_path: Path) -> None:
    for package in ("onnx", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install 'tomoscale[export]'")
    import onnxruntime

    export(bundle(kind), tmp_path / "out", "onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "out/model.onnx"), providers=["CPUExecutionProvider"])
    model = open_model(bundle(kind))
    x_BCDHW = model.window(3) * 3
    outputs = session.run(list(model.names), {"image": x_BCDHW.numpy()})
    for one, two in zip(outputs, _expected(model, x_BCDHW), strict=True):
        assert np.allclose(one, two, rtol=1e-3, atol=1e-3)


def test_onnx_says_which_package_it_needs(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"no onnx.*tomoscale\[export\]"):
        export(bundle("segmenter"), tmp_path / "out", "onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_computes_something_else_is_not_written(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.jit.load

    def changed(*arguments: object, **more: object) -> Callable[[torch.Tensor], list[torch.Tensor]]:
        network = real(*arguments, **more)  # type: ignore[arg-type, no-untyped-call]
        return lambda x: [output + 1e-2 for output in network(x)]

    monkeypatch.setattr(torch.jit, "load", changed)
    with pytest.raises(ConfigError, match="a difference of 0.01"):
        export(bundle("segmenter"), tmp_path / "out", "torchscript")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_replaced(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    assert main(["models", "export", str(bundle("encoder")), str(tmp_path / "out"), "--to", "safetensors"]) == 2
    assert "expected a new folder" in capsys.readouterr().err
    assert main(["models", "export", str(bundle("encoder")), str(tmp_path / "a/b"), "--to", "safetensors"]) == 2
    assert "create it first" in capsys.readouterr().err


def test_nnunet_finds_its_keys_and_its_network_takes_every_tensor(bundle: Bundle, tmp_path: Path) -> None:
    """What nnU-Net's `like_nnssl` and `PretrainedTrainer` do with the file, on the class that nnU-Net builds."""
    export(bundle("encoder"), tmp_path / "out", "nnunet")
    checkpoint = torch.load(tmp_path / "out/checkpoint_final.pth", weights_only=True)
    plan = checkpoint["nnssl_adaptation_plan"]
    architecture = plan["architecture_plans"]
    kind = locate(architecture["arch_class_name"])
    arguments = dict(architecture["arch_kwargs"])
    for key in architecture["arch_kwargs_requiring_import"]:
        arguments[key] = arguments[key] and locate(arguments[key])
    network = kind(input_channels=1, num_classes=5, deep_supervision=True, **arguments)
    assert (network.key_to_encoder, network.key_to_stem) == (plan["key_to_encoder"], plan["key_to_stem"])
    assert list(network.keys_to_in_proj) == plan["keys_to_in_proj"]
    weights = checkpoint["network_weights"]
    assert all(f"{key}.weight" in weights for key in plan["keys_to_in_proj"])
    for key in (plan["key_to_encoder"], plan["key_to_stem"]):
        part = {name.removeprefix(f"{key}."): value for name, value in weights.items() if name.startswith(key)}
        network.get_submodule(key).load_state_dict(part, strict=True)
    model = open_model(bundle("encoder"))
    x_BCDHW = model.window()
    with torch.no_grad():
        for one, two in zip(network.encoder(x_BCDHW), _expected(model, x_BCDHW), strict=True):
            assert np.array_equal(one.numpy(), two)
    config = plan["pretrain_plan"]["configurations"]["tomoscale"]
    assert config == {"spacing": None, "patch_size": [16, 16, 16]}
    assert plan["recommended_downstream_patchsize"] == plan["pretrain_patch_size"] == [16, 16, 16]
    assert plan["pretrain_num_input_channels"] == 1
    assert plan["key_to_lpe"] is None
    assert checkpoint["citations"] == []


def test_nnunet_takes_a_whole_segmenter_but_for_its_output_layers(bundle: Bundle, tmp_path: Path) -> None:
    """The rule of nnU-Net's `-pretrained_weights`: all names and shapes but those of `.seg_layers.`."""
    notes = export(bundle("segmenter"), tmp_path / "out", "nnunet")
    assert f"-pretrained_weights {tmp_path}/out/checkpoint_final.pth; all" in notes[0]
    weights = torch.load(tmp_path / "out/checkpoint_final.pth", weights_only=True)["network_weights"]
    arguments = open_model(bundle("segmenter")).predictor.architecture["arguments"] | {"deep_supervision": True}
    own = build("x", {"class": RESIDUAL, "arguments": arguments | {"num_classes": 7}}).state_dict()
    needed = {key: value.shape for key, value in own.items() if ".seg_layers." not in key}
    assert needed == {key: weights[key].shape for key in needed}


def test_an_encoder_takes_its_decoder_to_nnunet_or_the_export_says_that_it_has_none(
    bundle: Bundle, tmp_path: Path
) -> None:
    whole = write_bundle(tmp_path / "whole", "encoder", resenc(5), facts(patch_DHW=WINDOW, labels=()), decoder=True)
    notes = export(whole, tmp_path / "out", "nnunet")
    assert "-pretrained_weights" in notes[0]
    assert "cannot" not in notes[0]
    weights = torch.load(tmp_path / "out/checkpoint_final.pth", weights_only=True)["network_weights"]
    own = {key: tensor for key, tensor in resenc(5).net.state_dict().items() if nnunet.HEADS not in key}
    assert sorted(weights) == sorted(own)
    assert all(torch.equal(tensor, own[key]) for key, tensor in weights.items())
    alone = export(bundle("encoder"), tmp_path / "alone", "nnunet")
    assert "a released nnU-Net (2.8) cannot start from it: -pretrained_weights needs the decoder's" in alone[0]


def test_a_configuration_for_nnunets_plans_builds_the_network_with_a_stride_for_each_axis(
    bundle: Bundle, tmp_path: Path
) -> None:
    export(bundle("segmenter"), tmp_path / "out", "nnunet")
    given = json.loads((tmp_path / "out" / nnunet.CONFIGURATION).read_text())
    assert (given["inherits_from"], given["patch_size"]) == ("3d_fullres", [16, 16, 16])
    architecture = given["architecture"]
    arguments = architecture["arch_kwargs"]
    assert arguments["strides"] == [[1, 1, 1], [2, 2, 2], [2, 2, 2]]
    for key in architecture["_kw_requires_import"]:
        arguments[key] = arguments[key] and locate(arguments[key])
    network = locate(architecture["network_class_name"])(input_channels=1, num_classes=3, **arguments)  # type: ignore[operator]
    weights = torch.load(tmp_path / "out/checkpoint_final.pth", weights_only=True)["network_weights"]
    network.load_state_dict(weights, strict=True)


@pytest.mark.parametrize("name", ["plain_unet", "resenc"])
def test_each_network_of_nnunet_is_built_and_filled_by_what_its_export_says(name: str, tmp_path: Path) -> None:
    own = build_backbone(name, **SMALL[name], out_channels=3)
    own_bundle = write_bundle(tmp_path / "b", "segmenter", own, facts(patch_DHW=WINDOW))
    export(own_bundle, tmp_path / "out", "nnunet")
    checkpoint = torch.load(tmp_path / "out/checkpoint_final.pth", weights_only=True)
    weights, plan = checkpoint["network_weights"], checkpoint["nnssl_adaptation_plan"]
    architecture = json.loads((tmp_path / "out" / nnunet.CONFIGURATION).read_text())["architecture"]
    arguments = architecture["arch_kwargs"]
    for key in architecture["_kw_requires_import"]:
        arguments[key] = arguments[key] and locate(arguments[key])
    network = locate(architecture["network_class_name"])(input_channels=1, num_classes=3, **arguments)  # type: ignore[operator]
    network.load_state_dict(weights, strict=True)
    x_BCDHW = torch.randn(1, 1, *WINDOW, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(network.eval()(x_BCDHW), own.net.eval()(x_BCDHW))
    for place in (plan["key_to_encoder"], plan["key_to_stem"]):
        assert any(key.startswith(f"{place}.") for key in weights), place
        network.get_submodule(place)
    stems = [weights[f"{place}.weight"] for place in plan["keys_to_in_proj"]]
    assert all(torch.equal(stem, stems[0]) for stem in stems), "one layer by two names"
    assert stems[0].shape[1] == plan["pretrain_num_input_channels"]


def test_what_is_neither_a_network_nor_its_encoder_is_not_written_for_nnunet(bundle: Bundle, tmp_path: Path) -> None:
    model = open_model(bundle("segmenter"))
    model.predictor.network = build("x", encoder_of_other_widths(model))
    with pytest.raises(ConfigError, match="its stock network.*of another shape"):
        nnunet.write(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def encoder_of_other_widths(model: Model) -> dict[str, object]:
    arguments = model.predictor.architecture["arguments"] | {"features_per_stage": [4, 8, 16]}
    return {"class": RESIDUAL, "arguments": arguments}


def test_nnunet_takes_no_other_network(bundle: Bundle, tmp_path: Path) -> None:
    model = open_model(bundle("segmenter"))
    model.predictor.architecture["class"] = "monai.networks.nets.UNet"
    with pytest.raises(ConfigError, match="one of nnU-Net's networks.*backbone.name=resenc"):
        nnunet.write(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_of_monai_is_run_by_monai_on_a_volume(bundle: Bundle, tmp_path: Path) -> None:
    from monai.bundle import ConfigWorkflow, load

    path = segmenter_bundle(tmp_path / "b", 3, spacing_mm=(2.0, 1.5, 1.7))
    root = tmp_path / "exported"
    command = export(path, root, "monai")[0].split(", with")[0]
    (tmp_path / "scans").mkdir()
    source = scan(tmp_path / "scans", (18, 20, 27))
    with pytest.warns(UserWarning, match="does not say which spacing"):
        expected = Predictor(path, "cpu").predict(source)
    assert len(np.unique(expected)) > 1
    program, *words = shlex.split(command.replace("SCANS", f"{tmp_path}/scans").replace("MASKS", f"{tmp_path}/masks"))
    assert program == "python"
    ran = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    options = {"bundle_root": str(root), "dataset_dir": f"{tmp_path}/scans", "output_dir": f"{tmp_path}/again"}
    workflow = ConfigWorkflow(str(root / "configs/inference.json"), workflow_type="inference", **options)
    workflow.initialize()
    workflow.run()
    assert workflow.check_properties() == []
    (written,) = (tmp_path / "masks").iterdir()
    image = nib.load(written)
    assert np.array_equal(np.asanyarray(image.dataobj), expected)
    assert np.allclose(image.affine, nib.load(source).affine)
    network = load(name="exported", bundle_dir=str(tmp_path), workflow_type="inference")
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), workflow.network_def.parameters(), strict=True))
    with pytest.raises(ConfigError, match="expected a 3-D segmenter"):
        export(bundle("encoder"), tmp_path / "other", "monai")
