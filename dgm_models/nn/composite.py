"""Composites: a prior over the codes of another model, and that model's decoder, as one model of the original data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dgm_models.protocols import Bound, Codes, Density, Model, Samples


def code_weights(
    decoder: Codes, log_prior: Callable[[Tensor], Tensor], x: Tensor, rng: torch.Generator, k: int
) -> Tensor:
    """log p(x|c_i) p(c_i) / q(c_i|x) with c_i ~ q: [k, B] nats.

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
    return torch.stack(weights)


def code_bound(
    decoder: Codes, log_prior: Callable[[Tensor], Tensor], x: Tensor, rng: torch.Generator, k: int
) -> Tensor:
    """log (1/k) sum_i p(x|c_i) p(c_i) / q(c_i|x): a lower bound of log p(x), [B] nats, tighter as k grows.

    Args: as `code_weights`.
    """
    return code_weights(decoder, log_prior, x, rng, k).logsumexp(0) - math.log(k)  # [B]


class Composite(Model):
    """p(x) = E_prior(c) p(x|c): codes, whole numbers or real, are drawn from the prior, data from the likelihood.

    Args:
        prior: a sampler of the codes.
        decoder: a model with codes.
    Raises: ValueError when the prior does not model these codes.
    """

    def __init__(self, prior: Model, decoder: Model) -> None:
        super().__init__(decoder.data, decoder.codec)
        if not isinstance(decoder, Codes):
            raise ValueError(f"{type(decoder).__name__} has no codes that a prior could model")
        if decoder.condition:
            raise ValueError(
                f"{type(decoder).__name__} has codes of data with a {decoder.condition.name}; train it without cond"
            )
        if not isinstance(prior, Samples):
            raise ValueError(f"{type(prior).__name__} is no prior of codes: it has no sampler")
        if replace(prior.data, location=0.0, scale=1.0) != decoder.code_spec:
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
        codes = self.prior.codec.decode(self.prior.sample(n, rng, cond))
        x = self.decoder.decode_codes(codes, rng)
        self.evaluations = self.prior.evaluations + 1
        return x


class BoundedComposite(Composite):
    """A composite whose prior has a density, or a bound of one. With a bound more draws make its estimate less noisy;
    with a density they make it tighter.

    log p(x) >= E_q(c|x)[log p(x|c) + log prior(c) - log q(c|x)].
    """

    def __init__(self, prior: Model, decoder: Model) -> None:
        super().__init__(prior, decoder)
        self.tightens = isinstance(prior, Density)

    def elbo(self, x: Tensor, rng: torch.Generator, cond: Tensor | None = None, k: int = 1) -> Tensor:
        """[B] nats of the original data; see `code_bound`."""
        prior, decoder = self.prior, self.decoder
        assert isinstance(prior, Density | Bound) and isinstance(decoder, Codes)

        def log_prior(codes: Tensor) -> Tensor:
            key = torch.randint(2**62, (len(codes),), generator=rng, device=rng.device)  # of dequantisation, if any
            y, log_det = prior.codec.encode(codes, key)
            found = prior.log_prob(y, cond) if isinstance(prior, Density) else prior.elbo(y, rng, cond)
            return found + log_det

        if self.tightens:
            return code_bound(decoder, log_prior, x, rng, k)
        return code_weights(decoder, log_prior, x, rng, k).mean(0)


def composite(prior: Model, decoder: Model) -> Composite:
    """The two as one model, with a bound where the prior has a density or a bound."""
    return (BoundedComposite if isinstance(prior, Density | Bound) else Composite)(prior, decoder)
