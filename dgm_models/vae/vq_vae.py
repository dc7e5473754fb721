"""The vector-quantised VAE: a grid of codes, each the number of the nearest of K vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from torch import Tensor, nn

from dgm_models.codecs import centred
from dgm_models.construct import Fraction, NonNegative, NonNegativeFloat, Positive, Range
from dgm_models.nn.grid import grid_down, grid_up, halved
from dgm_models.nn.networks import Mlp
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


class VqVae(Quantized):
    """encoder -> z [B, n, D] -> the nearest code of each -> decoder -> p(x|codes).

    Images have a grid of codes and convolutions; vectors have a row of codes and fully connected layers.

    Args:
        data, likelihood: as `Quantized`.
        quantizer: the codebook.
        width, blocks: channels and residual blocks of either network; units of a hidden layer for vectors.
        halvings: of an image's sides.
        vector_codes: codes of a vector.
    """

    def __init__(
        self,
        data: DataSpec,
        likelihood: Name,
        quantizer: Quantizer,
        width: int,
        blocks: int,
        halvings: int,
        vector_codes: int,
    ) -> None:
        image = data.kind == "image"
        shape = halved(data.shape, halvings) if image else (vector_codes,)
        super().__init__(data, likelihood, [quantizer], shape)
        channels, *rest = data.shape
        dim, params = quantizer.dim, self.likelihood.num_params
        self.encoder: nn.Module
        self.decoder: nn.Module
        if image:
            self.encoder = grid_down(channels, width, halvings, blocks, dim)
            self.decoder = grid_up(dim, width, halvings, blocks, params * channels)
        else:
            network = Mlp(width=width, depth=max(blocks, 1), activation="relu")
            self.encoder = network.down(data.shape, vector_codes * dim)
            self.decoder = network.up(vector_codes * dim, (params * channels, *rest))

    def sizes(self) -> list[int]:
        return [self.code_spec.dims]

    def levels(self, x: Tensor, pick: Pick) -> list[Level]:
        h = self.encoder(centred(x, self.data))
        quantizer = self.quantizers[0]
        assert isinstance(quantizer, Quantizer)
        z = to_vectors(h) if self.data.kind == "image" else h.reshape(len(h), -1, quantizer.dim)
        return [Level(quantizer, z, pick(quantizer, z))]

    def outputs(self, vectors: Sequence[Tensor]) -> Tensor:
        (z,) = vectors
        if self.data.kind == "image":
            height, width = self.code_spec.shape
            z = to_grid(z, (height, width))
        flat: Tensor = self.decoder(z if self.data.kind == "image" else z.flatten(1))
        return flat.reshape(len(z), self.likelihood.num_params, *self.data.shape)


def vq_vae(
    data: DataSpec,
    width: Positive = 128,
    blocks: NonNegative = 2,
    halvings: NonNegative = 2,
    vector_codes: Positive = 8,
    codebook_size: Annotated[int, Range(2)] = 512,
    code_dim: Positive = 64,
    codebook: Learning = "ema",
    commitment: NonNegativeFloat = 0.25,
    decay: Fraction = 0.99,
    restart: Fraction = 0.1,
    likelihood: Name = "auto",
) -> tuple[VqVae, Quantization]:
    """A VQ-VAE; alone its prior of the codes is uniform, as it is in training.

    Source: van den Oord et al. 2017, arXiv:1711.00937.

    Args:
        data: what is modelled.
        width, blocks: channels and residual blocks of encoder and decoder.
        halvings: of an image's sides: 28 x 28 and two halvings have 7 x 7 codes.
        vector_codes: how many codes a vector has; an image's follow from `halvings`.
        codebook_size, code_dim: K vectors of D numbers.
        codebook: follows its vectors' means, or is learned by gradient.
        commitment: beta: how strongly the encoder is held to its codes.
        decay: of the codebook's averages.
        restart: codes used less than this share of 1/K are put onto vectors of the batch; 0 for never.
        likelihood: p(x|codes) of a stored value.
    """
    quantizer = Quantizer(codebook_size, code_dim, codebook)
    model = VqVae(data, likelihood, quantizer, width, blocks, halvings, vector_codes)
    return model, Quantization([quantizer], current, commitment, decay, restart)
