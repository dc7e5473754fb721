"""Composites: a prior over the codes of another model, and that model's decoder, as one model of the original data."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dgm_models.protocols import Codes, Density, Model, Samples


def code_bound(
    decoder: Codes, log_prior: Callable[[Tensor], Tensor], x: Tensor, rng: torch.Generator, k: int
) -> Tensor:
    """log (1/k) sum_i p(x|c_i) p(c_i) / q(c_i|x) with c_i ~ q: a lower bound of log p(x), [B] nats, tighter as k grows.

    Args:
        decoder: gives q and p(x|c).
        log_prior: codes [B, *code_spec.shape] -> log p(c), [B] nats.
        x: [B, *event] in model space.
        rng: of the draws.
        k: how many.
    """
    weights = []
    for _ in range(k):
        codes, log_q = decoder.draw_codes(x, rng)
        weights.append(decoder.log_likelihood(x, codes) + log_prior(codes) - log_q)
    return torch.stack(weights).logsumexp(0) - math.log(k)  # [B]


class Composite(Model):
    """p(x) = sum over codes c of prior(c) p(x|c): codes are drawn from the prior, data from the decoder's likelihood.

    Args:
        prior: a model of the codes, with an exact log-probability and a sampler.
        decoder: a model with codes.
    Raises: ValueError when the prior does not model these codes.
    """

    def __init__(self, prior: Model, decoder: Model) -> None:
        super().__init__(decoder.data, decoder.codec)
        if not isinstance(decoder, Codes):
            raise ValueError(f"{type(decoder).__name__} has no codes that a prior could model")
        if not (isinstance(prior, Density) and isinstance(prior, Samples) and prior.codec.exact):
            raise ValueError(
                f"{type(prior).__name__} is no prior of codes: one has an exact log-probability and a sampler"
            )
        if prior.data != decoder.code_spec:
            raise ValueError(f"the prior models {prior.data}, the decoder's codes are {decoder.code_spec}")
        self.prior, self.decoder = prior, decoder
        self.condition = prior.condition

    @property
    def sampling(self) -> Any:
        """The settings of the prior's sampler."""
        return self.prior.sampling

    @sampling.setter
    def sampling(self, settings: Any) -> None:
        self.prior.sampling = settings

    @torch.no_grad()
    def sample(self, n: int, rng: torch.Generator, cond: Tensor | None = None) -> Tensor:
        assert isinstance(self.prior, Samples) and isinstance(self.decoder, Codes)
        x = self.decoder.decode_codes(self.prior.sample(n, rng, cond), rng)
        self.evaluations = self.prior.evaluations + 1
        return x

    def elbo(self, x: Tensor, rng: torch.Generator, cond: Tensor | None = None, k: int = 1) -> Tensor:
        """[B] nats of the original data; see `code_bound`."""
        prior, decoder = self.prior, self.decoder
        assert isinstance(prior, Density) and isinstance(decoder, Codes)
        return code_bound(decoder, lambda codes: prior.log_prob(codes, cond), x, rng, k)
