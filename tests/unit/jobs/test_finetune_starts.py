"""What fine-tuning takes over from a start, and where a training that dies goes on."""

from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.configs import FinetuneJobConfig, LabelledConfig
from jobs.configs.search import TuneConfig
from jobs.configs.study import StudyStart
from jobs.finetune import train_from
from jobs.finetune.checkpoints import StoredCheckpoints
from jobs.tracking.bundles import read_encoder, write_encoder
from jobs.tracking.starts import read_start
from ssl_core.bundle import DECODER, load_backbone, write_bundle
from ssl_core.bundle_card import BundleFacts
from ssl_core.config import parse
from ssl_core.downstream.finetune import FinetuneConfig, Start, build_segmenter
from ssl_core.downstream.transfer import head_keys, repeat_channels, transferred_keys
from ssl_core.methods.base import method_class
from ssl_core.networks import backbone_names
from ssl_core.networks.weights import WeightsError, encoder_state
from ssl_core.train import checkpoint
from ssl_core.views.intensity import IntensityPolicy
from storage.errors import ConfigError
from storage.objects import open_store
from tests.kit.phantoms import write_phantoms
from tests.kit.pretraining import config, train

NETWORK: dict[str, Any] = {"channels": [4, 8], "strides": [2], "norm": "instance"}
SHORT: dict[str, Any] = {"epochs": 2, "steps_per_epoch": 2, "batch": 2, "patch_DHW": (16, 32, 16), "warmup_steps": 0}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("starts")
    write_phantoms((folder / "store").as_uri(), 6)
    return folder


def pretrained(place: Path, method: str) -> tuple[Path, Path]:
    """A checkpoint of a pre-training of one step, and the bundle that is exported."""
    own = {"name": method, **method_class(method).Config.TINY, "crops": {"size_DHW": [16, 32, 16]}}
    job = config((place / "store").as_uri(), "simclr", steps=1, warmup_steps=0).model_copy(update={"method": own})
    folder = place / method
    if not (folder / "bundle").exists():
        train(job, folder)
        write_encoder(job, folder / "step-1", folder / "bundle", run_id="r")
    return folder / "step-1", folder / "bundle"


def test_what_was_trained_in_the_decoder_is_exported_and_starts_a_fine_tuning(place: Path) -> None:
    saved, bundle = pretrained(place, "mae")
    trained = checkpoint.load(saved)[0]["method"]
    model = read_encoder(bundle)
    start = Start("s", model.weights, model.rest, "encoder_decoder")
    network = build_segmenter(model.backbone, model.arguments, 3, 0, start)
    keys = transferred_keys(network, "encoder_decoder")
    assert set(keys) == set(network.encoder_keys()) | set(network.decoder_keys())
    assert len(keys) > len(network.encoder_keys())
    for key in keys:
        assert torch.equal(network.net.state_dict()[key], trained[f"backbone.net.{key}"]), key
    random = build_segmenter(model.backbone, model.arguments, 3, 0, None).net.state_dict()
    for key in set(random) - set(keys):
        assert torch.equal(network.net.state_dict()[key], random[key]), key


def test_all_that_was_trained_is_taken_over_unless_less_is_asked_for(place: Path, tmp_path: Path) -> None:
    assert FinetuneConfig().transfer == StudyStart(pretrain={}).transfer == "trained"
    untrained = build_segmenter("unet", NETWORK, 2, 0, None)
    facts = BundleFacts("m", (16, 16, 16), IntensityPolicy(), ((0, "background"), (1, "ball")))
    segmenter = write_bundle(tmp_path / "segmenter", "segmenter", untrained, facts)
    starts = (
        (pretrained(place, "mae")[1], "encoder_decoder", "its encoder and its decoder"),
        (segmenter, "encoder_decoder", "its encoder and its decoder"),
        (pretrained(place, "simclr")[1], "encoder", "its encoder"),
    )
    for bundle, same, words in starts:
        assert read_start(str(bundle)).brings("trained") == words
        model = read_encoder(bundle)
        one, other = (
            build_segmenter(model.backbone, model.arguments, 3, 0, Start("s", model.weights, model.rest, transfer))
            for transfer in ("trained", same)
        )
        assert all(map(torch.equal, one.net.state_dict().values(), other.net.state_dict().values())), bundle


def test_a_bundle_with_a_decoder_is_an_encoder_to_those_who_know_no_decoder(place: Path) -> None:
    _, bundle = pretrained(place, "mae")
    assert (bundle / DECODER).exists()
    assert "decoder" in (bundle / "MODEL_CARD.md").read_text()
    assert set(read_encoder(bundle).weights) == set(load_backbone(bundle).encoder_keys())


def test_a_decoder_that_was_not_trained_is_refused_by_name_before_anything_runs(place: Path) -> None:
    _, bundle = pretrained(place, "simclr")
    assert not (bundle / DECODER).exists()
    read_start(str(bundle)).require_transfer("encoder")
    for transfer in ("encoder_decoder", "all_but_head"):
        with pytest.raises(ConfigError, match=rf"transfer {transfer} of {bundle}.*missing, the first: upcat_4"):
            read_start(str(bundle)).require_transfer(transfer)
        with pytest.raises(ConfigError, match="transfer=trained"):
            train_from(
                str(bundle),
                LabelledConfig(data=(place / "store").as_uri(), label="labels", subjects=3, inner=1),
                FinetuneConfig(**SHORT, transfer=transfer),
                seed=0,
                like=str(bundle),
            )


def test_of_a_segmenter_all_but_its_output_layer_is_taken(tmp_path: Path) -> None:
    network = build_segmenter("unet", NETWORK, 2, 0, None)
    facts = BundleFacts("m", (16, 16, 16), IntensityPolicy(), ((0, "background"), (1, "ball")))
    model = read_encoder(write_bundle(tmp_path / "b", "segmenter", network, facts))
    start = Start("s", model.weights, model.rest, "all_but_head")
    other = build_segmenter(model.backbone, model.arguments, 5, 1, start)
    head = set(head_keys(other))
    assert head
    for key, tensor in network.net.state_dict().items():
        assert (key in head) or torch.equal(other.net.state_dict()[key], tensor), key
    read_start(str(tmp_path / "b")).require_transfer("all_but_head")


def test_a_training_goes_on_from_object_storage_and_leaves_nothing(place: Path) -> None:
    _, bundle = pretrained(place, "mae")
    labelled = LabelledConfig(data=(place / "store").as_uri(), label="labels", subjects=3, inner=1)
    settings = FinetuneConfig(**SHORT, transfer="encoder_decoder")

    class StopError(Exception):
        pass

    def stop(epoch: int, _metrics: dict[str, float]) -> None:
        raise StopError

    def weights(**how: Any) -> dict[str, torch.Tensor]:
        trained = train_from(str(bundle), labelled, settings, seed=0, like=str(bundle), **how)
        trained.store.close()
        return dict(trained.network.net.state_dict())

    url = "memory://finetune-checkpoints"
    with pytest.raises(StopError):
        weights(checkpoints=StoredCheckpoints(url, every_s=0), on_epoch=stop)
    store = open_store(url)
    assert {key.partition("/")[0] for key in store.list()} == {"newest.json", "step-000002"}
    resumed, expected = weights(checkpoints=StoredCheckpoints(url, every_s=0)), weights()
    assert all(torch.equal(tensor, resumed[key]) for key, tensor in expected.items())
    assert {key.partition("/")[0] for key in store.list()} == {"newest.json", "step-000004"}
    StoredCheckpoints(url).clear()
    assert not list(store.list())


def test_a_checkpoint_is_kept_no_more_often_than_it_may_be(tmp_path: Path) -> None:
    times = iter([0.0, 30.0, 61.0, 61.0, 70.0, 70.0])
    kept = StoredCheckpoints(tmp_path.as_uri(), every_s=60, clock=lambda: next(times))
    for step, last in ((1, False), (2, False), (3, False), (4, True)):
        kept.save({"engine": {"step": step}}, {}, last=last)
        (name,) = {file.parent.name for file in tmp_path.glob("step-*/*")} or {""}
        assert name == {1: "", 2: "step-000002", 3: "step-000002", 4: "step-000004"}[step]
    path = kept.newest()
    assert path is not None
    assert checkpoint.load(path)[0]["engine"]["step"] == 4


@pytest.mark.parametrize("name", sorted(set(backbone_names()) - {"swin_unetr"}))
def test_the_output_layer_is_what_follows_the_number_of_classes(name: str) -> None:
    arguments: dict[str, Any] = {
        "unet": NETWORK,
        "basic_unet": {"features": [4, 4, 8, 8, 16, 4]},
        "dynunet": {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2]},
        "segresnet": {"init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]},
        "plain_unet": {"features_per_stage": [4, 4, 8]},
        "resenc": {"preset": "S", "features_per_stage": [4] * 6},
    }[name]
    if name in ("dynunet", "plain_unet", "resenc"):
        arguments = {"in_channels": 1, **arguments}
    if name == "dynunet":
        arguments |= {"filters": [4, 4, 8]}
    network = build_segmenter(name, arguments, 3, 0, None)
    head = head_keys(network)
    assert head
    assert not set(head) & set(network.encoder_keys() + network.decoder_keys())


def test_several_channels_start_from_one_only_where_that_is_asked_for() -> None:
    network = build_segmenter("unet", NETWORK, 2, 0, None)
    weights = encoder_state(network)
    with pytest.raises(WeightsError, match="of another shape"):
        build_segmenter("unet", {**NETWORK, "in_channels": 3}, 2, 0, Start("s", weights))
    repeated = repeat_channels("unet", NETWORK, weights, 3)
    wide = build_segmenter("unet", {**NETWORK, "in_channels": 3}, 2, 0, Start("s", repeated))
    image = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    for one, three in zip(network.features(image), wide.features(image.repeat(1, 3, 1, 1, 1)), strict=True):
        assert torch.allclose(one, three, atol=1e-5)


def test_inner_subjects_are_asked_for_by_what_they_decide() -> None:
    job: dict[str, Any] = {"name": "n", "starts": {"a": "models:/e/1"}}
    alone = {"data": "memory://x", "subjects": 1, "inner": 0}
    assert parse(FinetuneJobConfig, job | {"labelled": alone}).labelled.inner == 0
    for settings in ({"select": "best"}, {"patience": 2}):
        with pytest.raises(ConfigError, match=r"labelled\.inner to be 1 or more"):
            parse(FinetuneJobConfig, job | {"labelled": alone, "finetune": settings})
    search = {"name": "n", "encoders": ["models:/e/1"], "labelled": alone}
    with pytest.raises(ConfigError, match=r"labelled\.inner to be 1 or more"):
        parse(TuneConfig, search)
