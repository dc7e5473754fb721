"""Variational inference without an encoder: an optimisation for every example, the baseline of amortised inference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dgm_models import noise
from dgm_models.conditions import Condition
from dgm_models.construct import Positive, PositiveFloat
from dgm_models.nn.latent import LatentVariable, Posterior, reparametrised
from dgm_models.nn.networks import Mlp, Network
from dgm_models.objective import Loss, Objective, Turn
from dgm_models.ops.divergences import kl_to_standard_normal
from dgm_models.ops.likelihoods import Name
from dgm_models.protocols import Batch, DataSpec

FIRST, SECOND = 0.5, 0.9  # Adam's betas: a search of 20 steps has no use for a memory of 1000


class NonAmortised(LatentVariable):
    """The posterior of x is what `inner_steps` steps of Adam on x's own ELBO make of the prior.

    The steps' draws are the same for every example and every call, so q(z|x) is a function of x and the decoder: it
    depends on no other example of a batch, and `elbo` is a bound. Gradients do not flow through it. Arguments as
    `LatentVariable`, and:

    Args:
        inner_steps: steps of Adam on mean and log-variance, with two draws each.
        inner_lr: the first step's size; it falls linearly to 0.
    """

    def __init__(
        self,
        data: DataSpec,
        network: Network,
        latent_dim: int,
        name: Name,
        inner_steps: int,
        inner_lr: float,
        condition: Condition | None = None,
    ) -> None:
        super().__init__(data, network, latent_dim, name, condition, amortised=False)
        self.inner_steps = inner_steps
        self.inner_lr = inner_lr

    @torch.enable_grad()
    def posterior(self, x: Tensor, cond: Tensor | None = None) -> Posterior:
        weight = next(self.decoder.parameters())
        q = weight.new_zeros(2, len(x), self.latent_dim, dtype=torch.promote_types(weight.dtype, torch.float32))
        first, second = torch.zeros_like(q), torch.zeros_like(q)
        key = torch.zeros(1, dtype=torch.int64, device=x.device)
        for step in range(1, self.inner_steps + 1):
            q.requires_grad_(True)
            mean, log_variance = q
            eps = noise.normal(key, f"inner/{step}", (1, self.latent_dim), q.dtype)
            z = reparametrised((mean, log_variance), torch.cat([eps, -eps], 1))  # a pair: odd noise cancels
            reconstruction = self.log_likelihoods(x, z, cond).mean(1)
            (slope,) = torch.autograd.grad((kl_to_standard_normal(mean, log_variance) - reconstruction).sum(), q)
            first = FIRST * first + (1 - FIRST) * slope
            second = SECOND * second + (1 - SECOND) * slope**2
            direction = first / (1 - FIRST**step) / ((second / (1 - SECOND**step)).sqrt() + 1e-8)
            rate = self.inner_lr * (1 - (step - 1) / self.inner_steps)
            q = q.detach() - rate * direction
        return q[0], q[1].clamp(-14, 14)


class FittedElbo(Objective):
    """-ELBO at each example's own optimised posterior, which stands still: only the decoder learns.

    Source: Hoffman et al. 2013, section 2, arXiv:1206.7051 (local parameters fitted for every example). Differs: by
    reparametrised gradients and not by coordinate ascent, anew at every visit of an example.
    """

    whole = True

    def turns(self) -> Sequence[Turn]:
        return (Turn("model", self.loss),)

    def prepare(self, model: NonAmortised, batch: Batch) -> Batch:
        mean, log_variance = model.posterior(batch.x, model.given(batch))
        return batch.with_extra(mean=mean, log_variance=log_variance)

    def loss(self, model: NonAmortised, batch: Batch) -> Loss:
        q = batch.extra["mean"], batch.extra["log_variance"]
        eps = batch.normal("posterior", (model.latent_dim,))
        reconstruction, kl = model.terms(batch.x, q, eps, model.given(batch))
        return Loss((kl - reconstruction).sum(), {"kl": kl.sum(), "reconstruction": reconstruction.sum()})


def non_amortised(
    data: DataSpec,
    network: Network = Mlp(),
    latent_dim: Positive = 16,
    likelihood: Name = "auto",
    inner_steps: Positive = 20,
    inner_lr: PositiveFloat = 0.5,
    cond: Condition | None = None,
) -> tuple[NonAmortised, FittedElbo]:
    """A VAE without its encoder: what an encoder gives in one pass is searched for, in training and afterwards.

    Args:
        data: what is modelled.
        network: gives the decoder.
        latent_dim: the dimension of z.
        likelihood: p(x|z) of a stored value.
        inner_steps: gradient steps for the posterior of one example; each costs a decoder's forward and backward pass.
        inner_lr: size of the first step, which falls linearly to 0; inner_steps * inner_lr / 2 is how far
            the mean can go.
        cond: what samples are asked for; the decoder reads it.
    """
    return NonAmortised(data, network, latent_dim, likelihood, inner_steps, inner_lr, cond), FittedElbo()
