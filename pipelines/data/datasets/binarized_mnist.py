"""The fixed ("static") binarization of MNIST: 50,000 + 10,000 + 10,000 binary images, no labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipelines.data.fetch import RawFile, fetch
from pipelines.data.raw import Array, Raw, Source

HOME = "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/"
SIDE = 28
FILES = {
    split: RawFile(
        "binarized-mnist",
        (f"binarized_mnist_{split}.amat", f"binarized_mnist_{split}.amat.gz"),
        HOME,
        f"sha256:{sha256}",
        unpacked=True,
    )
    for split, sha256 in (
        ("train", "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d"),
        ("valid", "1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2"),
        ("test", "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c"),
    )
}


@dataclass(frozen=True)
class BinarizedMnist:
    """The numbers of the NADE, MADE and PixelRNN tables are on these rows; all three splits are the source's.

    Args:
        mirror: a folder, file://, http(s):// or s3:// prefix with a subfolder binarized-mnist/ that holds the .amat
            files plain or as .gz; None is the public home. DGM_DATA_MIRROR takes precedence.

    Source: Salakhutdinov and Murray 2008; the files are Larochelle and Murray's (2011).
    """

    mirror: str | None = None

    def read(self, seed: int) -> Raw:
        arrays, splits, sums, start = [], {}, {}, 0
        for split, file in FILES.items():
            got = fetch(file, self.mirror)
            arrays.append(parse_amat(got.content, got.label))
            splits[split] = (start, start := start + len(arrays[-1]))
            sums[file.names[0]] = got.sha256
        return Raw(
            x=np.concatenate(arrays).reshape(-1, 1, SIDE, SIDE),
            kind="image",
            levels=2,
            splits=splits,
            licence="derived from MNIST (CC BY-SA 3.0, as commonly stated)",
            source=Source(HOME, sums),
        )


def parse_amat(content: bytes, label: str) -> Array:
    """[N, 784] uint8 from lines of 784 characters 0 and 1 with a space between them.

    Raises: ValueError for another line length or another character.
    """
    width = 2 * SIDE * SIDE  # a digit and a separator a pixel
    if not content or len(content) % width:
        raise ValueError(f"{label}: {len(content)} bytes; expected whole lines of {width}")
    lines = np.frombuffer(content, np.uint8).reshape(-1, width)
    pixels = lines[:, 0::2] - ord("0")
    ends = lines[:, 1::2]
    for wrong in (pixels > 1, ends != np.frombuffer(b" " * (SIDE * SIDE - 1) + b"\n", np.uint8)):
        if wrong.any():
            row = int(np.argwhere(wrong)[0][0])
            raise ValueError(f"{label}: line {row + 1} differs; expected {SIDE * SIDE} digits 0 or 1, one space apart")
    return pixels
