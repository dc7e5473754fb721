"""scikit-learn's digits: 1,797 real handwritten digits, 8 x 8, 17 levels, 10 classes; needs no download."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from pipelines.data.raw import Raw, Source

SHA256 = "fe61bc84cd6a594d5ed1b937b7d8f8f791d4091d2a9df91fe5d6066156a4db6e"  # images uint8, target int32


@dataclass(frozen=True)
class Digits:
    """It has no settings: the rows come with scikit-learn.

    Source: Alpaydin and Kaynak 1998, "Optical Recognition of Handwritten Digits", UCI; its test set.
    """

    def read(self, seed: int) -> Raw:
        # scikit-learn costs a second and only this dataset needs it
        from sklearn.datasets import load_digits  # type: ignore[import-untyped, unused-ignore]

        bunch = load_digits()
        x, labels = bunch.images.astype(np.uint8)[:, None], bunch.target.astype(np.int32)  # [N, 1, 8, 8]
        found = hashlib.sha256(x.tobytes() + labels.astype("<i4").tobytes()).hexdigest()
        if found != SHA256:
            raise ValueError(f"digits: scikit-learn's load_digits has sha256 {found}; expected {SHA256}")
        return Raw(
            x=x,
            labels=labels,
            kind="image",
            levels=17,
            classes=10,
            class_names=tuple("0123456789"),
            licence="CC BY 4.0",
            source=Source("sklearn.datasets.load_digits (UCI 80, optical recognition of handwritten digits)",
                          {"images uint8 + target int32": found}),
        )  # fmt: skip
