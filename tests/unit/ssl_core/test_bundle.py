"""Bundles: whole, checked, self-contained, and equal to the backbone they were made from."""

import json
import pickletools
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from ssl_core.bundle import fingerprint, load_backbone, write_bundle
from ssl_core.networks import build
from ssl_core.portable import Predictor
from ssl_core.portable.predictor import check_bundle
from ssl_core.portable.safetensors import read_safetensors, same_tensors
from storage.errors import ConfigError, RefusedInput
from tests.kit.bundles import FEATURES, LABELS, encoder, facts, network, scan, segmenter
from tests.kit.small_models import WINDOW, head_bundle, resenc, segmenter_bundle

__all__ = ["encoder", "segmenter"]  # fixtures


def test_a_bundle_says_what_it_is(segmenter: Path) -> None:
    card = check_bundle(segmenter)
    assert card["kind"] == "segmenter"
    assert card["lineage"]["parent"] == "models:/enc/1"
    assert "models:/enc/1" in (segmenter / "MODEL_CARD.md").read_text()
    assert json.loads((segmenter / "preprocess.json").read_text())["labels"][2] == {"value": 7, "name": "back"}
    assert len(fingerprint(segmenter)) == 64
    assert not list(segmenter.parent.glob(".*")), "no half-written directory stays behind"


_STOCK = [
    ("basic_unet", {}),
    ("basic_unet", {"spatial_dims": 2, "features": FEATURES}),
    ("unet", {"channels": [4, 8, 16], "strides": [2, 2]}),
    ("unet", {"num_res_units": 2, "norm": "batch"}),
    ("dynunet", {"filters": [4, 8, 16, 16, 16, 16]}),
    ("segresnet", {"init_filters": 8}),
    ("plain_unet", {"features_per_stage": [4, 8, 8]}),
    ("plain_unet", {"spatial_dims": 2, "features_per_stage": [4, 8], "n_conv_per_stage": [2, 1]}),
    ("resenc", {"n_blocks_per_stage": [1, 1, 1], "features_per_stage": [4, 8, 8]}),
    ("resenc", {"in_channels": 2, "n_blocks_per_stage": [1, 1], "features_per_stage": [4, 8]}),
    ("resenc", {"spatial_dims": 2, "n_blocks_per_stage": [1, 1], "features_per_stage": [4, 8]}),
]


@pytest.mark.parametrize(
    ("name", "arguments", "kind"),
    [(*each, kind) for each in _STOCK for kind in ("encoder", "segmenter")]
    + [("swin_unetr", {"feature_size": 12}, "encoder")],  # slow; its encoder is what differs
)
def test_every_backbone_makes_a_bundle(tmp_path: Path, name: str, arguments: dict, kind: str) -> None:
    """`write_bundle` itself compares the portable network with the backbone; here: it did, and levels are found."""
    nnunet = ["dynamic_network_architectures"]
    for package in {"swin_unetr": ["einops"], "plain_unet": nnunet, "resenc": nnunet}.get(name, []):
        pytest.importorskip(package)
    net = build(name, **arguments, out_channels=3)
    patch = tuple(max(32, m) for m in net.multiple_DHW())
    bundle = write_bundle(tmp_path / "b", kind, net, facts(patch_DHW=patch))  # type: ignore[arg-type]
    levels = json.loads((bundle / "architecture.json").read_text())["levels"]
    assert len(levels) == len(net.levels)
    assert levels[-1]["module"]
    again = load_backbone(bundle)
    keys = net.encoder_keys() if kind == "encoder" else list(net.net.state_dict())
    assert all(torch.equal(net.net.state_dict()[k], again.net.state_dict()[k]) for k in keys)


_SHARING = [
    ("dynunet", {"filters": [4, 8, 16, 16]}),
    ("resenc", {"n_blocks_per_stage": [1, 1, 1], "features_per_stage": [4, 8, 8]}),
]


@pytest.mark.parametrize("kind", ["encoder", "segmenter"])
@pytest.mark.parametrize(("name", "arguments"), _SHARING, ids=["dynunet", "resenc"])
def test_a_tensor_with_several_names_is_stored_once(tmp_path: Path, name: str, arguments: dict, kind: str) -> None:
    if name == "resenc":
        pytest.importorskip("dynamic_network_architectures")
    net = build(name, **arguments, out_channels=3)
    bundle = write_bundle(tmp_path / "b", kind, net, facts())  # type: ignore[arg-type]
    state = net.net.state_dict()
    keys = net.encoder_keys() if kind == "encoder" else list(state)
    once = {state[key].data_ptr(): state[key].nbytes for key in keys}
    path = bundle / "weights.safetensors"
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert len(once) < len(keys)
    assert path.stat().st_size - 8 - header == sum(once.values())
    weights = read_safetensors(path)
    assert set(weights) == set(keys)
    assert all(torch.equal(weights[key], state[key]) for key in keys)
    again = load_backbone(bundle).net.state_dict()
    assert all(torch.equal(again[key], state[key]) for key in keys)


def test_copies_of_one_tensor_that_differ_are_refused(tmp_path: Path) -> None:
    """Bundles of before hold copies, all under one digest; which of them counted was a matter of order."""
    from ssl_core.portable.network import load

    net = build("dynunet", filters=[4, 8, 16, 16]).net
    state = {key: value.clone() for key, value in net.state_dict().items()}
    load("weights", net, state, None)
    other = next(iter(same_tensors(net.state_dict())))
    state[other] += 1
    with pytest.raises(RefusedInput, match="differ"):
        load("weights", net, state, None)


def test_another_user_reads_a_bundle(tmp_path: Path) -> None:
    """As a container does, whose user did not write the folder that it is given."""
    own = facts(patch_DHW=WINDOW, labels=())
    both = write_bundle(tmp_path / "both", "encoder", resenc(), own, decoder=True)
    for bundle in (both, segmenter_bundle(tmp_path / "segmenter"), head_bundle(tmp_path / "head")):
        for path in (bundle, *bundle.rglob("*")):
            assert path.stat().st_mode & 0o044 == 0o044, path


def test_nothing_in_a_bundle_is_a_pickle(segmenter: Path, encoder: Path) -> None:
    for path in [*segmenter.rglob("*"), *encoder.rglob("*")]:
        if path.is_file():
            assert path.suffix in {".py", ".json", ".md", ".safetensors"}
            data = path.read_bytes()
            assert not data.startswith((b"\x80", b"PK"))
            with pytest.raises((ValueError, IndexError, UnicodeDecodeError)):
                list(pickletools.genops(data))


def test_the_segmenter_loads_whole_into_backbone_and_stock_class(segmenter: Path) -> None:
    mine, theirs = network(), load_backbone(segmenter)
    for (name, a), (other, b) in zip(mine.net.state_dict().items(), theirs.net.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    assert list(Predictor(segmenter, "cpu").network.state_dict()) == list(mine.net.state_dict())


def test_an_encoder_gets_a_fresh_decoder_of_any_width(encoder: Path) -> None:
    original = network(1)
    torch.manual_seed(5)
    loaded = load_backbone(encoder, out_channels=4)
    x = torch.randn(1, 1, 32, 32, 32)
    with torch.no_grad():
        for a, b in zip(original.net.eval() and original.features(x), loaded.eval().features(x), strict=True):
            assert torch.equal(a, b)
    keys = set(loaded.encoder_keys())
    rest = [k for k in original.net.state_dict() if k not in keys and "weight" in k and "upsample" in k]
    assert rest
    assert not any(torch.equal(original.net.state_dict()[k], loaded.net.state_dict()[k]) for k in rest)


def test_building_leaves_the_callers_random_state_alone(segmenter: Path) -> None:
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    Predictor(segmenter, "cpu")
    assert torch.equal(torch.rand(4), wanted)


def _change_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["weights.safetensors", "architecture.json", "preprocess.json", "MODEL_CARD.md"])
def test_a_flipped_bit_is_refused_by_name(tmp_path: Path, name: str) -> None:
    bundle = write_bundle(tmp_path / "b", "segmenter", network(), facts())
    _change_byte(bundle / name)
    with pytest.raises(RefusedInput, match=name):
        Predictor(bundle)


def test_only_known_networks_are_built(tmp_path: Path) -> None:
    from ssl_core.portable.network import build as portable_build

    with pytest.raises(RefusedInput, match=r"os\.system"):
        portable_build("architecture.json", {"class": "os.system", "arguments": {"command": "true"}})
    with pytest.raises(RefusedInput, match="arguments"):
        portable_build("a", {"class": "monai.networks.nets.BasicUNet", "arguments": {"colour": 1}})


def test_weights_match_completely_or_not_at_all() -> None:
    from ssl_core.portable.network import load

    net = network().net
    state = net.state_dict()
    name = next(iter(state))
    before = {k: v.clone() for k, v in state.items()}
    changed = [
        {k: v for k, v in state.items() if k != name},
        {**state, "extra": torch.zeros(1)},
        {**state, name: state[name][:1]},
        {**state, name: state[name].double()},
    ]
    for wrong in changed:
        with pytest.raises(RefusedInput, match="do not match"):
            load("weights", net, {k: v + 1 for k, v in wrong.items()}, None)
        assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_writing_leaves_the_network_as_it_is(tmp_path: Path) -> None:
    backbone = network()
    backbone.net.to(memory_format=torch.channels_last_3d).train()
    before = {name: (p, p.stride(), p.detach().clone()) for name, p in backbone.net.named_parameters()}
    write_bundle(tmp_path / "b", "segmenter", backbone, facts())
    for name, parameter in backbone.net.named_parameters():
        same, stride, value = before[name]
        assert parameter is same
        assert parameter.stride() == stride
        assert torch.equal(parameter, value)
    assert all(module.training for module in backbone.net.modules())


def test_mistakes_leave_no_directory(tmp_path: Path) -> None:
    for kind, changes in (("segmenter", {"labels": LABELS[:2]}), ("segmenter", {"patch_DHW": (30, 32, 32)})):
        with pytest.raises(ConfigError):
            write_bundle(tmp_path / "b", kind, network(), facts(**changes))  # type: ignore[arg-type]
        assert not list(tmp_path.iterdir())
    (tmp_path / "b").mkdir()
    with pytest.raises(ConfigError, match="new directory"):
        write_bundle(tmp_path / "b", "segmenter", network(), facts())


def test_the_bundles_own_code_needs_nothing_of_the_project(tmp_path: Path, segmenter: Path) -> None:
    """Run the code inside the bundle with every other import of the project's made impossible; voxels are equal."""
    source = scan(tmp_path)
    block = ["storage", "ssl_core", "jobs", "nibabel", "safetensors", "SimpleITK", "pydantic", "zarr", "ray", "yaml"]
    code = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {block!r}:
            raise ModuleNotFoundError(name)
# site-packages may import some of these at start-up; what counts is that the bundle's code does not
for name in [n for n in sys.modules if n.split(".")[0] in {block!r}]:
    del sys.modules[name]
sys.meta_path.insert(0, Block())
sys.path.insert(0, {str(segmenter)!r})
sys.argv = ["x", {str(segmenter)!r}, {str(source)!r}, {str(tmp_path / "mask.nii.gz")!r}, "--device", "cpu"]
import runpy
runpy.run_module("tomoscale_portable", run_name="__main__")
"""
    # MONAI imports nibabel and others when they are there, and takes their absence
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    found = np.asanyarray(nib.load(tmp_path / "mask.nii.gz").dataobj)
    assert np.array_equal(found, Predictor(segmenter, "cpu").predict(source))
