"""The table of datasets; nothing is imported until it is asked for, torch neither."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, cast

from dgm_models.construct import ConfigError, did_you_mean

if TYPE_CHECKING:
    from pipelines.data.raw import Dataset

TABLE = {
    "digits": "pipelines.data.datasets.digits:Digits",
    "mnist": "pipelines.data.datasets.mnist:Mnist",
    "fashion-mnist": "pipelines.data.datasets.fashion_mnist:FashionMnist",
    "binarized-mnist": "pipelines.data.datasets.binarized_mnist:BinarizedMnist",
    "moons": "pipelines.data.datasets.moons:Moons",
    "eight-gaussians": "pipelines.data.datasets.eight_gaussians:EightGaussians",
    "checkerboard": "pipelines.data.datasets.checkerboard:Checkerboard",
    "pinwheel": "pipelines.data.datasets.pinwheel:Pinwheel",
    "shapes": "pipelines.data.datasets.shapes:Shapes",
    "plucks": "pipelines.data.datasets.plucks:Plucks",
    "image-folder": "pipelines.data.datasets.image_folder:ImageFolder",
    "audio-folder": "pipelines.data.datasets.audio_folder:AudioFolder",
    "npy": "pipelines.data.datasets.npy:Npy",
    "parquet": "pipelines.data.datasets.parquet:Parquet",
    "table": "pipelines.data.datasets.table:Table",
    "uci-binary": "pipelines.data.datasets.uci_binary:UciBinary",
    "uci-real": "pipelines.data.datasets.uci_real:UciReal",
}
INDEXED = ("image-folder", "parquet")  # those with an `index`, which can be read block by block


def dataset_class(name: str, path: str = "dataset") -> type[Dataset]:
    """The class behind a name. Raises: ConfigError, a ValueError, with the nearest name or all of them."""
    if name not in TABLE:
        raise ConfigError(f"{path}.name: {name!r} is not known{did_you_mean(name, TABLE)}")
    module, attribute = TABLE[name].split(":")
    return cast("type[Dataset]", getattr(import_module(module), attribute))
