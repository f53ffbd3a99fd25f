"""PyTorch's files are read without executing what they name."""

import collections
import os
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.exchange import torch_files
from jobs.exchange.torch_files import read_torch, write_torch
from storage.errors import RefusedInput


class _Harmful:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.folder),)

    def __init__(self, folder: Path) -> None:
        self.folder = folder


def test_a_pickle_is_not_executed_and_what_it_names_is(tmp_path: Path) -> None:
    for what, data in (("posix.mkdir", _Harmful(tmp_path / "done")), ("fractions.Fraction", Fraction(1, 2))):
        torch.save({"network_weights": {"a": torch.zeros(1)}, "extra": data}, tmp_path / "x.pth")
        with pytest.raises(RefusedInput, match=f"{what}, which reading the file would execute"):
            read_torch(tmp_path / "x.pth")
    assert not (tmp_path / "done").exists()
    text = Path(torch_files.__file__).read_text()
    assert re.findall(r"torch\.load\(.*\)", text) == ['torch.load(path, map_location="cpu", weights_only=True)']


def test_tensors_and_the_numbers_that_trainers_keep_are_read(tmp_path: Path) -> None:
    data = {
        "network_weights": collections.OrderedDict(a=torch.arange(3.0)),
        "logging": {"ema": [np.float64(0.5), np.float32(1.5), np.int64(3), np.bool_(True)]},
        "name": "x",
        "none": None,
    }
    write_torch(tmp_path / "x.pth", data)
    again = read_torch(tmp_path / "x.pth")
    assert torch.equal(again["network_weights"]["a"], torch.arange(3.0))
    assert again["logging"] == data["logging"]


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(RefusedInput, match="nothing"):
        read_torch(tmp_path / "nothing.pth")
    write_torch(tmp_path / "x.pth", {"a": torch.zeros(1000)})
    whole = (tmp_path / "x.pth").read_bytes()
    for data in (b"", b"words", whole[: len(whole) // 2]):
        (tmp_path / "y.pth").write_bytes(data)
        with pytest.raises(RefusedInput, match=r"y\.pth; expected (a checkpoint of PyTorch|tensors)"):
            read_torch(tmp_path / "y.pth")
