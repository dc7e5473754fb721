"""A causal transformer over the values of an image."""

from __future__ import annotations

from dgm_models.conditions import Condition
from dgm_models.construct import Fraction, Positive
from dgm_models.nn.attention import CausalTransformer, narrow
from dgm_models.nn.maximum_likelihood import MaximumLikelihood
from dgm_models.nn.sequence import SequenceModel
from dgm_models.nn.values import label_conditioner
from dgm_models.protocols import DataSpec


def image_transformer(
    data: DataSpec,
    width: Positive = 128,
    layers: Positive = 4,
    heads: Positive = 4,
    dropout: Fraction = 0.0,
    cond: Condition | None = None,
) -> tuple[SequenceModel, MaximumLikelihood]:
    """p(x) = product over t of p(x_t | x before t) over values in raster order, a free probability of every level.

    Args:
        data: what is modelled.
        width: of the transformer.
        layers: its blocks.
        heads: of each attention; they divide width.
        dropout: the share of attention weights and additions that training leaves out.
        cond: a label, whose vector is added to every input.

    Source: Parmar et al. 2018, sections 3.1 and 3.3 (categorical), arXiv:1802.05751. Differs: every value attends to
    all before it and not to a local block; normalisation stands in front of each part, and places are learned.
    """
    conditioner = label_conditioner(cond, data)
    network = CausalTransformer(width, layers, heads, data.dims, conditioner.vector_dim, dropout)
    model = SequenceModel(data, network, conditioner)
    narrow(model.embedding)
    narrow(model.head)
    return model, MaximumLikelihood()
