"""A classifier whose penultimate layer gives the features in which samples are compared."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_models.codecs import centred, discrete
from dgm_models.construct import Positive
from dgm_models.nn.networks import Conv, Network
from dgm_models.objective import Loss, Objective, Turn
from dgm_models.protocols import Batch, DataSpec, Model


class Classifier(Model):
    """network: data -> `feature_dim` features -> class logits.

    The features have mean 0 and variance 1 over the training data, so that distances have a scale that does not
    depend on the network's.
    """

    def __init__(self, data: DataSpec, network: Network, feature_dim: int) -> None:
        super().__init__(data, discrete(data))
        self.trunk = nn.Sequential(
            network.down(data.shape, feature_dim), nn.SiLU(), nn.BatchNorm1d(feature_dim, affine=False)
        )
        self.head = nn.Linear(feature_dim, data.classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features and class logits."""
        found: Tensor = self.trunk(centred(x, self.data))
        return found, self.head(found)

    @torch.no_grad()
    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """([B, feature_dim], [B, classes]) of model-space x."""
        found, logits = self(x)
        return found, logits.softmax(1)


class CrossEntropy(Objective):
    """-log p(label | x)."""

    additive = False  # batch statistics couple the examples

    def turns(self) -> Sequence[Turn]:
        return (Turn("model", self.loss),)

    def loss(self, model: Classifier, batch: Batch) -> Loss:
        assert batch.cond is not None
        _, logits = model(batch.x)
        right = (logits.argmax(1) == batch.cond).sum()
        return Loss(F.cross_entropy(logits, batch.cond, reduction="sum"), {"accuracy": right})


def classifier(
    data: DataSpec, network: Network = Conv(), feature_dim: Positive = 16
) -> tuple[Classifier, CrossEntropy]:
    """A classifier of labelled data.

    Args:
        data: must have classes.
        network: gives the trunk.
        feature_dim: the size of a feature vector; the number of images compared must be at least 10 times this.
    Raises: ValueError for data without labels.
    """
    if data.classes < 2:
        raise ValueError(f"an extractor is trained on labels; this data has {data.classes} classes")
    return Classifier(data, network, feature_dim), CrossEntropy()
