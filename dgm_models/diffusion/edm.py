"""EDM: what the network sees and says has variance 1, at levels of noise where there is something to learn."""

from __future__ import annotations

from torch import Tensor

from dgm_models.conditions import Condition
from dgm_models.construct import Fraction, PositiveFloat
from dgm_models.nn.backbones import Backbone, NoisyMlp
from dgm_models.nn.diffusion import Denoising, Diffusion
from dgm_models.ops.paths import Karras, Path
from dgm_models.ops.samplers import Edm, Sampler
from dgm_models.protocols import Batch, DataSpec


class LogNormal(Denoising):
    """|F - F*|^2 at levels of noise sigma / alpha whose logarithm is normal.

    EDM's weight 1 / out^2 of |x_0 - E[x_0|x]|^2 makes the loss so.

    Source: Karras et al. 2022, section 5 and table 1, arXiv:2206.00364. Differs: levels beyond the path's ends, about
    one in 60,000 by the published numbers, are taken for the ends.

    Args:
        mean, deviation: of log(sigma / alpha).
        drop: the share of examples whose condition is left out.
    """

    def __init__(self, mean: float, deviation: float, drop: float) -> None:
        super().__init__(drop)
        self.mean, self.deviation = mean, deviation

    def times(self, model: Diffusion, batch: Batch) -> Tensor:
        level = self.mean + self.deviation * batch.normal("time", ()).double()
        return model.path.when(level.sigmoid()).clamp(min=model.path.first)  # r = sigma / (alpha + sigma)


def edm(
    data: DataSpec,
    network: Backbone = NoisyMlp(),
    path: Path = Karras(),
    sigma_data: PositiveFloat = 0.5,
    level_mean: float = -1.2,
    level_deviation: PositiveFloat = 1.2,
    sampler: Sampler = Edm(),
    cond: Condition | None = None,
    drop: Fraction = 0.1,
) -> tuple[Diffusion, LogNormal]:
    """EDM: E[x_0|x] = skip x + out F(into x), with skip, out, into such that input and target have variance 1.

    Source: Karras et al. 2022, table 1 and algorithm 2, arXiv:2206.00364.

    Args:
        data: what is modelled.
        network: the backbone.
        path: of the noise.
        sigma_data: the standard deviation of the data in model space.
        level_mean, level_deviation: P_mean and P_std, of the logarithm of the noise in training.
        sampler: how samples are drawn.
        cond: what samples are asked for.
        drop: the share of examples whose condition is left out in training (Ho and Salimans 2022, arXiv:2207.12598).
    """
    optional = bool(cond and drop)
    model = Diffusion(data, path, network, "edm", sampler, cond, optional, spread=sigma_data)
    return model, LogNormal(level_mean, level_deviation, drop)
