"""Sliced score matching: the trace of score matching along random directions, one backward pass each."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dgm_models.construct import Positive, PositiveFloat
from dgm_models.nn.energy import EnergyBased
from dgm_models.nn.networks import Mlp, Network
from dgm_models.nn.score_matching import MatchesScores, fit_for_scores
from dgm_models.ops.mcmc import Chain, Langevin
from dgm_models.ops.scores import LogDensity, along, score
from dgm_models.protocols import Batch, DataSpec

Directions = Literal["rademacher", "normal"]


class SlicedScoreMatching(MatchesScores):
    """v^T (ds/dx) v + (v^T s)^2 / 2, s = grad log p, for directions v with E v v^T = I, drawn for every example.

    Its mean over v is the loss of score matching; `reduced` has |s|^2 / 2 in the place of (v^T s)^2 / 2, which is its
    mean, so that the trace alone is left to chance. It takes any model with an energy or a density.

    Source: Song et al. 2019, Sliced Score Matching, arXiv:1905.07088; `reduced` is its SSM-VR.

    Args:
        directions: the law of v: entries of -1 and 1, or standard normal.
        projections: directions of every example, over which the mean is taken.
        reduced: the form of smaller variance.
    """

    def __init__(self, directions: Directions = "rademacher", projections: int = 1, reduced: bool = True) -> None:
        super().__init__()
        self.directions, self.projections, self.reduced = directions, projections, reduced

    def each(self, log_p: LogDensity, batch: Batch) -> Tensor:
        s, x = score(log_p, batch.x)
        drawn = batch.normal("direction", (self.projections, *x.shape[1:])).to(x.dtype)
        if self.directions == "rademacher":
            drawn = torch.where(drawn < 0, -1.0, 1.0).to(x.dtype)
        found = []
        for v in drawn.unbind(1):
            half = 0.5 * (s.square() if self.reduced else (s * v).flatten(1).sum(1, keepdim=True).square())
            found.append(along(s, x, v) + half.flatten(1).sum(1))
        return torch.stack(found).mean(0)


def sliced_score_matching(
    data: DataSpec,
    network: Network = Mlp(activation="silu"),
    directions: Directions = "rademacher",
    projections: Positive = 1,
    reduced: bool = True,
    chain: Chain = Langevin(),
    spread: PositiveFloat = 1.0,
) -> tuple[EnergyBased, SlicedScoreMatching]:
    """An energy trained by sliced score matching; levels are dequantised.

    Source: Song et al. 2019, Sliced Score Matching, arXiv:1905.07088.

    Args:
        data: what is modelled.
        network: gives the energy; smooth, with silu, gelu or tanh.
        directions, projections: the law of an example's random directions, and how many it has.
        reduced: the form of smaller variance.
        chain: by which samples are drawn.
        spread: the standard deviation of the Gaussian in front of which the network stands, in model space.
    """
    objective = SlicedScoreMatching(directions, projections, reduced)
    return fit_for_scores(EnergyBased(data, network, chain, spread), curved=True), objective
