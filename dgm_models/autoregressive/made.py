"""The masked autoencoder for distribution estimation."""

from __future__ import annotations

from dgm_models.codecs import Discrete
from dgm_models.conditions import Condition
from dgm_models.construct import NonNegative, Positive
from dgm_models.nn.masked import EveryMask, MaskedAutoregression
from dgm_models.ops.likelihoods import Bernoulli, Categorical
from dgm_models.protocols import DataSpec


def made(
    data: DataSpec,
    width: Positive = 512,
    depth: Positive = 1,
    masks: Positive = 1,
    random_order: bool = False,
    direct: bool = False,
    mask_seed: NonNegative = 0,
    cond: Condition | None = None,
) -> tuple[MaskedAutoregression, EveryMask]:
    """MADE over data of whole levels: p(x_d | x before d) is categorical, all conditionals from one masked network.

    Source: Germain et al. 2015, arXiv:1502.03509.

    Args:
        data: what is modelled.
        width: hidden units a layer.
        depth: hidden layers.
        masks: mask sets, walked in training and averaged in probability afterwards.
        random_order: each mask set has its own order of the dimensions. With many sets the network learns to complete
            an example whatever is known of it.
        direct: connections from inputs to outputs as well.
        mask_seed: of the mask sets.
        cond: `{name: label}` for p(x | label).
    """
    assert data.levels is not None
    likelihood = Bernoulli() if data.levels == 2 else Categorical(data.levels)
    model = MaskedAutoregression(
        data, Discrete(data), likelihood, width, depth, masks, random_order, direct, mask_seed, cond
    )
    return model, EveryMask()
