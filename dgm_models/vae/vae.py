"""The variational autoencoder."""

from __future__ import annotations

from collections.abc import Sequence

from dgm_models.conditions import Condition
from dgm_models.construct import Positive
from dgm_models.nn.latent import LatentVariable
from dgm_models.nn.networks import Mlp, Network
from dgm_models.objective import Loss, Objective, Turn
from dgm_models.ops.likelihoods import Name
from dgm_models.protocols import Batch, DataSpec


class Elbo(Objective):
    """-ELBO = E_q[-log p(x|z)] + KL(q(z|x) || p(z)), one posterior draw, the KL in closed form.

    Source: Kingma and Welling 2014, eq. 7 and 10, arXiv:1312.6114.
    """

    def turns(self) -> Sequence[Turn]:
        return (Turn("model", self.loss),)

    def loss(self, model: LatentVariable, batch: Batch) -> Loss:
        cond, eps = model.given(batch), batch.normal("posterior", (model.latent_dim,))
        reconstruction, kl = model.terms(batch.x, model.posterior(batch.x, cond), eps, cond)
        return Loss((kl - reconstruction).sum(), {"kl": kl.sum(), "reconstruction": reconstruction.sum()})


def vae(
    data: DataSpec,
    network: Network = Mlp(),
    latent_dim: Positive = 16,
    likelihood: Name = "auto",
    cond: Condition | None = None,
) -> tuple[LatentVariable, Elbo]:
    """A VAE with a diagonal Gaussian posterior and a standard normal prior.

    Args:
        data: what is modelled.
        network: gives encoder and decoder.
        latent_dim: the dimension of z.
        likelihood: p(x|z) of a stored value.
        cond: what samples are asked for; encoder and decoder read it (Sohn et al. 2015, NeurIPS, with the prior of z
            left standard normal).
    """
    return LatentVariable(data, network, latent_dim, likelihood, cond), Elbo()
