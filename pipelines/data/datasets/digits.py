"""scikit-learn's digits: 1,797 real handwritten digits, 8 x 8, 17 levels, 10 classes; needs no download."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from pipelines.data.raw import Raw, Source

SHA256 = ""


@dataclass(frozen=True)
class Digits:
    """It has no settings: the rows come with scikit-learn.

    Source: Alpaydin and Kaynak 1998, "Optical Recognition of Handwritten Digits", UCI; its test set.
    """

    def read(self, seed: int) -> Raw:
        from sklearn.datasets import load_digits  # here, not above: it costs a second

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
