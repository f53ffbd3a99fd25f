"""What trainings are to start from, seen from the metadata of bundles: no weights are read.

A job is refused here that would be refused on the cluster, or would train from something else than was meant.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jobs.tracking import models
from ssl_core.bundle import DECODER
from ssl_core.downstream.deep_supervision import require_levels
from ssl_core.downstream.heads.network import require_modules
from ssl_core.downstream.settings import Transfer
from ssl_core.downstream.transfer import require_weights, transferred_keys
from ssl_core.networks import Backbone
from ssl_core.networks.outline import check_crop, outline, shapes_only
from ssl_core.portable.card import listed_files
from storage.errors import ConfigError, NotFound, RefusedInput, TomoscaleError
from storage.objects import open_store

_CARD, _ARCHITECTURE = "bundle.json", "architecture.json"


@dataclass(frozen=True)
class Start:
    """What the metadata of a bundle say of it as a start.

    Attributes:
        uri: As it was asked for.
        version: The registered version that it means now; as it was asked for where it is a folder or a URL.
        kind: One of `ssl_core.portable.card.KINDS`.
        backbone: Registered backbone name.
        arguments: Its arguments.
        encoder_keys: Names of the encoder's tensors.
        has_decoder: Whether the decoder was trained too.
        modules: Of each encoder level, finest first, the module of the stock network whose output it is; empty where
            there is none.
    """

    uri: str
    version: str
    kind: str
    backbone: str
    arguments: Mapping[str, Any]
    encoder_keys: tuple[str, ...]
    has_decoder: bool
    modules: tuple[str, ...] = ()

    @property
    def channels(self) -> int:
        """Channels that it takes."""
        return int(self.arguments.get("in_channels", 1))

    def require_transfer(self, transfer: Transfer) -> None:
        """Refuse to take over what was not trained.

        Raises:
            ConfigError: no such network can be built, or it lacks tensors; names the first.
        """
        if transfer in ("trained", "encoder"):  # which are in every bundle
            return
        with shapes_only():
            network = outline(self.backbone, {"out_channels": 2, **self.arguments})
        names = set(network.net.state_dict()) if self.kind == "segmenter" else set(self.encoder_keys)
        if self.has_decoder:
            names |= set(network.decoder_keys())
        require_weights(
            self.uri, transfer, transferred_keys(network, transfer), dict.fromkeys(names, torch.empty(0, device="meta"))
        )

    def brings(self, transfer: Transfer) -> str:
        """What a training takes over of it, in words."""
        whole = self.has_decoder or self.kind == "segmenter"
        if transfer == "encoder" or (transfer == "trained" and not whole):
            return "its encoder"
        return "all but its output layer" if transfer == "all_but_head" else "its encoder and its decoder"

    def require_levels(self, levels: int) -> None:
        """Refuse a network with fewer decoder levels below its output than a training would supervise.

        Raises:
            ConfigError: names the setting and how many there are.
        """
        if levels:
            require_levels(self.backbone, self.arguments, levels)

    def require_pooled(self, levels: int) -> None:
        """Refuse an encoder that lacks levels which a head is to pool.

        Raises:
            ConfigError: names the setting and how many there are.
        """
        require_modules(self.uri, self.modules, levels)

    def require_crop(self, size_DHW: tuple[int, int, int], key: str) -> None:
        """Refuse a crop that the network cannot be trained on.

        Raises:
            ConfigError: no such network can be built, or it cannot take the crop; names the setting.
        """
        check_crop(self.backbone, self.arguments, size_DHW, key)

    def require_network(self, name: str, arguments: Mapping[str, Any]) -> None:
        """Refuse a start of another network than a study's, whatever its number of classes.

        Raises:
            ConfigError: names both networks.
        """
        if self.backbone != name or _shape(self.arguments) != _shape(arguments):
            raise ConfigError(
                self.uri,
                expected=f"a model of the study's network, {name} {_shape(arguments)}",
                found=f"{self.backbone} {_shape(self.arguments)}",
                remedy="set pretrain.backbone to the model's: other networks cannot share their weights and crops",
            )

    def require_encoder(self, name: str, arguments: Mapping[str, Any]) -> None:
        """Refuse a start whose encoder another network does not take tensor by tensor.

        Raises:
            ConfigError: names both networks, or the first tensor that does not fit.
        """
        remedy = f"set backbone.name to {self.backbone}, with the arguments {dict(self.arguments)}"
        if self.backbone != name:
            raise ConfigError(
                self.uri, expected=f"an encoder of backbone.name {name}", found=self.backbone, remedy=remedy
            )
        with shapes_only():
            shapes, others = (_encoder_shapes(outline(name, own)) for own in (self.arguments, arguments))
        odd = next((key for key in {**others, **shapes} if shapes.get(key) != others.get(key)), None)
        if odd is not None:
            raise ConfigError(
                self.uri,
                expected=f"the encoder of the job's network, whose {odd} is {others.get(odd, 'not there')}",
                found=f"{shapes.get(odd, 'none')}",
                remedy=remedy,
            )


def read_start(uri: str) -> Start:
    """The start behind a model URI, in a bundle's folder or at the URL of one.

    Raises:
        NotFound: no such model, version, alias, or nothing at the URL.
        RefusedInput: no bundle, one of a newer version, or metadata that do not match their digest.
        StackError: MLflow is away.
        StoreError: the store of the URL is.
    """
    version, read = _reader(uri)
    card = _object(f"{uri}: {_CARD}", read(_CARD))
    files = listed_files(f"{uri}: {_CARD}", card)
    content = read(_ARCHITECTURE)
    digest = hashlib.sha256(content).hexdigest()
    if digest != files[_ARCHITECTURE]:
        raise RefusedInput(
            f"{uri}: {_ARCHITECTURE}",
            expected=f"SHA-256 {files[_ARCHITECTURE]}",
            found=digest,
            remedy="pull or register the bundle again",
        )
    architecture = _object(f"{uri}: {_ARCHITECTURE}", content)
    missing = [key for key in ("backbone", "backbone_arguments", "encoder_keys") if key not in architecture]
    if missing:
        raise RefusedInput(f"{uri}: {_ARCHITECTURE}", expected=", ".join(missing), found="none")
    return Start(
        uri,
        version,
        str(card["kind"]),
        str(architecture["backbone"]),
        architecture["backbone_arguments"],
        tuple(architecture["encoder_keys"]),
        DECODER in files,
        tuple(str(level.get("module", "")) for level in architecture.get("levels", ())),
    )


def version_of(uri: str) -> str:
    """The registered version that a start means now, as a URI; a folder or a URL as it is.

    Raises:
        NotFound: no such model, version or alias.
    """
    return uri if Path(uri).is_dir() or "://" in uri else models.resolve(uri).uri


@contextmanager
def named(key: str) -> Iterator[None]:
    """Errors within it name a key of the configuration first."""
    try:
        yield
    except TomoscaleError as error:
        raise type(error)(
            f"{key}: {error.thing}", expected=error.expected, found=error.found, remedy=error.remedy
        ) from error


def _reader(uri: str) -> tuple[str, Callable[[str], bytes]]:
    """The version that a URI means now, and what reads one of its bundle's files."""
    folder = Path(uri)
    if folder.is_dir():

        def of_folder(name: str) -> bytes:
            path = folder / name
            if not path.is_file():
                raise RefusedInput(
                    str(folder), expected=f"the folder of a bundle, with {name}", found="none", remedy="name another"
                )
            return path.read_bytes()

        return uri, of_folder
    if folder.is_absolute():
        raise NotFound(uri, expected="the folder of a bundle", found="none")
    if "://" in uri:
        return uri, open_store(uri).get
    version = models.resolve(uri)
    return version.uri, lambda name: models.file_of(version, name)


def _object(name: str, content: bytes) -> dict[str, Any]:
    try:
        data = json.loads(content)
        if not isinstance(data, dict):
            raise ValueError(f"JSON {type(data).__name__}")
    except ValueError as error:
        raise RefusedInput(name, expected="a JSON object", found=str(error), remedy="register it again") from error
    return data


def _encoder_shapes(network: Backbone) -> dict[str, tuple[int, ...]]:
    state = network.net.state_dict()
    return {key: tuple(state[key].shape) for key in network.encoder_keys()}


def _shape(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as they come back from JSON, without the number of classes."""
    plain = json.loads(json.dumps(arguments))
    return {key: value for key, value in sorted(plain.items()) if key != "out_channels"}
