"""Denoising score matching at one level of noise."""

from __future__ import annotations

from torch import Tensor

from dgm_models.construct import PositiveFloat
from dgm_models.nn.energy import EnergyBased
from dgm_models.nn.networks import Mlp, Network
from dgm_models.nn.score_matching import MatchesScores, fit_for_scores
from dgm_models.ops.mcmc import Chain, Langevin
from dgm_models.ops.scores import LogDensity, score
from dgm_models.protocols import Batch, DataSpec


class DenoisingScoreMatching(MatchesScores):
    """|noise s(x + noise eps) + eps|^2 / 2, s = grad log p: its minimum is the score of the data with that noise.

    The score of noisy data is E[-eps / noise | x + noise eps] (Tweedie), hence a regression on it. It takes any model
    with an energy or a density.

    Source: Vincent 2011, A connection between score matching and denoising autoencoders. Differs: weighted with the
    noise's variance, as by Song and Ermon 2019, arXiv:1907.05600.

    Args:
        noise: its standard deviation in model space.
    """

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.noise = noise

    def each(self, log_p: LogDensity, batch: Batch) -> Tensor:
        eps = batch.normal("eps", batch.x.shape[1:]).to(batch.x.dtype)
        s, _ = score(log_p, batch.x + self.noise * eps)
        return 0.5 * (self.noise * s + eps).square().flatten(1).sum(1)


def denoising_score_matching(
    data: DataSpec,
    network: Network = Mlp(activation="silu"),
    noise: PositiveFloat = 0.1,
    chain: Chain = Langevin(),
    spread: PositiveFloat = 1.0,
) -> tuple[EnergyBased, DenoisingScoreMatching]:
    """An energy trained by denoising; levels are dequantised.

    What it learns is the density of data with the noise added, which is the data's convolved with a Gaussian: energies
    and samples are of that density.

    Source: Vincent 2011, A connection between score matching and denoising autoencoders.

    Args:
        data: what is modelled.
        network: gives the energy.
        noise: the standard deviation of the noise in model space.
        chain: by which samples are drawn.
        spread: the standard deviation of the Gaussian in front of which the network stands, in model space.
    """
    return fit_for_scores(EnergyBased(data, network, chain, spread), curved=False), DenoisingScoreMatching(noise)
