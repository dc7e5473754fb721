"""The diffusion transformer: patches of an image as places, told through the normalisations how noisy they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_models.construct import Positive
from dgm_models.nn.attention import Attention
from dgm_models.nn.backbones import Backbone, sides, sinusoidal, zeroed


@dataclass(frozen=True)
class DiT(Backbone):
    """A transformer over patches whose blocks begin as identities (adaLN-Zero).

    Source: Peebles and Xie 2023, section 3, arXiv:2212.09748. Differs: tokens are attended to beside the patches.

    Args:
        width: of a place.
        depth: blocks.
        heads: of each attention.
        patch: pixels a side of one place.
        places: what tells a place where it is: "waves", fixed sines and cosines of row and column, or "learned".
    """

    name: ClassVar[str] = "dit"
    width: Positive = 128
    depth: Positive = 4
    heads: Positive = 4
    patch: Positive = 2
    places: Literal["waves", "learned"] = "waves"

    @property
    def embed_dim(self) -> int:
        return self.width

    def build(self, shape: tuple[int, ...], out_shape: tuple[int, ...], tokens: bool = False) -> nn.Module:
        _, height, width = sides(shape, self.name)
        if height % self.patch or width % self.patch:
            ways = ", ".join(
                str(side) for side in range(1, min(height, width) + 1) if not (height % side or width % side)
            )
            raise ValueError(f"network.patch: {self.patch} does not divide {height} x {width}; use one of {ways}")
        return _DiT(self, sides(shape, self.name), out_shape[0], tokens)


class _DiT(nn.Module):
    places: Tensor

    def __init__(self, settings: DiT, shape: tuple[int, int, int], out_channels: int, tokens: bool) -> None:
        super().__init__()
        channels, height, columns = shape
        self.patch, width = settings.patch, settings.width
        rows, columns = height // self.patch, columns // self.patch
        self.size = (rows, columns)
        self.first = nn.Linear(channels * self.patch**2, width)
        if settings.places == "learned":
            self.places = nn.Parameter(torch.randn(rows * columns, width) * 0.02)
        else:
            self.register_buffer("places", _waves(rows, columns, width), persistent=False)
        self.blocks = nn.ModuleList(_Block(settings, tokens) for _ in range(settings.depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.told = zeroed(nn.Linear(width, 2 * width))
        self.last = zeroed(nn.Linear(width, out_channels * self.patch**2))

    def forward(self, x: Tensor, embedding: Tensor, tokens: Tensor | None) -> Tensor:
        told = F.silu(embedding)
        h = self.first(F.pixel_unshuffle(x, self.patch).flatten(2).transpose(1, 2)) + self.places  # [B, places, width]
        for block in self.blocks:
            h = block(h, told, tokens)
        scale, shift = self.told(told)[:, None].chunk(2, 2)
        h = self.last(self.norm(h) * (1 + scale) + shift)
        return F.pixel_shuffle(h.transpose(1, 2).unflatten(2, self.size), self.patch)


class _Block(nn.Module):
    """x + gate attention(scaled norm(x)), then x + gate mlp(scaled norm(x)); gates, scales and shifts begin at 0."""

    def __init__(self, settings: DiT, tokens: bool) -> None:
        super().__init__()
        width = settings.width
        self.attention_norm = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = Attention(width, settings.heads, width if tokens else 0)
        self.mlp_norm = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.told = zeroed(nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, told: Tensor, tokens: Tensor | None) -> Tensor:
        """[B, places, width] from x [B, places, width], told [B, width] and tokens [B, T, width] or None."""
        scale, shift, gate, mlp_scale, mlp_shift, mlp_gate = self.told(told)[:, None].chunk(6, 2)
        x = x + gate * self.attention(self.attention_norm(x) * (1 + scale) + shift, tokens)
        out: Tensor = x + mlp_gate * self.mlp(self.mlp_norm(x) * (1 + mlp_scale) + mlp_shift)
        return out


def _waves(rows: int, columns: int, width: int) -> Tensor:
    """[rows * columns, width]: one half says the row, the other the column."""
    down, across = (
        sinusoidal(torch.arange(rows).float(), width // 2),
        sinusoidal(torch.arange(columns).float(), width - width // 2),
    )
    grid = [down[:, None].expand(-1, columns, -1), across[None].expand(rows, -1, -1)]
    return torch.cat(grid, 2).flatten(0, 1)
