"""The fine-tuning job around the trainer."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from jobs.configs import FinetuneJobConfig
from jobs.finetune import device_for, summarise
from jobs.tracking.bundles import write_segmenter
from ssl_core.config import parse
from ssl_core.downstream.finetune import build_segmenter
from ssl_core.views.intensity import IntensityPolicy
from storage.errors import ConfigError
from tests.kit.phantoms import write_phantoms


def test_a_training_takes_a_gpu_only_when_it_asked_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (device_for(False).type, device_for(True).type) == ("cpu", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_for(False).type == "cpu"
    with pytest.raises(ConfigError, match="CUDA"):
        device_for(True)


def test_scores_that_promotions_compare_are_of_subjects_and_name_what_was_segmented(tmp_path: Path) -> None:
    url = "memory://finetune-job"
    manifest = write_phantoms(url, 4)
    labelled = {"data": url, "label": "organs", "subjects": 2, "inner": 1}
    job = {"name": "n", "starts": {"a": "models:/e/1"}, "labelled": labelled, "finetune": {"patch_DHW": [16, 16, 16]}}
    trained = SimpleNamespace(
        store=SimpleNamespace(manifest=manifest),
        subjects=SimpleNamespace(train=(0,), inner=(1,), test=(2, 3)),
        encoder=SimpleNamespace(intensity=IntensityPolicy()),
        labels={1: "liver", 3: "spleen"},
        network=build_segmenter("unet", {"channels": [8, 16], "strides": [2], "norm": "instance"}, 3, 0, None),
    )
    scores = {("s1", "v1"): 0.2, ("s1", "v2"): 0.4, ("s2", "v3"): 0.9}
    cases = [
        {"subject": subject, "volume_id": volume, "label": label, "dice": dice}
        for (subject, volume), dice in scores.items()
        for label in trained.labels.values()
    ]
    bundle = write_segmenter(
        parse(FinetuneJobConfig, job),
        trained,
        tmp_path / "bundle",
        run_id="r",
        cases=cases,
        parent="models:/e/1",
    )
    found = json.loads((bundle / "evaluation.json").read_text())
    assert found["cases"] == pytest.approx({"s1": 0.3, "s2": 0.9})
    assert found["split"] == f"{manifest.fingerprint} test, organs 1 3"


def test_the_test_pairs_subjects_whatever_ended_first() -> None:
    job = {"name": "n", "starts": {"pre": "models:/e/1", "none": "none"}, "seeds": [3, 1]}
    config = parse(FinetuneJobConfig, job | {"labelled": {"data": "memory://x"}})
    # Two volumes of subject 0, which must not count twice.
    volumes = [("s0", "v0a"), ("s0", "v0b"), *((f"s{i}", f"v{i}") for i in range(1, 7))]

    def result(start: str, seed: int) -> dict[str, object]:
        gain = {("pre", 3): 0.2, ("pre", 1): 0.4}.get((start, seed), 0.0)
        rows = [
            {"start": start, "seed": seed, "volume_id": v, "subject": s, "label": "l", "hd95_mm": 1.0, "nsd": 1.0}
            | {"dice": 0.5 + (gain if v != "v0b" else -gain)}
            for s, v in volumes
        ]
        return {"start": start, "seed": seed, "cases": rows, "version": None, "history": [], "seconds": 1.0}

    ended = [result(*pair) for pair in (("none", 1), ("none", 3), ("pre", 1), ("pre", 3))]
    found = summarise(config, ended)
    assert found["test"]["n"] == 7
    assert found["test"]["difference"] == pytest.approx(6 * 0.3 / 7)
    assert [(r["start"], r["seed"]) for r in found["runs"]] == [("pre", 3), ("pre", 1), ("none", 3), ("none", 1)]
    assert found["cases"][0]["start"] == "pre"
    assert [(r["start"], r["cases"]) for r in found["rows"]] == [("pre", 8), ("none", 8)]
