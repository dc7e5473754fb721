"""Score matching: the slope of log p is fitted to that of the data's density, which nobody has to know."""

from __future__ import annotations

from torch import Tensor

from dgm_models.construct import PositiveFloat
from dgm_models.nn.energy import EnergyBased
from dgm_models.nn.networks import Mlp, Network
from dgm_models.nn.score_matching import MatchesScores, fit_for_scores
from dgm_models.ops.mcmc import Chain, Langevin
from dgm_models.ops.scores import LogDensity, score, trace
from dgm_models.protocols import Batch, DataSpec

MOST = 100  # dimensions: each of them is a backward pass through the gradient


class ScoreMatching(MatchesScores):
    """|s|^2 / 2 + tr ds/dx, s = grad log p: E |s - s_data|^2 / 2 without E |s_data|^2 / 2, which no model changes.

    The trace is exact, so that the loss is that of the paper. It takes any model with an energy or a density, such as
    a flow, or an autoregressive model of real data. Integration by parts asks for a log-density with a continuous
    slope: where a network has kinks (relu), the trace misses what they add.

    Source: Hyvarinen 2005, Estimation of non-normalized statistical models by score matching, theorem 1.

    Args:
        data: what is modelled.
    Raises: ValueError for more than `MOST` dimensions.
    """

    def __init__(self, data: DataSpec) -> None:
        super().__init__()
        if data.dims > MOST:
            raise ValueError(
                f"data.shape: an exact trace in {data.dims} dimensions is as many backward passes a step, {MOST} at "
                "most; use energy/sliced_score_matching or energy/denoising_score_matching"
            )

    def each(self, log_p: LogDensity, batch: Batch) -> Tensor:
        s, x = score(log_p, batch.x)
        return 0.5 * s.square().flatten(1).sum(1) + trace(s, x)


def score_matching(
    data: DataSpec,
    network: Network = Mlp(activation="silu"),
    chain: Chain = Langevin(),
    spread: PositiveFloat = 1.0,
) -> tuple[EnergyBased, ScoreMatching]:
    """An energy trained by score matching with the exact trace; levels are dequantised.

    Source: Hyvarinen 2005, Estimation of non-normalized statistical models by score matching, theorem 1.

    Args:
        data: what is modelled, of `MOST` dimensions at most.
        network: gives the energy; smooth, with silu, gelu or tanh.
        chain: by which samples are drawn.
        spread: the standard deviation of the Gaussian in front of which the network stands, in model space.
    """
    objective = ScoreMatching(data)
    return fit_for_scores(EnergyBased(data, network, chain, spread), curved=True), objective
