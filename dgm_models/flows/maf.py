"""The masked autoregressive flow."""

from __future__ import annotations

from dgm_models.codecs import continuous
from dgm_models.conditions import Condition
from dgm_models.construct import Positive
from dgm_models.nn.coupling import Affine, Bijection, Flatten, MixtureCdf, context_dim
from dgm_models.nn.flow import Base, Flow
from dgm_models.nn.masked_flow import masked_chain
from dgm_models.nn.maximum_likelihood import MaximumLikelihood
from dgm_models.nn.networks import Mlp, Network
from dgm_models.protocols import DataSpec


def maf(
    data: DataSpec,
    network: Network = Mlp(width=128, depth=2, activation="silu"),
    layers: Positive = 5,
    components: Positive = 1,
    cond: Condition | None = None,
) -> tuple[Flow, MaximumLikelihood]:
    """MAF: affine autoregressive layers, with the order of the coordinates reversed between them.

    The density takes one pass through every layer, a sample D passes. With components the conditionals of the last
    layer are mixtures ("MAF MoG").

    Source: Papamakarios et al. 2017, arXiv:1705.07057. Differs: no batch normalisation between the layers, which begin
    as the identity; log-scales are bounded (`Affine`), and a layer is z = x exp(s) + t where the paper writes
    z = (x - mu) exp(-alpha); the mixtures are of logistic distributions, whose tails keep every logit finite.

    Args:
        data: what is modelled.
        network: widths, depth and activation of every layer's masked network, an mlp.
        layers: autoregressive layers; the paper has 5 and 10.
        components: of the last layer's conditionals, with a logistic base; 1 for an affine layer and a normal one.
        cond: what samples are asked for; every layer's network reads it.
    """
    last: Bijection = Affine() if components == 1 else MixtureCdf(components)
    chain = masked_chain(data.dims, [Affine()] * (layers - 1) + [last], network, context_dim(cond, data, network))
    base: Base = "normal" if components == 1 else "logistic"
    return Flow(data, continuous(data), Flatten(chain), base, cond, network), MaximumLikelihood()
