"""Denoising diffusion: a chain of small steps into noise, and the network that walks it back."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dgm_models.conditions import Condition
from dgm_models.construct import Fraction, PositiveFloat
from dgm_models.nn.backbones import Backbone, NoisyMlp
from dgm_models.nn.diffusion import Denoising, Diffusion, Predicts
from dgm_models.ops.paths import Linear, Path, Tabulated
from dgm_models.ops.samplers import Ancestral, Sampler
from dgm_models.protocols import DataSpec


class Hybrid(Denoising):
    """L_simple + weight L_vlb, where L_vlb, the KL of all steps of the chain, teaches the variance alone.

    Source: Nichol and Dhariwal 2021, eq. 16 and section 3.1, arXiv:2102.09672. Differs: both are sums over the values
    of an example, in nats, where theirs are means, L_vlb in bits; the last step of the chain, which has no variance
    to be learned, is left out.

    Args:
        path: a chain.
        drop: the share of examples whose condition is left out.
        weight: of L_vlb.
    """

    def __init__(self, path: Tabulated, drop: float, weight: float) -> None:
        super().__init__(drop)
        self.length, self.weight = path.length, weight

    def besides(self, model: Diffusion, x: Tensor, noisy: Tensor, t: Tensor, found: Tensor) -> Mapping[str, Tensor]:
        guess, s = model.read(noisy, t, found), t - 1 / self.length
        learns = s > 0.5 / self.length  # the step to data is none of these; it takes another s, so that nothing is 0/0
        kl = model.step_kl(x, guess._replace(x=guess.x.detach()), t, s.clamp(min=0.5 / self.length))
        return {"variance_loss": self.weight * self.length * (kl * learns).sum().to(x.dtype)}


def ddpm(
    data: DataSpec,
    network: Backbone = NoisyMlp(),
    path: Path = Linear(),
    predicts: Predicts = "noise",
    learned_variance: bool = False,
    variance_weight: PositiveFloat = 1e-3,
    sampler: Sampler = Ancestral(),
    cond: Condition | None = None,
    drop: Fraction = 0.1,
) -> tuple[Diffusion, Denoising]:
    """DDPM: the mean squared error of the noise, uniformly over the steps of the chain.

    Source: Ho et al. 2020, eq. 14, arXiv:2006.11239; a learned variance: Nichol and Dhariwal 2021, arXiv:2102.09672.

    Args:
        data: what is modelled.
        network: the backbone.
        path: the chain's schedule.
        predicts: what the network's output is.
        learned_variance: the network says the variance of every reverse step as well: the bound uses it, and the
            sampler `ancestral` with the spread "learned".
        variance_weight: of the bound that teaches the variance, beside the squared error.
        sampler: how samples are drawn.
        cond: what samples are asked for.
        drop: the share of examples whose condition is left out in training (Ho and Salimans 2022, arXiv:2207.12598).
    Raises: ValueError for a learned variance on a path that is no chain.
    """
    model = Diffusion(
        data, path, network, predicts, sampler, cond, optional=bool(cond and drop), learned_spread=learned_variance
    )
    if not learned_variance:
        return model, Denoising(drop)
    if not isinstance(path, Tabulated):
        raise ValueError(f"path.name: {path.name} has no steps whose variance could be learned; use linear or cosine")
    return model, Hybrid(path, drop, variance_weight)
