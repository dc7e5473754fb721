"""The importance weighted autoencoder: the bound of K draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from dgm_models.conditions import Condition
from dgm_models.construct import Positive
from dgm_models.nn.latent import LatentVariable, log_ratio, reparametrised
from dgm_models.nn.networks import Mlp, Network
from dgm_models.objective import Loss, Objective, Turn
from dgm_models.ops.likelihoods import Name
from dgm_models.protocols import Batch, DataSpec

Gradient = Literal["reparametrised", "doubly_reparametrised"]


class ImportanceWeighted(Objective):
    """-log (1/K) sum_k w_k, w_k = p(x, z_k) / q(z_k|x), z_k ~ q(z|x), all K draws in one pass.

    The encoder's gradient comes through z and through the parameters of q where w_k is evaluated. The second part
    has mean zero and drowns the first as K grows; written through z once more, the two are sum_k v_k^2 d log w_k / dz,
    v the normalised weights, with the parameters of q held still: "doubly_reparametrised". The decoder's gradient,
    sum_k v_k d log w_k, is the same in both.

    Source: Burda et al. 2016, eq. 8 and 13, arXiv:1509.00519; Tucker et al. 2019, eq. 8, arXiv:1810.04152.
    """

    def __init__(self, importance: int, gradient: Gradient) -> None:
        super().__init__()
        self.importance = importance
        self.gradient = gradient

    def turns(self) -> Sequence[Turn]:
        return (Turn("model", self.loss),)

    def loss(self, model: LatentVariable, batch: Batch) -> Loss:
        cond = model.given(batch)
        q = model.posterior(batch.x, cond)
        z = reparametrised(q, batch.normal("posterior", (self.importance, model.latent_dim)))
        doubly = self.gradient == "doubly_reparametrised" and z.requires_grad
        still = (q[0].detach(), q[1].detach()) if doubly else q
        log_weights = model.log_likelihoods(batch.x, z, cond) + log_ratio(z, still)  # [B, K]
        bound = log_weights.logsumexp(1) - math.log(self.importance)
        if doubly:  # the bound's gradient holds v once; what goes on to the encoder gets it twice
            normalised = log_weights.detach().softmax(1)[..., None]
            z.register_hook(lambda gradient: gradient * normalised)  # type: ignore[no-untyped-call]
        return Loss(-bound.sum(), {"elbo": log_weights.mean(1).sum()})


def iwae(
    data: DataSpec,
    network: Network = Mlp(),
    latent_dim: Positive = 16,
    likelihood: Name = "auto",
    importance: Positive = 5,
    gradient: Gradient = "reparametrised",
    cond: Condition | None = None,
) -> tuple[LatentVariable, ImportanceWeighted]:
    """A VAE trained on the importance-weighted bound; with `importance` 1 it is the VAE with its KL estimated.

    Args:
        data: what is modelled.
        network: gives encoder and decoder.
        latent_dim: the dimension of z.
        likelihood: p(x|z) of a stored value.
        importance: K, posterior draws of every example.
        gradient: the encoder's estimator; both have the same mean, the second less noise at large K.
        cond: what samples are asked for; encoder and decoder read it.
    """
    return LatentVariable(data, network, latent_dim, likelihood, cond), ImportanceWeighted(importance, gradient)
