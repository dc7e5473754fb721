"""The neural spline flow."""

from __future__ import annotations

from typing import Literal

from dgm_models.codecs import continuous
from dgm_models.conditions import Condition
from dgm_models.construct import Positive, PositiveFloat
from dgm_models.nn.coupling import Flatten, alternating, context_dim
from dgm_models.nn.flow import Chain, Flow
from dgm_models.nn.masked_flow import masked_chain
from dgm_models.nn.maximum_likelihood import MaximumLikelihood
from dgm_models.nn.networks import Mlp, Network
from dgm_models.nn.spline import RationalQuadratic
from dgm_models.protocols import DataSpec


def neural_spline(
    data: DataSpec,
    network: Network = Mlp(width=128, depth=2, activation="silu"),
    form: Literal["coupling", "autoregressive"] = "coupling",
    layers: Positive = 5,
    bins: Positive = 8,
    bound: PositiveFloat = 4.0,
    cond: Condition | None = None,
) -> tuple[Flow, MaximumLikelihood]:
    """NSF: every coordinate is mapped by a monotone rational-quadratic spline whose knots a network gives.

    Couplings take one pass in both directions; autoregressive layers one for the density and D for a sample.

    Source: Durkan et al. 2019, arXiv:1906.04032. Differs: between the layers the halves change places, or the order is
    reversed, where the paper has linear layers in LU form; the networks have no residual blocks; all layers begin as
    the identity.

    Args:
        data: what is modelled.
        network: of every layer; an mlp for "autoregressive".
        form: of the layers.
        layers: how many.
        bins: of every spline.
        bound: of the interval that the splines map to itself; beyond it a layer changes nothing.
        cond: what samples are asked for; every layer's network reads it.
    """
    spline, extra = RationalQuadratic(bins, bound), context_dim(cond, data, network)
    if form == "coupling":
        chain = Chain(*alternating(data.dims, layers, spline, network, extra))
    else:
        chain = masked_chain(data.dims, [spline] * layers, network, extra)
    return Flow(data, continuous(data), Flatten(chain), condition=cond, network=network), MaximumLikelihood()
