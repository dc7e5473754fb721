"""The shell of latent-variable models: encoder, decoder, standard normal prior, a likelihood of stored data."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dgm_models.codecs import discrete
from dgm_models.nn.networks import Network
from dgm_models.ops.divergences import kl_to_standard_normal
from dgm_models.ops.likelihoods import Name, centred, likelihood
from dgm_models.protocols import DataSpec, Model


class LatentVariable(Model):
    """p(x) = integral of p(x|z) N(z; 0, I), with the amortised posterior q(z|x) = N(mean(x), diag var(x)).

    Args:
        data: what is modelled.
        network: gives the encoder and the decoder.
        latent_dim: the dimension of z.
        name: the decoder's likelihood.
    """

    def __init__(self, data: DataSpec, network: Network, latent_dim: int, name: Name) -> None:
        super().__init__(data, discrete(data))
        self.latent_dim = latent_dim
        self.likelihood = likelihood(name, data)
        self.encoder = network.down(data.shape, 2 * latent_dim)
        channels, *rest = data.shape
        self.decoder = network.up(latent_dim, (self.likelihood.num_params * channels, *rest))

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z|x), each [B, latent_dim]."""
        h = self.encoder(centred(x, self.data))
        mean, log_variance = h.to(torch.promote_types(h.dtype, torch.float32)).chunk(2, dim=1)
        return mean, log_variance.clamp(-14, 14)

    def outputs(self, z: Tensor) -> Tensor:
        """The likelihood's params [B, num_params, *event]."""
        flat: Tensor = self.decoder(z)
        return flat.reshape(len(z), self.likelihood.num_params, *self.data.shape)

    def terms(self, x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction log p(x|z) and KL(q(z|x) || p(z)), each [B] nats, at z = mean + std * eps."""
        mean, log_variance = self.posterior(x)
        z = mean + (0.5 * log_variance).exp() * eps
        return self.likelihood.log_prob(self.outputs(z), x), kl_to_standard_normal(mean, log_variance)

    def elbo(self, x: Tensor, rng: torch.Generator, cond: Tensor | None = None, k: int = 1) -> Tensor:
        """[B] nats: log (1/k) sum_i p(x, z_i) / q(z_i|x), z_i ~ q; tighter as k grows (Burda et al. 2016)."""
        _unconditional(cond)
        mean, log_variance = self.posterior(x)
        weights = []
        for _ in range(k):
            eps = torch.randn(mean.shape, generator=rng, device=mean.device, dtype=mean.dtype)
            z = mean + (0.5 * log_variance).exp() * eps
            log_ratio = 0.5 * (eps**2 + log_variance - z**2).sum(1)  # log p(z) - log q(z|x)
            weights.append(self.likelihood.log_prob(self.outputs(z), x) + log_ratio)
        stacked = torch.stack(weights)  # [k, B]
        return stacked.logsumexp(0) - math.log(k)

    @torch.no_grad()
    def sample(self, n: int, rng: torch.Generator, cond: Tensor | None = None) -> Tensor:
        _unconditional(cond)
        z = torch.randn(n, self.latent_dim, generator=rng, device=rng.device)
        return self.likelihood.sample(self.outputs(z), rng)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        return self.posterior(x)[0]

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        return self.likelihood.mode(self.outputs(z))


def _unconditional(cond: Tensor | None) -> None:
    if cond is not None:
        raise ValueError("cond: this model was built without a condition")
