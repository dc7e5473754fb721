"""MNIST: 60,000 + 10,000 handwritten digits, 28 x 28, 256 levels, 10 classes."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.data.fetch import RawFile
from pipelines.data.idx import read_idx_dataset
from pipelines.data.raw import Raw

HOME = "https://ossci-datasets.s3.amazonaws.com/mnist/"
FILES = {
    key: RawFile("mnist", (name,), HOME, f"md5:{md5}")
    for key, name, md5 in (
        ("train-images", "train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
        ("train-labels", "train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432"),
        ("t10k-images", "t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3"),
        ("t10k-labels", "t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c"),
    )
}
LICENCE = "CC BY-SA 3.0, as commonly stated"


@dataclass(frozen=True)
class Mnist:
    """Test is the source's t10k; valid is cut from the source's train.

    Args:
        mirror: a folder, file://, http(s):// or s3:// prefix with a subfolder mnist/; None is the public home.
            DGM_DATA_MIRROR takes precedence.

    Source: LeCun, Cortes, Burges 1998, "The MNIST database of handwritten digits".
    """

    mirror: str | None = None

    def read(self, seed: int) -> Raw:
        return read_idx_dataset(FILES, self.mirror, licence=LICENCE, class_names=tuple("0123456789"))
