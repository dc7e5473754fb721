"""Denoising diffusion: a chain of small steps into noise, and the network that walks it back."""

from __future__ import annotations

from dgm_models.conditions import Condition
from dgm_models.construct import Fraction
from dgm_models.nn.backbones import Backbone, NoisyMlp
from dgm_models.nn.diffusion import Denoising, Diffusion, Predicts
from dgm_models.ops.paths import Linear, Path
from dgm_models.ops.samplers import Ancestral, Sampler
from dgm_models.protocols import DataSpec


def ddpm(
    data: DataSpec,
    network: Backbone = NoisyMlp(),
    path: Path = Linear(),
    predicts: Predicts = "noise",
    sampler: Sampler = Ancestral(),
    cond: Condition | None = None,
    drop: Fraction = 0.1,
) -> tuple[Diffusion, Denoising]:
    """DDPM: the mean squared error of the noise, uniformly over the steps of the chain.

    Source: Ho et al. 2020, eq. 14, arXiv:2006.11239.

    Args:
        data: what is modelled.
        network: the backbone.
        path: the chain's schedule.
        predicts: what the network's output is.
        sampler: how samples are drawn.
        cond: what samples are asked for.
        drop: the share of examples whose condition is left out in training (Ho and Salimans 2022, arXiv:2207.12598).
    """
    model = Diffusion(data, path, network, predicts, sampler, cond, optional=bool(cond and drop))
    return model, Denoising(drop)
