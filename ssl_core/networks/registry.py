"""Backbones by name. Networks of optional packages are imported when they are asked for."""

import difflib
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from ssl_core.networks.feature_centres import offsets
from ssl_core.networks.pyramid import Architecture, Pyramid
from storage.errors import ConfigError

_WHERE = {  # name: module of this package, its architecture, the extra that brings its dependency
    "basic_unet": ("basic_unet", "BASIC_UNET", ""),
    "dynunet": ("dynunet", "DYNUNET", ""),
    "plain_unet": ("nnunet", "PLAIN_UNET", "resenc"),
    "resenc": ("nnunet", "RESENC", "resenc"),
    "segresnet": ("segresnet", "SEGRESNET", ""),
    "swin_unetr": ("swin_unetr", "SWIN_UNETR", "swin"),
    "unet": ("unet", "UNET", ""),
}

# Their arguments, so that a configuration is checked without the seconds that importing a network takes. A test
# compares them with the classes of the locked versions.
_PORTS = "spatial_dims in_channels out_channels "
_ARGUMENTS = {
    name: (_PORTS + rest).split()
    for name, rest in {
        "basic_unet": "features act norm bias dropout upsample",
        "dynunet": "kernel_size strides upsample_kernel_size filters dropout norm_name act_name deep_supervision"
        " deep_supr_num res_block trans_bias",
        "plain_unet": "n_stages features_per_stage conv_op kernel_sizes strides n_conv_per_stage"
        " n_conv_per_stage_decoder conv_bias norm_op norm_op_kwargs dropout_op dropout_op_kwargs nonlin nonlin_kwargs"
        " deep_supervision nonlin_first",
        "resenc": "preset n_stages features_per_stage conv_op kernel_sizes strides n_blocks_per_stage"
        " n_conv_per_stage_decoder conv_bias norm_op norm_op_kwargs dropout_op dropout_op_kwargs nonlin nonlin_kwargs"
        " deep_supervision block bottleneck_channels stem_channels",
        "segresnet": "init_filters dropout_prob act norm norm_name num_groups use_conv_final blocks_down blocks_up"
        " upsample_mode",
        "swin_unetr": "patch_size depths num_heads window_size qkv_bias mlp_ratio feature_size norm_name drop_rate"
        " attn_drop_rate dropout_path_rate normalize norm_layer patch_norm use_checkpoint downsample use_v2 use_hyena"
        " hyena_stages hyena_kernel_size hyena_kernel_mlp_dim hyena_kernel_layers hyena_mask_max_attenuation"
        " hyena_fft_padding hyena_grid_type hyena_use_chunked_fft hyena_use_fft_short_conv hyena_omega_0 hyena_l_cache"
        " hyena_short_conv_fft_chunks use_flash_attention",
        "unet": "channels strides kernel_size up_kernel_size num_res_units act norm dropout bias adn_ordering",
    }.items()
}
# Of those, numbers of channels, blocks and voxels: whole numbers from 1 on, or lists of them.
_COUNTS = {
    *("spatial_dims", "in_channels", "out_channels", "features", "kernel_size", "strides", "upsample_kernel_size"),
    *("filters", "deep_supr_num", "n_stages", "features_per_stage", "kernel_sizes", "n_blocks_per_stage", "channels"),
    *(
        "n_conv_per_stage",
        "n_conv_per_stage_decoder",
        "init_filters",
        "num_groups",
        "blocks_down",
        "blocks_up",
        "patch_size",
        "depths",
    ),
    *("num_heads", "window_size", "feature_size", "up_kernel_size"),
}
# The same from 0 on.
_WHOLE = {"num_res_units", "bottleneck_channels", "stem_channels", "hyena_stages"}
# A text such as `no` would count as true.
_FLAGS = {
    *("bias", "deep_supervision", "res_block", "trans_bias", "conv_bias", "use_conv_final", "qkv_bias", "normalize"),
    *("patch_norm", "use_checkpoint", "use_v2", "use_hyena", "use_flash_attention", "nonlin_first"),
}
_SHARES = {"dropout", "dropout_prob", "drop_rate", "attn_drop_rate", "dropout_path_rate"}
MOST = 1 << 16
"""Channels or voxels of one layer."""
_LAYERS = {"num_res_units", "n_stages", "n_blocks_per_stage", "n_conv_per_stage", "n_conv_per_stage_decoder"}
_LAYERS |= {"blocks_down", "blocks_up", "depths", "deep_supr_num"}
MOST_LAYERS = 128
"""Layers of one level."""


def check_arguments(name: str, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that a named network does not have, and sizes that no network has, without importing it.

    Raises:
        ConfigError: names the argument.
    """
    for key, value in arguments.items():
        thing = f"backbone.arguments.{key}"
        if key not in _ARGUMENTS[name]:
            near = difflib.get_close_matches(str(key), _ARGUMENTS[name], n=1)
            raise ConfigError(
                thing,
                expected=f"an argument of {name}: {', '.join(_ARGUMENTS[name])}",
                found=f"unknown key {key!r}",
                remedy=f"did you mean {near[0]!r}?" if near else "remove it",
            )
        leaves = list(_flat(value))
        if "" in leaves:  # an order of no layers, a norm of no name: a network that nobody meant
            raise ConfigError(thing, expected="no empty text", found=repr(value), remedy="name it, or leave it out")
        if key in _COUNTS and value is not None:
            if not leaves or any(type(leaf) is not int or not 1 <= leaf <= MOST for leaf in leaves):
                raise ConfigError(thing, expected=f"whole numbers from 1 to {MOST}", found=repr(value))
            if key == "spatial_dims" and value not in (2, 3):
                raise ConfigError(thing, expected="2 or 3", found=repr(value))
        if key in _LAYERS and any(type(leaf) is int and leaf > MOST_LAYERS for leaf in leaves):
            raise ConfigError(thing, expected=f"at most {MOST_LAYERS} layers of a level", found=repr(value))
        if key in _WHOLE and value is not None and any(type(leaf) is not int or leaf < 0 for leaf in leaves):
            raise ConfigError(thing, expected="whole numbers from 0 on", found=repr(value))
        if key in _FLAGS and type(value) is not bool:
            raise ConfigError(thing, expected="true or false", found=repr(value))
        if key in _SHARES and key != "dropout" and any(isinstance(leaf, str | bool) for leaf in leaves):
            raise ConfigError(thing, expected="shares from 0 to below 1", found=repr(value))
        if key in _SHARES and any(isinstance(leaf, int | float) and not 0 <= leaf < 1 for leaf in leaves):
            raise ConfigError(thing, expected="shares from 0 to below 1", found=repr(value))
    _check_lengths(name, arguments)


_LEVELS = {
    "unet": {"channels": 0, "strides": -1},
    "dynunet": {"strides": 0, "kernel_size": 0, "filters": 0, "upsample_kernel_size": -1},
}
"""Lists with a number a level, and how many more than levels they have; stock classes cut longer ones in silence."""
_FOUR = {"swin_unetr": ("depths", "num_heads")}


def _check_lengths(name: str, arguments: Mapping[str, Any]) -> None:
    """Refuse lists of which the stock class would leave out the end without a word.

    Raises:
        ConfigError: names the lists and their lengths.
    """
    lengths = {
        key: (len(arguments[key]), more)
        for key, more in _LEVELS.get(name, {}).items()
        if isinstance(arguments.get(key), list | tuple)
    }
    if len({length - more for length, more in lengths.values()}) > 1:
        raise ConfigError(
            " and ".join(f"backbone.arguments.{key}" for key in lengths),
            expected="a number for each level"
            + "".join(f", {key} one fewer" for key, (_, more) in lengths.items() if more),
            found=", ".join(f"{length} {key}" for key, (length, _) in lengths.items()),
        )
    for key in _FOUR.get(name, ()):
        if isinstance(value := arguments.get(key), list | tuple) and len(value) != 4:
            raise ConfigError(f"backbone.arguments.{key}", expected="four numbers, one a stage", found=repr(value))


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _flat(item)
    else:
        yield value


REFUSALS = (TypeError, ValueError, AssertionError, LookupError, AttributeError, ArithmeticError, RuntimeError)
"""What stock classes raise over arguments that do not fit together."""


def backbone_names() -> list[str]:
    """Names that `build` knows, sorted."""
    return sorted(_WHERE)


def architecture(name: str) -> Architecture:
    """How a named network is seen as a pyramid.

    Raises:
        ConfigError: unknown name, or its optional package is not installed.
    """
    if name not in _WHERE:
        raise ConfigError(f"backbone {name!r}", expected="one of " + ", ".join(backbone_names()), found=repr(name))
    module, attribute, extra = _WHERE[name]
    try:
        kind: Architecture = getattr(importlib.import_module(f"ssl_core.networks.{module}"), attribute)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"backbone {name!r}",
            expected="its package to be installed",
            found=str(error),
            remedy=f"pip install 'tomoscale[{extra}]'",
        ) from error
    return kind


def build(name: str, **arguments: Any) -> Pyramid:
    """A backbone with fresh weights.

    Args:
        name: One of `backbone_names()`.
        **arguments: Keyword arguments of the stock class; `in_channels` and `out_channels` for all.

    Raises:
        ConfigError: unknown name, missing package, or arguments that the stock class refuses.
    """
    kind = architecture(name)
    try:
        return Pyramid(name, kind, arguments, offsets(name, kind, arguments))
    except REFUSALS as error:
        raise ConfigError(f"arguments of backbone {name!r}", expected=str(error), found=repr(arguments)) from error
