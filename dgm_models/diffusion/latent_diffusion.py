"""Latent diffusion: a diffusion model of another run's latents, which that run's decoder turns into data."""

from __future__ import annotations

from dgm_models.conditions import Condition
from dgm_models.construct import Fraction
from dgm_models.nn.backbones import Backbone, NoisyMlp
from dgm_models.nn.diffusion import Denoising, Diffusion, Predicts
from dgm_models.ops.paths import Linear, Path
from dgm_models.ops.samplers import Ddim, Sampler
from dgm_models.protocols import DataSpec


def latent_diffusion(
    data: DataSpec,
    network: Backbone = NoisyMlp(),
    path: Path = Linear(),
    predicts: Predicts = "noise",
    sampler: Sampler = Ddim(),
    cond: Condition | None = None,
    drop: Fraction = 0.1,
) -> tuple[Diffusion, Denoising]:
    """The mean squared error of the noise in latents of variance 1, uniformly over the steps of the chain.

    The latents are a dataset (`codes` in params.yaml), drawn from the posterior of an autoencoder that was trained
    before and stands still; its decoder is part of the artifact, which is a model of the original data.

    Source: Rombach et al. 2022, arXiv:2112.10752. Differs: the latents of an example are drawn once; the autoencoder
    is any model with a posterior, such as a beta-VAE with a small beta, without a perceptual or adversarial loss.

    Args:
        data: the latents: a grid [C, H, W] (network.name: unet or dit) or a vector.
        network: the backbone.
        path: the chain's schedule.
        predicts: what the network's output is.
        sampler: how latents are drawn.
        cond: what samples are asked for.
        drop: the share of examples whose condition is left out in training.
    """
    model = Diffusion(data, path, network, predicts, sampler, cond, optional=bool(cond and drop))
    return model, Denoising(drop)
