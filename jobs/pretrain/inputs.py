"""What a pre-training job reads: its manifest, the views of its method, and the stream that serves them."""

import numpy as np

from jobs.configs import PretrainConfig
from ssl_core.methods.base import method_class
from ssl_core.views.placement_size import host_size
from ssl_core.views.types import ViewSpec
from storage.errors import ConfigError
from storage.format.manifest import Manifest
from storage.stream.plan import StreamSpec


def open_manifest(config: PretrainConfig) -> Manifest:
    """The manifest that the job reads, checked to have volumes of its split and what the method wants beside them.

    Raises:
        ConfigError: no such volumes, or some of them without the method's super-pixels; says how to make them.
    """
    manifest = Manifest.open(config.data, config.fingerprint)
    if not len(manifest.select(split=config.stream.split)):
        raise ConfigError(
            f"stream.split {config.stream.split!r}",
            expected=f"a split with volumes in {config.data}",
            found="none",
            remedy="`tomoscale data show URL` lists the splits",
        )
    require_superpixels(config, manifest, view_spec(config))
    return manifest


def view_spec(config: PretrainConfig) -> ViewSpec:
    """The views that the job's method asks for."""
    spec: ViewSpec = method_class(config.method_name).view_spec(config.method_config)
    return spec


def reads_labels(config: PretrainConfig) -> bool:
    """Whether the job's method learns from label maps: any map but super-pixels, which are made of the voxels."""
    views = view_spec(config)
    return not set(views.maps) <= {settings.name for settings in views.superpixels}


def stream_spec(config: PretrainConfig) -> StreamSpec:
    """The stream that the method's views need."""
    views = view_spec(config)
    return StreamSpec(
        seed=config.engine.seed,
        global_batch=config.stream.global_batch,
        crop_DHW=host_size(views),
        lanes=config.stream.lanes,
        crops_per_visit=config.stream.crops_per_visit,
        split=config.stream.split,
        foreground=config.stream.foreground,
        maps=views.maps,
    )


def require_superpixels(config: PretrainConfig, manifest: Manifest, views: ViewSpec) -> None:
    """Refuse a manifest in which volumes that the job would read lack super-pixels.

    Raises:
        ConfigError: names the store and the command that makes them.
    """
    if not views.superpixels:
        return
    computed = {settings.name for settings in views.superpixels}
    rows = manifest.select(split=config.stream.split)
    for name in views.maps:
        if name not in computed:  # volumes without the label are left out anyway
            rows = np.intersect1d(rows, manifest.select(labelled=name))
    for settings in views.superpixels:
        without = np.setdiff1d(rows, manifest.select(labelled=settings.name))
        if len(without):
            command = " ".join(["tomoscale data superpixels", config.data, *settings.overrides()])
            unpin = ", and pin the new manifest or leave `fingerprint` empty" if config.fingerprint else ""
            raise ConfigError(
                f"super-pixels of {config.data}",
                expected=f"{settings.name} beside all {len(rows)} volumes of split {config.stream.split!r}",
                found=f"{len(without)} without it in manifest {manifest.fingerprint}",
                remedy=f"make them: {command}{unpin}",
            )
