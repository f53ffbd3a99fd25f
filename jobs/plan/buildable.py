"""Whether a job's network and method can take a step at all, seen from shapes alone: seconds, no data, no memory."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from jobs.configs import FinetuneJobConfig, PretrainConfig
from jobs.configs.search import TuneConfig
from jobs.configs.study import StudyConfig
from jobs.plan.one_rank import OneRank
from jobs.tracking.starts import named
from ssl_core.downstream.deep_supervision import require_levels
from ssl_core.downstream.settings import FinetuneConfig
from ssl_core.methods.base import StepContext, method_class
from ssl_core.networks.batch_norm import bind
from ssl_core.networks.outline import NEEDS_NUMBERS, check_crop, outline, shapes_only
from ssl_core.networks.pyramid import cut_batches
from ssl_core.networks.registry import REFUSALS, build
from ssl_core.views.types import RoleSpec, View, ViewBatch, ViewSpec
from storage.errors import ConfigError


def require_buildable(config: PretrainConfig | TuneConfig | FinetuneJobConfig | StudyConfig) -> None:
    """Refuse a job whose network cannot be built, or whose method cannot work on it with these crops.

    Of a search and a fine-tuning, the networks of those starts that are folders of bundles here are asked. Of a study,
    every pre-training and the patch of its fine-tuning.

    Raises:
        ConfigError: names the setting.
    """
    if isinstance(config, PretrainConfig):
        _require_method(config)
        return
    if isinstance(config, StudyConfig):
        _require_study(config)
        return
    for uri in config.encoders if isinstance(config, TuneConfig) else config.starts.values():
        if (path := Path(uri) / "architecture.json").is_file():
            network = json.loads(path.read_text(encoding="utf-8"))
            _require_finetuning(network["backbone"], network["backbone_arguments"], config.finetune)


def _require_finetuning(name: str, arguments: Mapping[str, Any], finetune: FinetuneConfig) -> None:
    check_crop(name, arguments, finetune.patch_DHW, "finetune.patch_DHW")
    if finetune.deep_supervision:
        require_levels(name, arguments, finetune.deep_supervision)


def _require_study(config: StudyConfig) -> None:
    network = config.pretraining(None, 0).backbone
    _require_finetuning(network.name, network.arguments, config.finetune)
    for name, start in config.starts.items():
        if start.pretrain is not None:
            with named(config.pretraining_key(name)):
                _require_method(config.pretraining(name, 0))


def _require_method(config: PretrainConfig) -> None:
    name, arguments = config.backbone.name, config.backbone.arguments
    share = config.stream.global_batch // config.engine.accumulate // config.cluster.workers
    with shapes_only():
        backbone = outline(name, arguments)
        try:
            _step(config, backbone, share)
            return
        except NEEDS_NUMBERS:
            return
        except ConfigError as error:
            raise _located(config, error) from error
        except REFUSALS:
            pass
    # A method may do what shapes alone cannot: what numbers say counts.
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            _step(config, build(name, **arguments), min(share, 2))
    except ConfigError as error:
        raise _located(config, error) from error
    except REFUSALS as error:
        raise ConfigError(
            f"method {config.method_name} on backbone {name}",
            expected="a method, a network and crops that fit together",
            found=" ".join(str(error).split()) or type(error).__name__,
            remedy="compare backbone.arguments and the sizes of the method's crops",
        ) from error


def _step(config: PretrainConfig, backbone: Any, count: int) -> None:
    """The forward pass of a step on nothing in particular."""
    kind = method_class(config.method_name)
    method = kind(config.method_config, backbone).train()
    collectives = OneRank(config.cluster.workers)
    bind(method, collectives)
    cut_batches(method, 1 if config.engine.micro_batch is None else -(-count // config.engine.micro_batch))
    channels = int(config.backbone.arguments.get("in_channels", 1))
    views = _views(kind.view_spec(config.method_config), count, channels)
    method(views, StepContext(0, config.engine.steps, config.engine.seed, collectives))


def _views(spec: ViewSpec, count: int, channels: int) -> ViewBatch:
    index_B = torch.arange(count)
    ones_B3 = torch.ones(count, 3, dtype=torch.float64)
    roles = {
        role.name: tuple(_view(role, spec.maps, count, channels) for _ in range(role.count)) for role in spec.roles
    }
    return ViewBatch(roles, index_B, index_B.clone(), ones_B3, ones_B3 * max(max(r.size_DHW) for r in spec.roles))


def _view(role: RoleSpec, maps: tuple[str, ...], count: int, channels: int) -> View:
    image = torch.rand(count, channels, *role.size_DHW)
    to_volume_34 = torch.cat([torch.eye(3, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)], dim=1)
    return View(
        image_BCDHW=image,
        to_volume_B34=to_volume_34.expand(count, 3, 4).clone(),
        position_B3=torch.rand(count, 3, dtype=torch.float64),
        valid_B1DHW=torch.ones(count, 1, *role.size_DHW),
        clean_BCDHW=image.clone() if role.keep_clean else None,
        maps={name: torch.randint(0, 8, (count, *role.size_DHW)) for name in maps},
    )


def _located(config: PretrainConfig, error: ConfigError) -> ConfigError:
    """The error with the key of the configuration that it is about."""
    thing, remedy = error.thing, error.remedy
    if thing in config.method:
        thing = f"method.{thing}"
    elif thing.startswith("input of backbone"):
        keys = [key for key, value in _leaves(config.method, "method") if str(tuple(value)) in error.found]
        thing = f"{' and '.join(keys) or 'the crops of the method'} with backbone.arguments of {config.backbone.name}"
        remedy = remedy or "change the size, or the strides of the network"
    return ConfigError(thing, expected=error.expected, found=error.found, remedy=remedy)


def _leaves(value: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    """Lists in a method's settings, by dotted key."""
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _leaves(item, f"{path}.{key}")
        elif isinstance(item, list | tuple):
            yield f"{path}.{key}", item
