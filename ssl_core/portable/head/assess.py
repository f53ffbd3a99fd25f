"""From a scan to its class or its number, and rows of a table of them."""

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ConfigError, RefusedInput, StackError
from ..inference.slabs import Slabs, Source
from ..network import feature_maps
from ..predictor import Predictor
from .pooling import pooled, volume_features
from .settings import Head

Row = Mapping[str, str | float]


def head_of(predictor: Predictor) -> Head:
    """The head of a model.

    Raises:
        ConfigError: it has none.
    """
    if predictor.head is None:
        raise ConfigError(
            f"model {predictor.card['name']}",
            expected="a classifier or a regressor",
            found=f"kind {predictor.kind}",
            remedy="fine-tune one with `finetune.task`",
        )
    return predictor.head


def window_features(predictor: Predictor, x_BCDHW: Tensor) -> Tensor:
    """Pooled features of windows, (B, E)."""
    modules = [entry["module"] for entry in predictor.architecture["levels"][-head_of(predictor).levels :]]
    return pooled(feature_maps(predictor.network, predictor.dims, modules, x_BCDHW))


def assess(
    predictor: Predictor,
    source: str | os.PathLike[str] | NDArray[Any],
    affine: NDArray[Any] | None = None,
    *,
    force: bool = False,
    modality: str = "",
) -> Row:
    """Class and probabilities of one volume, or its value in the unit of the column.

    Args:
        predictor: A classifier or a regressor.
        source: A `.nii` or `.nii.gz` file, or an array (I, J, K) or (I, J, K, C) in file order.
        affine: (4, 4) of an array; voxel-centre indices to RAS+ mm.
        force: Take what is far from all that the model learned from, with a note instead of a refusal.
        modality: `CT`, `MR`, ... where it is known.

    Raises:
        RefusedInput: the volume cannot be read, has another number of channels, or is far from what it learned from.
        ConfigError: the model has no head, or an array came without its affine.
    """
    head_of(predictor)
    name, array, matrix = predictor.volume(source, affine)
    canonical = predictor.canonical(array, matrix, name=name)
    return assess_values(predictor, canonical.values_CDHW, canonical.affine, name=name, force=force, modality=modality)


def assess_values(
    predictor: Predictor,
    values_CDHW: NDArray[Any] | Source | Slabs,
    affine: NDArray[np.float64],
    stats: Sequence[dict[str, float]] | None = None,
    *,
    name: str = "volume",
    modality: str = "",
    force: bool = False,
) -> Row:
    """The same of a canonical volume of values; see `Predictor.segment`.

    Raises:
        RefusedInput: as for `assess`, or the network's output is not finite.
        ConfigError: the model has no head.
    """
    head = head_of(predictor)
    prepared = predictor.intake.prepared(name, values_CDHW, affine, stats, modality, force)
    features_E = volume_features(
        lambda x_BCDHW: window_features(predictor, x_BCDHW),
        prepared.read,
        prepared.shape_DHW,
        prepared.air_C,
        predictor.plan.patch_DHW,
        device=predictor.device,
        batch=predictor.batch,
    )
    outputs_K = head.outputs(features_E[None])[0]
    if not torch.isfinite(outputs_K).all():
        raise RefusedInput(
            name,
            expected="finite output of the network",
            found="NaN or infinity",
            remedy="check the intensities of the volume, and the model on one that it learned from",
        )
    return head.row(outputs_K)


def write_table(path: Path, head: Head, rows: Iterable[tuple[str, Row]]) -> None:
    """A CSV file, whole or not at all: a line for each scan, `scan` and what `Head.names` says.

    Args:
        path: The file.
        head: Whose results they are.
        rows: Name of each scan, and its result.

    Raises:
        ConfigError: its name does not end in `.csv`.
        StackError: the disk does not take it.
    """
    if path.suffix.lower() != ".csv":
        raise ConfigError(
            "output", expected="a name that ends in .csv", found=str(path), remedy="name the table of results so"
        )
    hidden = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with hidden.open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(("scan", *head.names))
            for name, row in rows:
                table.writerow((name, *(row[key] for key in head.names)))
            file.flush()
            os.fsync(file.fileno())
        os.replace(hidden, path)
    except OSError as error:
        raise StackError(
            str(path),
            expected="a file written to a disk with room, by a user with the right to",
            found=error.strerror or str(error),
            remedy="free space, change the owner of the folder, or give another place",
        ) from error
    finally:
        hidden.unlink(missing_ok=True)
