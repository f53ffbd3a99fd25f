"""An encoder with its preprocessing in one line, from a bundle's folder or the URL of one.

`jobs.tracking.encoder.load_encoder` takes models of a registry too.
"""

import json
import tempfile
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ssl_core.portable import Predictor
from ssl_core.portable.card import listed_files
from storage.errors import ConfigError, NotFound, RefusedInput
from storage.objects import open_store
from storage.objects.protocol import check_key

_CARD = "bundle.json"


@dataclass(frozen=True)
class Encoder:
    """What takes raw volumes to features.

    Attributes:
        name: What its bundle calls it.
        predictor: Its weights and its preprocessing.
        strides_DHW: Voxels between neighbouring features of each level, finest first.
        channels: Features of each level.
    """

    name: str
    predictor: Predictor
    strides_DHW: tuple[tuple[int, int, int], ...]
    channels: tuple[int, ...]

    @property
    def network(self) -> nn.Module:
        """The stock network, in evaluation mode; of an encoder's bundle its decoder has no trained weights."""
        return self.predictor.network

    def __call__(
        self,
        image: str | PathLike[str] | NDArray[Any],
        affine: NDArray[Any] | None = None,
        *,
        level: int = -1,
        force: bool = False,
    ) -> NDArray[np.float32]:
        """Features of a volume, after the resampling and the intensities of training.

        Args:
            image: A `.nii` or `.nii.gz` file, or an array (I, J, K) or (I, J, K, C) in file order.
            affine: (4, 4) of an array; voxel-centre indices to RAS+ mm.
            level: Level of the pyramid, 0 the finest, -1 the deepest.
            force: Take what is far from all that the encoder learned from, with a note instead of a refusal.

        Returns:
            (E, D/stride, H/stride, W/stride), D from inferior to superior, H from posterior to anterior, W from left to
            right; see `Predictor.features`.

        Raises:
            ConfigError: no such level, or an array without its affine.
            RefusedInput: the volume cannot be read, or is far from what the encoder learned from.
        """
        if not -len(self.channels) <= level < len(self.channels):
            raise ConfigError(
                "level",
                expected=f"0 to {len(self.channels) - 1}, or -1 for the deepest",
                found=str(level),
                remedy="`encoder.strides_DHW` has a row for each level",
            )
        return self.predictor.features(image, affine, level, force=force)


def load_encoder(place: str | PathLike[str], *, device: str | None = None) -> Encoder:
    """The encoder of a bundle, of either kind, with its preprocessing.

    Args:
        place: Folder, or `file://`, `s3://` or `https://` URL of one.
        device: `cpu`, `cuda`, `cuda:1`; None takes the accelerator when there is one.

    Raises:
        ConfigError: the place is neither.
        NotFound: nothing is there.
        RefusedInput: no bundle, a damaged one, or one of a newer version.
    """
    text = fspath(place)
    if text.startswith("models:"):
        raise ConfigError(
            text,
            expected="a folder or a URL",
            found="a model of a registry",
            remedy="from jobs.tracking.encoder import load_encoder",
        )
    with tempfile.TemporaryDirectory(prefix="tomoscale-encoder-") as folder:
        root = fetch_bundle(text, Path(folder) / "bundle") if "://" in text else Path(text)
        if not root.is_dir():
            raise NotFound(
                text,
                expected="a bundle's folder",
                found="none",
                remedy="`tomoscale models pull MODEL FOLDER` makes one",
            )
        predictor = Predictor(root, device)
    levels = predictor.architecture["levels"]
    return Encoder(
        str(predictor.card["name"]),
        predictor,
        tuple((int(d), int(h), int(w)) for d, h, w in (level["stride"] for level in levels)),
        tuple(int(level["channels"]) for level in levels),
    )


def fetch_bundle(url: str, target: Path) -> Path:
    """Copy the files that `bundle.json` at a URL lists to a new folder; returns it. Readers check their digests.

    Args:
        url: As for `storage.objects.open_store`; over HTTP nothing has to be listed.
        target: Folder to create.

    Raises:
        NotFound: nothing is there.
        RefusedInput: no bundle, or one of a newer version.
    """
    store = open_store(url)
    data = store.get(_CARD)
    try:
        card = json.loads(data)
        if not isinstance(card, dict):
            raise ValueError(f"JSON {type(card).__name__}")
    except ValueError as error:
        raise RefusedInput(
            f"{url}/{_CARD}", expected="the card of a bundle", found=str(error), remedy="give the URL of its folder"
        ) from error
    names = [check_key(name) for name in listed_files(f"{url}/{_CARD}", card)]
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(store.get(name))
    (target / _CARD).write_bytes(data)
    return target
