"""The beta-VAE: the KL term weighted by beta."""

from __future__ import annotations

from collections.abc import Sequence

from dgm_models.conditions import Condition
from dgm_models.construct import NonNegativeFloat, Positive
from dgm_models.nn.latent import LatentVariable
from dgm_models.nn.networks import Mlp, Network
from dgm_models.objective import Loss, Objective, Turn
from dgm_models.ops.likelihoods import Name
from dgm_models.protocols import Batch, DataSpec


class BetaElbo(Objective):
    """E_q[-log p(x|z)] + beta KL(q(z|x) || p(z)); nats, both terms summed over their dimensions.

    The paper's normalised weight, beta * latent_dim / data.dims, is the metric `normalised_beta`.
    Source: Higgins et al. 2017, eq. 4 and appendix A.6.
    """

    def __init__(self, beta: float, normalised_beta: float) -> None:
        super().__init__()
        self.beta = beta
        self.normalised_beta = normalised_beta

    def turns(self) -> Sequence[Turn]:
        return (Turn("model", self.loss),)

    def loss(self, model: LatentVariable, batch: Batch) -> Loss:
        cond, eps = model.given(batch), batch.normal("posterior", (model.latent_dim,))
        reconstruction, kl = model.terms(batch.x, model.posterior(batch.x, cond), eps, cond)
        metrics = {"kl": kl.sum(), "reconstruction": reconstruction.sum(), "elbo": (reconstruction - kl).sum()}
        metrics["normalised_beta"] = kl.new_tensor(self.normalised_beta * len(batch))
        return Loss((self.beta * kl - reconstruction).sum(), metrics)


def beta_vae(
    data: DataSpec,
    network: Network = Mlp(),
    latent_dim: Positive = 16,
    likelihood: Name = "auto",
    beta: NonNegativeFloat = 4.0,
    cond: Condition | None = None,
) -> tuple[LatentVariable, BetaElbo]:
    """A VAE trained with a weighted KL; evaluated, like any other, by its ELBO with weight 1.

    Args:
        data: what is modelled.
        network: gives encoder and decoder.
        latent_dim: the dimension of z.
        likelihood: p(x|z) of a stored value.
        beta: weight of the KL; 1 is the VAE.
        cond: what samples are asked for; encoder and decoder read it.
    """
    model = LatentVariable(data, network, latent_dim, likelihood, cond)
    return model, BetaElbo(beta, beta * latent_dim / data.dims)
