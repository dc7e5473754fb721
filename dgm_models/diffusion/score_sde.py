"""Score-based generative modelling by stochastic differential equations: VE, VP and sub-VP."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dgm_models.conditions import Condition
from dgm_models.construct import Fraction
from dgm_models.nn.backbones import Backbone, NoisyMlp
from dgm_models.nn.diffusion import Denoising, Diffusion
from dgm_models.objective import Loss
from dgm_models.ops.paths import Path, VarianceExploding, VariancePreserving
from dgm_models.ops.samplers import PredictorCorrector, Sampler
from dgm_models.protocols import Batch, DataSpec

Weighting = Literal["simple", "likelihood"]


class Likelihood(Denoising):
    """1/2 integral of |eps - F|^2 d log(snr) in nats: what the variational bound loses over the path, but for its ends.

    The weight g(t)^2 of Song et al. is sigma^2 times the rate of -log(snr), so drawing log(snr) uniformly is their
    importance sampling, and no weight remains.

    Source: Song et al. 2021, theorem 1 and section 5.1, arXiv:2101.09258; Kingma et al. 2021, arXiv:2107.00630.
    """

    def _ends(self, model: Diffusion) -> Tensor:
        """log(sigma / alpha) at the first time and at the last [2]."""
        r = model.path.ratio(torch.tensor([model.path.first, 1.0], dtype=torch.float64))
        return r.logit()

    def times(self, model: Diffusion, batch: Batch) -> Tensor:
        first, last = self._ends(model).to(batch.x.device)
        level = torch.lerp(first, last, batch.uniform("time", ()).double())
        return model.path.when(level.sigmoid()).clamp(min=model.path.first)

    def loss(self, model: Diffusion, batch: Batch) -> Loss:
        found = super().loss(model, batch)
        first, last = self._ends(model).to(batch.x.device)
        return Loss(found.total * (last - first).to(found.total.dtype), found.metrics)  # log(snr) has twice this range


def score_sde(
    data: DataSpec,
    network: Backbone = NoisyMlp(),
    path: Path = VarianceExploding(),
    weighting: Weighting = "simple",
    sampler: Sampler = PredictorCorrector(),
    cond: Condition | None = None,
    drop: Fraction = 0.1,
) -> tuple[Diffusion, Denoising]:
    """The score of data under the noise of a stochastic differential equation, s(x, t) = -F(x, t) / sigma(t).

    Source: Song et al. 2021, eq. 7 with the weight sigma^2, arXiv:2011.13456.

    Args:
        data: what is modelled.
        network: the backbone.
        path: variance_exploding, variance_preserving or sub_variance_preserving.
        weighting: "simple": sigma^2 |s - s*|^2 uniformly over time. "likelihood": g^2 |s - s*|^2.
        sampler: how samples are drawn: predictor_corrector, or ode for the probability flow.
        cond: what samples are asked for.
        drop: the share of examples whose condition is left out in training (Ho and Salimans 2022, arXiv:2207.12598).
    Raises: ValueError for another path.
    """
    if not isinstance(path, VarianceExploding | VariancePreserving):
        raise ValueError(
            f"path: {path.name} is no stochastic differential equation of this method; use variance_exploding, "
            "variance_preserving or sub_variance_preserving"
        )
    model = Diffusion(data, path, network, "noise", sampler, cond, optional=bool(cond and drop))
    return model, Denoising(drop) if weighting == "simple" else Likelihood(drop)
