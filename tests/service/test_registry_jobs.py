"""What jobs ask of the registry and note in it, on a real MLflow server: starts, inputs, cards, lineage, aliases."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from jobs.cli.main import main
from jobs.configs import FinetuneJobConfig, LabelledConfig
from jobs.finetune import train_from
from jobs.plan.starts import require_starts
from jobs.tracking import lineage, promotion
from jobs.tracking import models as registry
from jobs.tracking import runs as tracking
from jobs.tracking.inputs import log_inputs
from ssl_core.config import parse
from ssl_core.downstream.finetune import FinetuneConfig
from storage.errors import ConfigError, NotFound, RefusedInput, TomoscaleError
from storage.format.manifest import Manifest
from tests.kit.mlflow_server import environment, mlflow_server
from tests.kit.networks import SMALL
from tests.kit.phantoms import write_phantoms
from tests.kit.small_models import WINDOW, encoder_bundle, resenc, segmenter_bundle

pytestmark = pytest.mark.service
DATA = "memory://registry-jobs"
LABELLED = {"data": DATA, "label": "labels", "subjects": 3, "inner": 1, "test_limit": 1}
PATCH = {"patch_DHW": list(WINDOW)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlflow")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    with mlflow_server(folder) as url, pytest.MonkeyPatch.context() as patch:
        settings = {**environment(), "MLFLOW_TRACKING_URI": url, "TOMOSCALE_STATE": str(folder / "none")}
        for key, value in settings.items():
            patch.setenv(key, value)
        write_phantoms(DATA, 8)
        yield url


@pytest.fixture(scope="module")
def encoder(server: str, folder: Path) -> str:
    version = registry.register(encoder_bundle(folder / "encoder"), "enc")
    return f"models:/enc/{version}"


def job(start: str, **settings: Any) -> FinetuneJobConfig:
    data = {"name": "n", "starts": {"own": start}, "labelled": LABELLED, "finetune": PATCH | settings}
    return parse(FinetuneJobConfig, data)


def refused(start: str, kind: type[TomoscaleError], *parts: str, **settings: Any) -> None:
    with pytest.raises(kind) as raised:
        require_starts(job(start, **settings), lambda line: pytest.fail(line))
    for part in ("starts.own: ", *parts):
        assert part in str(raised.value), raised.value


def test_starts_of_the_registry_are_checked_before_a_job_is_sent(server: str, folder: Path, encoder: str) -> None:
    import mlflow

    for start in (encoder, "models:/enc@candidate", "enc"):
        require_starts(job(start), lambda line: pytest.fail(line))
    refused("models:/enc@candidat", NotFound, "enc has versions 1 and aliases candidate")
    refused("models:/enc/12", NotFound, "enc has versions 1 and aliases candidate")
    refused("models:/ecn@candidate", NotFound, "none of that name; near ones are enc")
    refused(encoder, ConfigError, "transfer encoder_decoder of models:/enc/1", transfer="encoder_decoder")
    script = folder / "alien.py"
    script.write_text(
        "from mlflow.models import set_model\ndef same(model_input):\n    return model_input\nset_model(same)\n"
    )
    mlflow.pyfunc.log_model(python_model=str(script), registered_model_name="alien", pip_requirements=[], name="alien")
    refused("models:/alien/1", RefusedInput, "a model registered by tomoscale; found another kind of model")


def test_a_newer_bundle_in_the_registry_is_refused_and_no_weights_are_fetched(server: str, folder: Path) -> None:
    bundle = encoder_bundle(folder / "later", seed=5)
    registry.register(bundle, "later")
    weights = (bundle / "weights.safetensors").read_bytes()
    (stored,) = [p for p in (folder / "artifacts").rglob("weights.safetensors") if p.read_bytes() == weights]
    stored.unlink()
    require_starts(job("models:/later/1"), lambda line: pytest.fail(line))
    card = json.loads((stored.parent / "bundle.json").read_text())
    (stored.parent / "bundle.json").write_text(json.dumps(card | {"format": "tomoscale-bundle/9"}))
    refused("models:/later@candidate", RefusedInput, "a newer version wrote; update tomoscale")


def test_without_an_answer_of_the_registry_a_start_is_a_note(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    notes: list[str] = []
    require_starts(job("models:/enc@candidate"), notes.append)
    (note,) = notes
    assert note.startswith("not looked at from here: starts.own: MLflow at http://127.0.0.1:9; expected an answer")


def test_an_imported_encoder_is_fine_tuned_from(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = resenc(4).net.state_dict()
    torch.save({"network_weights": {f"module.{name}": tensor for name, tensor in own.items()}}, tmp_path / "c.pth")
    mapping = {
        "name": "elsewhere",
        "backbone": {"name": "resenc", "arguments": {k: list(v) for k, v in SMALL["resenc"].items()}},
        "rename": {"module.encoder.": "encoder.", "module.decoder.encoder.": "decoder.encoder."},
        "drop": ["module.decoder."],
        "patch_DHW": list(WINDOW),
    }
    (tmp_path / "map.yaml").write_text(yaml.safe_dump(mapping))
    command = ["models", "import", str(tmp_path / "c.pth"), str(tmp_path / "out"), "--from", "nnssl"]
    assert main([*command, "--map", str(tmp_path / "map.yaml"), "--register", "elsewhere"]) == 0
    assert "models:/elsewhere/1" in capsys.readouterr().out
    start = "models:/elsewhere@candidate"
    require_starts(job(start), lambda line: pytest.fail(line))
    refused(start, ConfigError, "transfer all_but_head", transfer="all_but_head")
    short = {"epochs": 1, "steps_per_epoch": 1, "batch": 1, "warmup_steps": 0, "lr": 1e-12}
    settings = parse(FinetuneConfig, PATCH | short)
    trained = train_from(start, parse(LabelledConfig, LABELLED), settings, seed=0, like=start)
    trained.store.close()
    key = next(key for key in trained.network.encoder_keys() if key.startswith("encoder.stages"))
    assert torch.allclose(trained.network.net.state_dict()[key], own[key], atol=1e-6)


def test_a_run_names_the_data_and_the_models_that_it_reads(server: str, encoder: str) -> None:
    api = tracking.client()
    run_id = tracking.open_run(api, "exp", "reads", "finetune", params={}, tags={})
    manifest = Manifest.open(DATA)
    starts = [encoder, "none", "/folder"]
    for _ in range(2):  # a job that goes on
        log_inputs(api, run_id, "s3://me:hush@volumes/liver?key=hush", manifest, "training", starts)
    inputs = api.get_run(run_id).inputs
    (item,) = inputs.dataset_inputs
    assert (item.dataset.name, item.dataset.digest) == ("phantoms", manifest.fingerprint)
    assert item.dataset.source_type == "s3"
    assert json.loads(item.dataset.source) == {"uri": "s3://volumes/liver"}
    assert json.loads(item.dataset.profile) == {"volumes of test": 2, "volumes of train": 6}
    assert [(tag.key, tag.value) for tag in item.tags] == [("mlflow.data.context", "training")]
    (model,) = inputs.model_inputs
    assert model.model_id == registry.model_id_of(encoder)


def test_a_version_is_described_by_its_card_with_links(server: str, encoder: str, tmp_path: Path) -> None:
    api = tracking.client()
    run_id = tracking.open_run(api, "exp", "maker", "finetune", params={}, tags={})
    facts = {"parent": encoder, "run_id": run_id}
    bundle = segmenter_bundle(tmp_path / "seg", lineage=facts)
    registry.register(bundle, "described", run_id=run_id)
    version = api.get_model_version("described", "1")
    assert version.description.startswith((bundle / "MODEL_CARD.md").read_text())
    assert f"[{encoder}](#/models/enc/versions/1)" in version.description
    assert f"#/experiments/{api.get_run(run_id).info.experiment_id}/runs/{run_id})" in version.description
    assert version.tags["tomoscale.kind"] == "segmenter", "with the version itself"
    shutil.rmtree(bundle)
    bundle = segmenter_bundle(tmp_path / "long", seed=1, notes=("words " * 2000,))
    registry.register(bundle, "described")
    text = api.get_model_version("described", "2").description
    assert len(text) <= 5000
    assert "The rest is in the bundle's MODEL_CARD.md" in text


def test_the_tree_of_a_model_shows_what_it_came_from_and_what_came_of_it(
    server: str, encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, parent in ((2, encoder), (3, "models:/tree/1"), (4, "models:/gone/7"), (6, "/a/folder")):
        lines = {"parent": parent, "data": "s3://volumes/liver", "data_fingerprint": "f00d"}
        registry.register(segmenter_bundle(tmp_path / str(seed), seed=seed, lineage=lines), "tree")
    assert main(["models", "show", "tree/1", "--tree"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{encoder} (encoder")
    assert "  models:/tree/1 (segmenter)  <--" in lines
    assert lines[lines.index("  models:/tree/1 (segmenter)  <--") + 1] == "      data: s3://volumes/liver"
    assert "    models:/tree/2 (segmenter)" in lines
    root, version = lineage.tree("tree/3")
    assert (root.uri, [child.uri for child in root.children]) == ("models:/gone/7", [version.uri])
    assert "models:/gone/7 (not in this registry)" in lineage.text(root, version)
    assert "/a/folder (not registered)" in lineage.text(*lineage.tree("tree@candidate"))
    assert main(["models", "show", "tree/2", "--tree", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["tree"]["children"][-1]["children"][0]["uri"] == data["model"] == "models:/tree/2"


def test_a_rollback_goes_back_a_version_at_a_time_and_no_further(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (11, 12, 13):
        registry.register(segmenter_bundle(tmp_path / str(seed), seed=seed), "back")
    api = tracking.client()

    def holder(alias: str) -> str:
        return registry.resolve(f"models:/back@{alias}").version

    assert holder("candidate") == "3"
    assert main(["models", "rollback", "back", "candidate"]) == 0
    assert "models:/back/2 is candidate again; models:/back/3 was" in capsys.readouterr().out
    promotion.rollback("back", "candidate")
    assert holder("candidate") == "1"
    assert main(["models", "rollback", "back", "candidate"]) == 2
    assert "rollback of models:/back@candidate; expected a version that it had before" in capsys.readouterr().err
    assert holder("candidate") == "1"
    with pytest.raises(NotFound, match="back@champion"):
        promotion.rollback("back", "champion")
    # Moved by hand in between, and with a version that is gone.
    for version in ("1", "2", "3"):
        registry.set_alias(api, "back", "champion", version)
    api.set_registered_model_alias("back", "champion", "1")
    assert promotion.rollback("back", "champion")[0].version == "3", "what it had before somebody moved it"
    api.delete_model_version("back", "2")
    assert promotion.rollback("back", "champion")[0].version == "1"
    with pytest.raises(ConfigError, match="none on record but version 1"):
        promotion.rollback("back", "champion")


@pytest.mark.parametrize("calls", range(3))
def test_a_death_while_an_alias_moves_loses_no_version_of_it(server: str, tmp_path: Path, calls: int) -> None:
    name = f"mortal-{calls}"
    for seed in (21, 22):
        registry.register(segmenter_bundle(tmp_path / str(seed), seed=seed), name)
    api = tracking.client()
    api.set_registered_model_alias(name, "champion", "1")  # by hand: nothing is noted

    class Mortal:
        left = calls

        def __getattr__(self, attribute: str) -> Any:
            if attribute.startswith("set_"):
                if self.left == 0:
                    raise SystemExit
                self.left -= 1
            return getattr(api, attribute)

    with pytest.raises(SystemExit):
        registry.set_alias(Mortal(), name, "champion", "2")
    if registry.resolve(f"models:/{name}@champion").version == "2":
        assert promotion.rollback(name, "champion")[0].version == "1"
    else:
        with pytest.raises(ConfigError, match="a version that it had before"):
            promotion.rollback(name, "champion")
