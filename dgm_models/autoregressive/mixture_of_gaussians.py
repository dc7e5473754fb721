"""Real values whose conditionals are mixtures of Gaussians: RNADE's conditionals on MADE's network."""

from __future__ import annotations

import torch

from dgm_models.codecs import continuous
from dgm_models.conditions import Condition
from dgm_models.construct import NonNegative, Positive
from dgm_models.nn.masked import EveryMask, MaskedAutoregression
from dgm_models.ops.likelihoods import MixtureOfGaussians
from dgm_models.protocols import DataSpec


def mixture_of_gaussians(
    data: DataSpec,
    components: Positive = 10,
    width: Positive = 256,
    depth: Positive = 2,
    masks: Positive = 1,
    random_order: bool = False,
    direct: bool = False,
    mask_seed: NonNegative = 0,
    mirrored: bool = False,
    cond: Condition | None = None,
) -> tuple[MaskedAutoregression, EveryMask]:
    """p(x_d | x before d) = sum_k w_k N(mean_k, scale_k^2), weights, means and scales from one masked network.

    Source: Uria, Murray, Larochelle 2013 (RNADE), eq. 4 to 8, arXiv:1306.0186; Papamakarios et al. 2017, section 4.1
    ("MADE MoG"), arXiv:1705.07057. Differs from RNADE: a masked network in place of shared prefix sums, and no scaling
    of the means' gradients.

    Args:
        data: what is modelled.
        components: Gaussians of every conditional.
        width, depth: hidden units a layer, and hidden layers.
        masks, random_order, direct, mask_seed, mirrored, cond: as for autoregressive/made.
    """
    model = MaskedAutoregression(
        data, continuous(data), MixtureOfGaussians(components), width, depth, masks, random_order, direct, mask_seed,
        cond, mirrored,
    )  # fmt: skip
    with torch.no_grad():  # close to one mixture for all x, of components that differ: scales are exp of the outputs
        model.network.last.weight.mul_(0.1)
        if model.network.direct is not None:
            model.network.direct.weight.mul_(0.1)
        model.network.last.bias.reshape(data.dims, 3, components)[:, 1].normal_(std=0.5)
    return model, EveryMask()
