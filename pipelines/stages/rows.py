"""Rows that a user names: a split of a prepared dataset, or a file of examples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pipelines import paths
from pipelines.data import shards
from pipelines.data.raw import SPLITS, Array, Raw, Source, checked_rows

if TYPE_CHECKING:
    from dgm_models.method import Method
    from dgm_models.protocols import DataSpec

TABLES = (".csv", ".parquet")


def read(rows: str, method: Method) -> tuple[Tensor, Tensor | None]:
    """Examples in a model's stored type, and their labels where a split has them.

    Args:
        rows: "<dataset>/<split>"; a .npy of [N, *event]; a .csv or .parquet for a model of vectors: the columns that
            its dataset has, by name, where that is prepared here and names them, otherwise all columns; an image file,
            or a folder of image files, for a model of images.
        method: whose data they are.
    Raises: ValueError that names the rows, what they hold and what is expected.
    """
    from pipelines.data.datasets.image_folder import SUFFIXES

    dataset, _, split = rows.rpartition("/")
    if split in SPLITS and (paths.data(dataset) / "manifest.json").is_file():
        there = shards.load(paths.data(dataset), split)
        x, labels = there.x.numpy(), there.cond
    else:
        suffix, labels = Path(rows).suffix.lower(), None
        if suffix in TABLES:
            x = _table(rows, method)
        elif suffix in SUFFIXES or Path(rows).is_dir():
            x = _images(rows, method.data, SUFFIXES)
        else:
            x = _array(rows, method.data)
    if tuple(x.shape[1:]) != method.data.shape or not len(x):
        raise ValueError(f"{rows}: holds {tuple(x.shape)}; expected [N, *{method.data.shape}]")
    stored = checked_rows(rows, Raw(x, method.data.kind, "", Source(""), method.data.levels)).x
    return torch.from_numpy(stored.copy()), labels


def _array(rows: str, data: DataSpec) -> Array:
    try:
        x = np.load(rows, allow_pickle=False)
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise ValueError(
            f"{rows}: {error}; expected a .npy of examples {data.shape}, a .csv, a .parquet, an image, a folder of "
            "images, or <dataset>/<split>"
        ) from error
    if not isinstance(x, np.ndarray):
        raise ValueError(f"{rows}: an archive of several arrays; expected one .npy array")
    return x.astype(np.float64) if data.levels is None and x.dtype.kind in "iu" else x


def _table(rows: str, method: Method) -> Array:
    from pipelines.data.datasets.table import read_columns

    folder, data = paths.data(str(method.lineage.get("dataset"))), method.data
    names = shards.read_manifest(folder).columns if (folder / "manifest.json").is_file() else ()
    found = read_columns(rows, names or None)
    return found.x if data.levels is None else found.whole(found.x, found.names, data.levels)


def _images(rows: str, data: DataSpec, suffixes: tuple[str, ...]) -> Array:
    """[N, C, H, W]; a model of fewer levels than 256 gets the nearest ones."""
    from pipelines.data import images

    if data.kind != "image" or data.shape[0] not in (1, 3) or data.levels is None:
        raise ValueError(f"{rows}: an image; this model is of {data.kind} {data.shape}")
    there = sorted(Path(rows).iterdir()) if Path(rows).is_dir() else [Path(rows)]
    files = [file for file in there if file.suffix.lower() in suffixes]
    if not files:
        raise ValueError(f"{rows}: no image in it; expected files ending in {', '.join(suffixes)}")
    try:
        contents = [(str(file), file.read_bytes()) for file in files]
    except OSError as error:
        raise ValueError(f"{rows}: {error}; expected an image file, or a folder of them") from error
    x = images.stack(contents, None, data.shape[0], None)
    return x if data.levels == 256 else (x * ((data.levels - 1) / 255)).round().astype(np.int64)
