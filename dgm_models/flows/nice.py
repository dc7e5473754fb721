"""Non-linear independent components estimation."""

from __future__ import annotations

from dgm_models.codecs import continuous
from dgm_models.conditions import Condition
from dgm_models.construct import Positive
from dgm_models.nn.coupling import Additive, Flatten, Scaling, alternating, context_dim
from dgm_models.nn.flow import Base, Chain, Flow
from dgm_models.nn.maximum_likelihood import MaximumLikelihood
from dgm_models.nn.networks import Mlp, Network
from dgm_models.protocols import DataSpec


def nice(
    data: DataSpec,
    network: Network = Mlp(width=1000, depth=5, activation="relu"),
    layers: Positive = 4,
    base: Base = "logistic",
    cond: Condition | None = None,
) -> tuple[Flow, MaximumLikelihood]:
    """NICE: additive couplings, which keep volumes, and one learned scale for every coordinate at the end.

    The couplings move the odd coordinates by a network of the even ones and the even by one of the odd, in turns;
    images are vectors. The training of the paper on MNIST is Adam at 1e-3 with betas (0.9, 0.01) and eps 1e-4.

    Source: Dinh et al. 2015, sections 3 and 5.1, arXiv:1410.8516. Differs: begins as the identity; data lie in (-1, 1)
    where the paper's lie in (0, 1).

    Args:
        data: what is modelled, of two coordinates or more.
        network: of every coupling.
        layers: couplings.
        base: of the latents.
        cond: what samples are asked for; every coupling's network reads it.
    """
    couplings = alternating(data.dims, layers, Additive(), network, context_dim(cond, data, network))
    transform = Flatten(Chain(*couplings, Scaling((data.dims,))))
    return Flow(data, continuous(data), transform, base, cond, network), MaximumLikelihood()
