"""The shell of latent-variable models: standard normal prior, decoder, a likelihood of stored data, a posterior."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dgm_models import noise
from dgm_models.codecs import centred, discrete
from dgm_models.conditions import Condition
from dgm_models.nn.conditioner import Conditioner, check
from dgm_models.nn.networks import Network
from dgm_models.ops.divergences import kl_to_standard_normal
from dgm_models.ops.likelihoods import Name, likelihood
from dgm_models.protocols import DataSpec, Model

PASS = 2**24  # decoder outputs held at once by `elbo` and `prior_estimate`; 64 MiB of float32

Posterior = tuple[Tensor, Tensor]  # mean and log-variance of a diagonal Gaussian, each [B, latent_dim]


class LatentVariable(Model):
    """p(x|c) = integral of p(x|z, c) N(z; 0, I) dz, with the posterior q(z|x, c) = N(mean, diag var).

    Args:
        data: what is modelled.
        network: gives the decoder, which gets z with the condition's vector, and the encoder, which gets x joined with
            the condition.
        latent_dim: the dimension of z.
        name: the decoder's likelihood.
        condition: what a sample is asked for, or None.
        amortised: the encoder gives the posterior; False makes no encoder: a subclass has a `posterior` of its own.
    """

    encoder: nn.Module

    def __init__(
        self,
        data: DataSpec,
        network: Network,
        latent_dim: int,
        name: Name,
        condition: Condition | None = None,
        amortised: bool = True,
    ) -> None:
        super().__init__(data, discrete(data))
        self.condition = condition
        self.latent_dim = latent_dim
        self.code_spec = DataSpec(
            "codes", network.places(data.shape, latent_dim), None, data.classes, class_names=data.class_names
        )
        self.likelihood = likelihood(name, data)
        self.conditioner = Conditioner(condition, data, network)
        if amortised:
            self.encoder = network.down(self.conditioner.joined(data.shape), 2 * latent_dim)
        channels, *rest = data.shape
        outputs = (self.likelihood.num_params * channels, *rest)
        self.decoder = network.up(latent_dim + self.conditioner.vector_dim, outputs)

    def posterior(self, x: Tensor, cond: Tensor | None = None) -> Posterior:
        """Mean and log-variance of q(z|x, c), each [B, latent_dim]."""
        h = self.encoder(self.conditioner.join(centred(x, self.data), cond))
        mean, log_variance = h.to(torch.promote_types(h.dtype, torch.float32)).chunk(2, dim=1)
        return mean, log_variance.clamp(-14, 14)

    def outputs(self, z: Tensor, cond: Tensor | None = None) -> Tensor:
        """The likelihood's params [B, num_params, *event] at z [B, latent_dim]."""
        flat: Tensor = self.decoder(self.conditioner.with_vector(z, cond))
        return flat.reshape(len(z), self.likelihood.num_params, *self.data.shape)

    def log_likelihoods(self, x: Tensor, z: Tensor, cond: Tensor | None = None) -> Tensor:
        """log p(x|z, c) [B, K] nats of K codes for every example, z [B, K, latent_dim], in one pass."""
        rows, draws = z.shape[:2]
        xs = x.repeat_interleave(draws, 0)
        conds = None if cond is None else cond.repeat_interleave(draws, 0)
        return self.likelihood.log_prob(self.outputs(z.flatten(0, 1), conds), xs).reshape(rows, draws)

    def terms(self, x: Tensor, q: Posterior, eps: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Reconstruction log p(x|z, c) at z = mean + std * eps, eps [B, latent_dim], and KL(q || p(z)): [B] nats."""
        z = reparametrised(q, eps)
        return self.likelihood.log_prob(self.outputs(z, cond), x), kl_to_standard_normal(*q)

    def elbo(self, x: Tensor, rng: torch.Generator, cond: Tensor | None = None, k: int = 1) -> Tensor:
        """[B] nats: log (1/k) sum_i p(x, z_i|c) / q(z_i|x, c), z_i ~ q; tighter as k grows.

        Source: Burda et al. 2016, eq. 8, arXiv:1509.00519.
        """
        check(self.condition, cond)
        q = self.posterior(x, cond)
        weights = []
        for eps in self._draws(x, q[0], rng, k):
            z = reparametrised(q, eps)
            weights.append(self.log_likelihoods(x, z, cond) + log_ratio(z, q))
        return torch.cat(weights, 1).logsumexp(1) - math.log(k)

    def prior_estimate(self, x: Tensor, rng: torch.Generator, k: int, cond: Tensor | None = None) -> Tensor:
        """[B] nats: log (1/k) sum_i p(x|z_i, c), z_i ~ N(0, I): the estimate that needs no posterior.

        A lower bound of log p(x) in expectation, as `elbo` is, and loose: nearly all z explain a given x badly.
        """
        check(self.condition, cond)
        like = next(self.decoder.parameters()).new_empty(len(x), self.latent_dim)
        found = [self.log_likelihoods(x, z, cond) for z in self._draws(x, like, rng, k)]
        return torch.cat(found, 1).logsumexp(1) - math.log(k)

    def _draws(self, x: Tensor, like: Tensor, rng: torch.Generator, k: int) -> Iterator[Tensor]:
        """k standard normal draws for every example in portions [B, n, latent_dim] that `PASS` allows."""
        each = max(1, PASS // (len(x) * self.likelihood.num_params * self.data.dims))
        for start in range(0, k, each):
            shape = (min(each, k - start), len(x), self.latent_dim)
            yield torch.randn(shape, generator=rng, device=like.device, dtype=like.dtype).transpose(0, 1)

    @torch.no_grad()
    def sample(self, n: int, rng: torch.Generator, cond: Tensor | None = None) -> Tensor:
        check(self.condition, cond)
        z = torch.randn(n, self.latent_dim, generator=rng, device=rng.device)
        return self.likelihood.sample(self.outputs(z, cond), rng)

    # ---- latents as codes, for a prior that is trained on them

    @torch.no_grad()
    def codes(self, x: Tensor, key: Tensor | None = None) -> Tensor:
        mean, log_variance = self.posterior(x)
        eps = torch.zeros_like(mean) if key is None else noise.normal(key, "codes", mean.shape[1:], mean.dtype)
        return reparametrised((mean, log_variance), eps).reshape(len(x), *self.code_spec.shape)

    def draw_codes(self, x: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        q = self.posterior(x)
        eps = torch.randn(q[0].shape, generator=rng, device=rng.device, dtype=q[0].dtype)
        log_q = -0.5 * (eps.square() + q[1] + math.log(2 * math.pi)).sum(1)
        return reparametrised(q, eps).reshape(len(x), *self.code_spec.shape), log_q

    def log_likelihood(self, x: Tensor, codes: Tensor) -> Tensor:
        return self.likelihood.log_prob(self.outputs(codes.flatten(1)), x)

    @torch.no_grad()
    def decode_codes(self, codes: Tensor, rng: torch.Generator) -> Tensor:
        return self.likelihood.sample(self.outputs(codes.flatten(1)), rng)

    @torch.no_grad()
    def encode(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        check(self.condition, cond)
        return self.posterior(x, cond)[0]

    @torch.no_grad()
    def decode(self, z: Tensor, cond: Tensor | None = None) -> Tensor:
        check(self.condition, cond)
        return self.likelihood.mode(self.outputs(z, cond))


def reparametrised(q: Posterior, eps: Tensor) -> Tensor:
    """z = mean + std * eps, with gradients to both; eps [B, latent_dim] or [B, K, latent_dim], as the result."""
    mean, log_variance = (part if eps.ndim == 2 else part[:, None] for part in q)
    return mean + (0.5 * log_variance).exp() * eps


def log_ratio(z: Tensor, q: Posterior) -> Tensor:
    """log N(z; 0, I) - log N(z; mean, diag var) [B, K] nats at z [B, K, latent_dim]."""
    mean, log_variance = (part[:, None] for part in q)
    return 0.5 * ((z - mean) ** 2 * (-log_variance).exp() + log_variance - z**2).sum(-1)
