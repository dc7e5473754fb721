"""The inverse autoregressive flow."""

from __future__ import annotations

from dgm_models.codecs import continuous
from dgm_models.conditions import Condition
from dgm_models.construct import Positive
from dgm_models.nn.coupling import Affine, Flatten, context_dim
from dgm_models.nn.flow import Flow
from dgm_models.nn.masked_flow import masked_chain
from dgm_models.nn.maximum_likelihood import MaximumLikelihood
from dgm_models.nn.networks import Mlp, Network
from dgm_models.protocols import DataSpec


def iaf(
    data: DataSpec,
    network: Network = Mlp(width=128, depth=2, activation="silu"),
    layers: Positive = 5,
    cond: Condition | None = None,
) -> tuple[Flow, MaximumLikelihood]:
    """IAF: the inverse of MAF's layers; a sample takes one pass through every layer, the density of data D + 1 passes.

    So training by maximum likelihood costs D times that of MAF: this flow is made for what needs samples and their own
    density.

    Source: Kingma et al. 2016, arXiv:1606.04934, and Papamakarios et al. 2017, section 3.4, arXiv:1705.07057. Differs:
    a density of its own, trained on data, where the paper's is a posterior of a VAE; no gates: x = z exp(s) + t with
    bounded s (`Affine`), the identity at first.

    Args:
        data: what is modelled.
        network: widths, depth and activation of every layer's masked network, an mlp.
        layers: autoregressive layers, with the order of the coordinates reversed between them.
        cond: what samples are asked for; every layer's network reads it.
    """
    chain = masked_chain(data.dims, [Affine()] * layers, network, context_dim(cond, data, network), inverse=True)
    return Flow(data, continuous(data), Flatten(chain), condition=cond, network=network), MaximumLikelihood()
