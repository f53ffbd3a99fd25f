"""A released nnU-Net fine-tunes what is exported for it, and its checkpoint is a start here: `make nnunet-test`.

It takes an environment of its own, which the target makes, and some minutes. What it did is printed.
"""

import json
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml

from jobs.cli.main import main
from jobs.exchange.nnunet import CONFIGURATION, FILE, HEADS
from jobs.exchange.torch_files import read_torch
from jobs.tracking.bundles import pull_encoder
from ssl_core.bundle import write_bundle
from ssl_core.downstream.finetune import FinetuneConfig, Start, build_segmenter, train_segmenter
from ssl_core.networks import Backbone
from ssl_core.portable.safetensors import read_safetensors
from ssl_core.views.intensity import IntensityPolicy
from storage.format.manifest import Manifest
from storage.reading.volume_store import VolumeStore
from tests.kit import ROOT
from tests.kit.bundles import facts
from tests.kit.phantoms import write_phantoms
from tests.kit.small_models import resenc

if "TOMOSCALE_NNUNET" not in os.environ:
    pytest.skip("minutes long, with nnU-Net in an environment of its own: `make nnunet-test`", allow_module_level=True)

pytestmark = pytest.mark.timeout(3600)
BIN = Path(os.environ["TOMOSCALE_NNUNET"]) / "bin"
TRAINERS, PROGRAMS = Path(__file__).parent / "trainers", Path(__file__).parent / "programs"
PROGRAM = ROOT / "jobs/bench/nnunet/outside/program.py"
DATASET, PLANS, CONFIG, TRAINER = "Dataset901_Balls", "nnUNetResEncUNetMPlans", "3d_tomoscale", "ShortTrainer"
ARGUMENTS = {"n_blocks_per_stage": (1, 1, 2), "features_per_stage": (8, 16, 24)}
WINDOW = (16, 32, 32)  # as long along two axes as along one would hide an axis that was mixed up
CASES = 6
TRAINING = "nnunetv2.run.run_training:run_training_entry"
PREDICTION = "nnunetv2.inference.predict_from_raw_data:predict_entry_point"
PLANNING = "nnunetv2.experiment_planning.plan_and_preprocess_entrypoints:plan_and_preprocess_entry"


@dataclass(frozen=True)
class NnUnet:
    """nnU-Net with folders of its own.

    Attributes:
        folder: Holds them, and what is written to and fro.
    """

    folder: Path

    @property
    def model(self) -> Path:
        """Where it trains."""
        return self.folder / "results" / DATASET / f"{TRAINER}__{PLANS}__{CONFIG}"

    @property
    def plans(self) -> Path:
        """What it plans."""
        return self.folder / "preprocessed" / DATASET / f"{PLANS}.json"

    def run(self, program: str, *words: str, fails: bool = False) -> str:
        """All that a program printed, by its entry point or a file of `PROGRAMS`."""
        environment = {
            **{key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")},
            **{f"nnUNet_{name}": str(self.folder / name) for name in ("raw", "preprocessed", "results")},
            "nnUNet_extTrainer": str(TRAINERS),
            "PYTHONPATH": str(PROGRAM.parent),
            "nnUNet_n_proc_DA": "1",
            "nnUNet_def_n_proc": "1",
            "nnUNet_compile": "f",
        }
        own = [str(PROGRAMS / program)] if program.endswith(".py") else [str(PROGRAM), program]
        begin = time.monotonic()
        done = subprocess.run(
            [BIN / "python", *own, *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        print(f"nnunet: {program} in {time.monotonic() - begin:.0f} s", flush=True)
        assert (done.returncode != 0) is fails, done.stdout[-6000:]
        return done.stdout

    def train(self, start: Path, fails: bool = False) -> str:
        """One short fine-tuning, validation included."""
        options = ("-p", PLANS, "-tr", TRAINER, "-device", "cpu", "-pretrained_weights", str(start))
        return self.run(TRAINING, "901", CONFIG, "0", *options, fails=fails)

    def plan(self, configuration: Path) -> None:
        """Put an exported configuration into its plans."""
        plans = json.loads(self.plans.read_text(encoding="utf-8"))
        plans["configurations"][CONFIG] = json.loads(configuration.read_text(encoding="utf-8"))
        self.plans.write_text(json.dumps(plans), encoding="utf-8")


def _write_cases(folder: Path) -> None:
    """Balls in noise, as nnU-Net's raw format has them."""
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    grid = np.indices((36, 34, 30))
    for case in range(CASES):
        random = np.random.default_rng(case)
        centre = random.uniform(12, 18, 3)[:, None, None, None]
        ball = ((grid - centre) ** 2).sum(0) < random.uniform(6, 9) ** 2
        values = random.normal(100, 15, ball.shape) + 80 * ball
        for array, name in ((values, f"imagesTr/case{case}_0000"), (ball, f"labelsTr/case{case}")):
            nib.save(nib.Nifti1Image(array.astype(np.int16), np.eye(4)), folder / f"{name}.nii.gz")
    described = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "ball": 1},
        "numTraining": CASES,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(described), encoding="utf-8")


@pytest.fixture(scope="module")
def nnunet(tmp_path_factory: pytest.TempPathFactory) -> NnUnet:
    """With a data set that it has planned and preprocessed."""
    tool = NnUnet(tmp_path_factory.mktemp("nnunet"))
    _write_cases(tool.folder / "raw" / DATASET)
    options = ("-pl", "nnUNetPlannerResEncM", "-c", "3d_fullres", "-np", "1", "-npfp", "1")
    tool.run(PLANNING, "-d", "901", *options, "--verify_dataset_integrity")
    return tool


@pytest.fixture(scope="module")
def bundle(nnunet: NnUnet) -> Path:
    """An encoder whose decoder was trained with it."""
    own = facts(patch_DHW=WINDOW, labels=(), intensity=IntensityPolicy(kind="zscore"))
    return write_bundle(nnunet.folder / "bundle", "encoder", resenc(3, **ARGUMENTS), own, decoder=True)


@pytest.fixture(scope="module")
def fine_tuned(nnunet: NnUnet, bundle: Path) -> str:
    """What nnU-Net printed of a fine-tuning from the export."""
    assert main(["models", "export", str(bundle), str(nnunet.folder / "export"), "--to", "nnunet"]) == 0
    nnunet.plan(nnunet.folder / "export" / CONFIGURATION)
    return nnunet.train(nnunet.folder / "export" / FILE)


@pytest.fixture(scope="module")
def start(nnunet: NnUnet, fine_tuned: str) -> Path:
    """The bundle of nnU-Net's checkpoint."""
    mapping = {
        "name": "balls",
        "backbone": {"name": "resenc", "arguments": {key: list(value) for key, value in ARGUMENTS.items()}},
        "rename": {"encoder.": "encoder.", "decoder.": "decoder."},
        "drop": ["decoder.seg_layers."],
        "decoder": True,
        "patch_DHW": list(WINDOW),
    }
    (nnunet.folder / "map.yaml").write_text(yaml.safe_dump(mapping), encoding="utf-8")
    words = ["--from", "nnunet", "--map", str(nnunet.folder / "map.yaml")]
    checkpoint = nnunet.model / "fold_0" / FILE
    assert main(["models", "import", str(checkpoint), str(nnunet.folder / "start"), *words]) == 0
    return nnunet.folder / "start"


def _segmenter(start: Path) -> Backbone:
    encoder = pull_encoder(str(start))
    given = Start("nnU-Net's", encoder.weights, encoder.rest, transfer="encoder_decoder")
    return build_segmenter(encoder.backbone, encoder.arguments, 2, 0, given)


def test_every_tensor_beside_the_output_layers_arrives(nnunet: NnUnet, bundle: Path, fine_tuned: str) -> None:
    beginning = torch.load(nnunet.model / "fold_0/beginning.pth", weights_only=True)
    ours = read_safetensors(bundle / "weights.safetensors") | read_safetensors(bundle / "decoder.safetensors")
    arrived = {name: tensor for name, tensor in beginning.items() if HEADS not in name}
    assert sorted(arrived) == sorted(ours)
    assert all(torch.equal(tensor, ours[name]) for name, tensor in arrived.items())
    print(f"nnunet: {len(arrived)} tensors arrived")


def test_nnunet_learns_from_there_and_predicts(nnunet: NnUnet, fine_tuned: str) -> None:
    assert "Training done." in fine_tuned
    assert "Mean Validation Dice" in fine_tuned
    before = torch.load(nnunet.model / "fold_0/beginning.pth", weights_only=True)
    after = read_torch(nnunet.model / "fold_0" / FILE)["network_weights"]
    assert not torch.equal(before["encoder.stem.convs.0.conv.weight"], after["encoder.stem.convs.0.conv.weight"])
    scans, masks = nnunet.folder / "raw" / DATASET / "imagesTr", nnunet.folder / "masks"
    options = ("-d", "901", "-c", CONFIG, "-p", PLANS, "-tr", TRAINER, "-f", "0", "-device", "cpu")
    nnunet.run(PREDICTION, "-i", str(scans), "-o", str(masks), *options, "-npp", "1", "-nps", "1")
    assert len(list(masks.glob("case*.nii.gz"))) == CASES


def test_its_checkpoint_computes_the_same_here(nnunet: NnUnet, start: Path) -> None:
    x_BCDHW = np.random.default_rng(0).normal(size=(1, 1, *WINDOW)).astype(np.float32)
    np.save(nnunet.folder / "x.npy", x_BCDHW)
    words = [str(nnunet.model), str(nnunet.folder / "x.npy"), str(nnunet.folder / "logits.npy")]
    nnunet.run("logits.py", *words)
    network = _segmenter(start)
    checkpoint = read_torch(nnunet.model / "fold_0" / FILE)["network_weights"]
    state = network.net.state_dict()
    for name in (name for name in state if HEADS in name):  # a fine-tuning draws them anew
        state[name].copy_(checkpoint[name])
    network.net.eval()
    with torch.no_grad():
        own = network.logits(torch.from_numpy(x_BCDHW)).numpy()
    difference = float(np.abs(own - np.load(nnunet.folder / "logits.npy")).max())
    print(f"nnunet: logits differ by {difference:.2g}")
    assert np.ptp(own) > 0.01
    assert difference <= 1e-5


def test_fine_tuning_starts_from_its_checkpoint(nnunet: NnUnet, start: Path) -> None:
    network = _segmenter(start)
    checkpoint = read_torch(nnunet.model / "fold_0" / FILE)["network_weights"]
    state = network.net.state_dict()
    assert all(torch.equal(tensor, checkpoint[name]) for name, tensor in state.items() if HEADS not in name)
    url = f"file://{nnunet.folder}/store"
    write_phantoms(url, 4, shape=(20, 36, 34))
    settings = FinetuneConfig(epochs=1, steps_per_epoch=2, batch=1, patch_DHW=WINDOW, warmup_steps=1)
    given = {"train": (0, 1), "inner": (2,), "label": "labels", "labels": {1: "ball"}, "pretrained": True, "seed": 0}
    with VolumeStore(url, Manifest.open(url)) as store:
        history = train_segmenter(
            network, settings, store, policy=IntensityPolicy(kind="zscore"), device=torch.device("cpu"), **given
        )
    assert len(history) == 1
    assert not torch.equal(
        network.net.state_dict()["encoder.stem.convs.0.conv.weight"], checkpoint["encoder.stem.convs.0.conv.weight"]
    )


def test_an_encoder_alone_is_refused_there_as_the_export_says(
    nnunet: NnUnet, fine_tuned: str, capsys: pytest.CaptureFixture[str]
) -> None:
    own = facts(patch_DHW=WINDOW, labels=(), intensity=IntensityPolicy(kind="zscore"))
    alone = write_bundle(nnunet.folder / "alone", "encoder", resenc(3, **ARGUMENTS), own)
    capsys.readouterr()
    assert main(["models", "export", str(alone), str(nnunet.folder / "alone-export"), "--to", "nnunet"]) == 0
    assert "a released nnU-Net (2.8) cannot start from it" in capsys.readouterr().out
    assert "is missing in the pretrained model weights" in nnunet.train(
        nnunet.folder / "alone-export" / FILE, fails=True
    )


def test_a_training_beside_nnunets_scores_both_on_the_same_volumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`tomoscale bench nnunet`, as small as nnU-Net can be."""
    url = f"file://{tmp_path}/store"
    manifest = write_phantoms(url, 8, shape=(24, 36, 34))
    config = {
        "labelled": {"data": url, "label": "labels", "subjects": 6, "inner": 1},
        "backbone": {"name": "plain_unet", "arguments": {"features_per_stage": [4, 8]}},
        "intensity": {"kind": "zscore"},
        "finetune": {"epochs": 2, "steps_per_epoch": 10, "batch": 2, "patch_DHW": list(WINDOW)},
        "nnunet": {"features": [4, 8], "patch_DHW": list(WINDOW), "batch": 2},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    words = ["bench", "nnunet", str(tmp_path / "config.yaml"), "--python", str(BIN / "python"), "--json"]
    assert main(words) == 0
    result = json.loads(capsys.readouterr().out)
    own, theirs = result["rows"]
    assert (own["name"], own["steps"]) == ("tomoscale", 20)
    assert theirs["steps"] > 0
    assert theirs["seconds"] >= own["seconds"], "as long, and the iterations that were begun"
    assert result["nnunet"]["patch_size"] == list(WINDOW)
    assert result["nnunet"]["architecture"]["arch_kwargs"]["features_per_stage"] == [4, 8]
    test = sorted(manifest.record(i).volume_id for i in manifest.select(split="test"))
    for row in (own, theirs):
        assert sorted({case["volume_id"] for case in row["cases"]}) == test
        assert 0 <= row["mean_dice"] <= 1
