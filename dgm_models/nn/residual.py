"""Residual blocks that halve or double an image, of WGAN-GP and SNGAN."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dgm_models.nn.layers import Norm, normalisation

Size = tuple[int, int]


def glorot(layer: nn.Module, gain: float) -> nn.Module:
    """Uniform weights of variance 2 gain^2 / (fan in + fan out), bias 0."""
    assert isinstance(layer, (nn.Linear, nn.Conv2d))
    nn.init.xavier_uniform_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class UpBlock(nn.Module):
    """norm, relu, nearest upsampling, 3x3, norm, relu, 3x3, added to a 1x1 convolution of the upsampled input.

    Source: Gulrajani et al. 2017, appendix C, arXiv:1704.00028; initial weights of Miyato et al. 2018,
    arXiv:1802.05957: Glorot with gain sqrt 2 in the residual branch and 1 in the shortcut.
    """

    def __init__(self, before: int, after: int, size: Size, norm: Norm) -> None:
        super().__init__()
        self.size = size
        self.first = nn.Sequential(normalisation(norm, before), nn.ReLU())
        self.second = nn.Sequential(
            glorot(nn.Conv2d(before, after, 3, padding=1), 2**0.5),
            normalisation(norm, after),
            nn.ReLU(),
            glorot(nn.Conv2d(after, after, 3, padding=1), 2**0.5),
        )
        self.shortcut = glorot(nn.Conv2d(before, after, 1), 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """[B, before, h, w] -> [B, after, *size]."""
        out: Tensor = self.second(F.interpolate(self.first(x), self.size, mode="nearest"))
        # a 1x1 convolution and a repetition of pixels commute: the small image is the cheaper one
        return out + F.interpolate(self.shortcut(x), self.size, mode="nearest")


class DownBlock(nn.Module):
    """norm, relu, 3x3, norm, relu, 3x3, mean pooling, added to a 1x1 convolution of the pooled input.

    Args:
        before, after: channels.
        size: of the output; None does not pool.
        norm: in the residual branch.
        first: the block sees the data: it begins with a convolution and normalises nothing.
    """

    def __init__(self, before: int, after: int, size: Size | None, norm: Norm, first: bool = False) -> None:
        super().__init__()
        self.size = size
        if first:
            norm = "none"
        self.residual = nn.Sequential(
            *([] if first else [normalisation(norm, before), nn.ReLU()]),
            glorot(nn.Conv2d(before, after, 3, padding=1), 2**0.5),
            normalisation(norm, after),
            nn.ReLU(),
            glorot(nn.Conv2d(after, after, 3, padding=1), 2**0.5),
        )
        same = before == after and size is None
        self.shortcut = nn.Identity() if same else glorot(nn.Conv2d(before, after, 1), 1.0)

    def _pooled(self, x: Tensor) -> Tensor:
        return x if self.size is None else F.interpolate(x, self.size, mode="area")

    def forward(self, x: Tensor) -> Tensor:
        """[B, before, h, w] -> [B, after, *size]."""
        out: Tensor = self._pooled(self.residual(x)) + self.shortcut(self._pooled(x))
        return out


class MeanPool(nn.Module):
    """[B, C, H, W] -> [B, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))
