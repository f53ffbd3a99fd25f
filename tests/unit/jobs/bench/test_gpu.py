"""The run for an accelerator goes through from end to end on a pretended one, and its page is made."""

import argparse
import json
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from jobs.bench import verbs
from jobs.bench.device.gpu import WAYS, Size, bench_gpu
from jobs.bench.device.gpu_page import main, page
from ssl_core.testing.method import BACKBONE
from ssl_core.testing.pretended_device import DEVICE, pretended_device
from storage.errors import ConfigError

TINY = Size(
    methods=("simclr",),
    backbone="small",
    size_DHW=(16, 16, 16),
    batch=2,
    steps=1,
    warmup=1,
    variants=("plain", "checkpointing"),
    nnssl=(2,),
    nnssl_size_DHW=(16, 16, 16),
    nnssl_backbone="small",
    rates=((2, 4),),
    workers=1,
)


class Event:
    """Of a device that has no clock of its own."""

    def __init__(self, **_: Any) -> None:
        self.time_s = 0.0

    def record(self, _stream: Any) -> None:
        self.time_s = time.perf_counter()

    def elapsed_time(self, other: "Event") -> float:
        return 1000 * (other.time_s - self.time_s)


@pytest.fixture(scope="module")
def result() -> Iterator[dict[str, Any]]:
    names = {
        "synchronize": None,
        "reset_peak_memory_stats": None,
        "memory_allocated": 0,
        "get_device_name": "pretended",
    }
    patches = [mock.patch.object(torch.cuda, name, return_value=value) for name, value in names.items()]
    patches += [mock.patch.object(torch.cuda, "max_memory_allocated", return_value=2**20)]
    patches += [mock.patch.object(torch.cuda, "Event", Event)]
    for patch in patches:
        patch.start()
    try:
        with pretended_device():
            yield bench_gpu(TINY, device=DEVICE, limit_s=1e9, backbones={"small": BACKBONE}, say=lambda _line: None)
    finally:
        for patch in patches:
            patch.stop()


def test_every_part_is_measured_on_a_pretended_device(result: dict[str, Any]) -> None:
    assert result["left_out"] == []
    variants = ["plain", "checkpointing", "bf16_channels_last, deterministic"]
    assert [row["variant"] for row in result["variants"]] == variants
    assert [row["way"] for row in result["views"]] == list(WAYS)
    assert len(result["twin"]) == len(result["nnssl"]) == 1
    for row in (*result["views"], result["twin"][0]["whole"], result["twin"][0]["twin"]):
        assert sum(row["shares"].values()) == pytest.approx(1)
    assert set(result["rates"]) == {"fp32", "bf16"}


def test_the_page_is_made_of_the_json(result: dict[str, Any], tmp_path: Any) -> None:
    (tmp_path / "gpu.json").write_text(json.dumps(result))
    main(str(tmp_path / "gpu.json"), str(tmp_path / "page.md"))
    text = (tmp_path / "page.md").read_text()
    assert text == page(result)
    assert "spatial on the CPU" in text
    assert "## Left out" not in text


def test_what_finds_no_time_or_no_memory_is_left_out_by_name() -> None:
    late = bench_gpu(
        TINY,
        device="cpu",
        backbones={"small": BACKBONE},
        limit_s=5,
        say=lambda _line: None,
        clock=iter([0.0, *[9.0] * 99]).__next__,
    )
    assert late["variants"] == late["views"] == []
    assert {item["why"] for item in late["left_out"]} == {"no time left of 5 s"}
    with mock.patch("jobs.bench.device.gpu.measure", side_effect=torch.OutOfMemoryError("CUDA out of memory.\nmore")):
        full = bench_gpu(TINY, device="cpu", limit_s=1e9, backbones={"small": BACKBONE}, say=lambda _line: None)
    assert {"part": "variants, simclr, plain", "why": "OutOfMemoryError: CUDA out of memory."} in full["left_out"]
    assert len(full["views"]) == len(WAYS)
    assert "## Left out" in page(full)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_the_verb_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    verbs.add(parser.add_subparsers())
    with pytest.raises(ConfigError, match="a CUDA device"):
        verbs.run(parser.parse_args(["gpu"]))
