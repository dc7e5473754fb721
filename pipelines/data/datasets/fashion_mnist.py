"""Fashion-MNIST: 60,000 + 10,000 pictures of clothes, 28 x 28, 256 levels, 10 classes."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.data.fetch import RawFile
from pipelines.data.idx import read_idx_dataset
from pipelines.data.raw import Raw

HOME = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FILES = {
    key: RawFile("fashion-mnist", (name,), HOME, f"md5:{md5}")
    for key, name, md5 in (
        ("train-images", "train-images-idx3-ubyte.gz", "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
        ("train-labels", "train-labels-idx1-ubyte.gz", "25c81989df183df01b3e8a0aad5dffbe"),
        ("t10k-images", "t10k-images-idx3-ubyte.gz", "bef4ecab320f06d8554ea6380940ec79"),
        ("t10k-labels", "t10k-labels-idx1-ubyte.gz", "bb300cfdad3c16e7a12a480ee83cd310"),
    )
}
CLASSES = (
    "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


@dataclass(frozen=True)
class FashionMnist:
    """Test is the source's t10k; valid is cut from the source's train.

    Args:
        mirror: a folder, file://, http(s):// or s3:// prefix with a subfolder fashion-mnist/; None is the public
            home. DGM_DATA_MIRROR takes precedence.

    Source: Xiao, Rasul, Vollgraf 2017, arXiv:1708.07747.
    """

    mirror: str | None = None

    def read(self, seed: int) -> Raw:
        return read_idx_dataset(FILES, self.mirror, licence="MIT", class_names=CLASSES)
