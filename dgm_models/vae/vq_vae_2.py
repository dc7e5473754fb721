"""VQ-VAE-2: two grids of codes, a coarse one for the whole and a fine one for what it leaves open."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor, nn

from dgm_models.codecs import centred
from dgm_models.construct import Fraction, NonNegative, NonNegativeFloat, Positive, Range
from dgm_models.nn.grid import grid_down, grid_up, halved
from dgm_models.nn.quantize import (
    Learning,
    Level,
    Pick,
    Quantization,
    Quantized,
    Quantizer,
    to_grid,
    to_vectors,
)
from dgm_models.ops.likelihoods import Name
from dgm_models.protocols import DataSpec
from dgm_models.training.runtime import current


class VqVae2(Quantized):
    """The top codes see the whole image; the bottom codes see the image and the top's vectors; the decoder sees both.

    The codes of an example are one vector, the top's before the bottom's: a prior models both levels together.

    Args:
        data, likelihood: as `Quantized`.
        top, bottom: the codebooks.
        width, blocks: channels and residual blocks of every network.
        bottom_halvings: of the image's sides to the bottom grid; the top's sides are half of the bottom's.
    """

    def __init__(
        self,
        data: DataSpec,
        likelihood: Name,
        top: Quantizer,
        bottom: Quantizer,
        width: int,
        blocks: int,
        bottom_halvings: int,
    ) -> None:
        sides = [halved(data.shape, bottom_halvings + 1), halved(data.shape, bottom_halvings)]
        sizes = [height * width for height, width in sides]
        super().__init__(data, likelihood, [top, bottom], (sum(sizes),))
        self.sides = sides
        channels, dim = data.shape[0], bottom.dim
        self.bottom_encoder = grid_down(channels, width, bottom_halvings, blocks, width)
        self.top_encoder = grid_down(width, width, 1, blocks, dim)
        self.top_decoder = grid_up(dim, width, 1, blocks, dim)
        self.to_bottom = nn.Conv2d(width + dim, dim, 1)
        self.widen = nn.ConvTranspose2d(dim, dim, 4, 2, 1)
        self.decoder = grid_up(2 * dim, width, bottom_halvings, blocks, self.likelihood.num_params * channels)

    def sizes(self) -> list[int]:
        return [height * width for height, width in self.sides]

    def levels(self, x: Tensor, pick: Pick) -> list[Level]:
        top, bottom = self.quantizers
        assert isinstance(top, Quantizer) and isinstance(bottom, Quantizer)
        fine = self.bottom_encoder(centred(x, self.data))  # [B, width, 2h, 2w]
        z_top = to_vectors(self.top_encoder(fine))
        coarse = Level(top, z_top, pick(top, z_top))
        seen = self.top_decoder(to_grid(coarse.through, self.sides[0]))  # [B, D, 2h, 2w]
        z_bottom = to_vectors(self.to_bottom(torch.cat([fine, seen], 1)))
        return [coarse, Level(bottom, z_bottom, pick(bottom, z_bottom))]

    def outputs(self, vectors: Sequence[Tensor]) -> Tensor:
        top, bottom = (to_grid(part, sides) for part, sides in zip(vectors, self.sides, strict=True))
        flat: Tensor = self.decoder(torch.cat([self.widen(top), bottom], 1))
        return flat.reshape(len(flat), self.likelihood.num_params, *self.data.shape)


def vq_vae_2(
    data: DataSpec,
    width: Positive = 128,
    blocks: NonNegative = 2,
    bottom_halvings: NonNegative = 2,
    codebook_size: Annotated[int, Range(2)] = 512,
    code_dim: Positive = 64,
    codebook: Learning = "ema",
    commitment: NonNegativeFloat = 0.25,
    decay: Fraction = 0.99,
    restart: Fraction = 0.1,
    likelihood: Name = "auto",
) -> tuple[VqVae2, Quantization]:
    """A VQ-VAE of two levels; alone its prior of the codes is uniform, as it is in training.

    Source: Razavi et al. 2019, section 3.1, arXiv:1906.00446. Differs: a likelihood of the stored data in place of the
    squared error; one prior models the codes of both levels, where the paper's bottom prior is conditioned on the top.

    Args:
        data: images.
        width, blocks: channels and residual blocks of every network.
        bottom_halvings: of the image's sides: 28 x 28 and one halving have 14 x 14 bottom and 7 x 7 top codes.
        codebook_size, code_dim: K vectors of D numbers, for either level.
        codebook: follows its vectors' means, or is learned by gradient.
        commitment: beta: how strongly the encoder is held to its codes.
        decay: of the codebooks' averages.
        restart: codes used less than this share of 1/K are put onto vectors of the batch; 0 for never.
        likelihood: p(x|codes) of a stored value.
    """
    top, bottom = (Quantizer(codebook_size, code_dim, codebook) for _ in range(2))
    model = VqVae2(data, likelihood, top, bottom, width, blocks, bottom_halvings)
    return model, Quantization([top, bottom], current, commitment, decay, restart)
