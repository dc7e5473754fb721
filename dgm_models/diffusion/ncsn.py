"""Noise-conditional score networks: the score of data under every level of a ladder of noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dgm_models.conditions import Condition
from dgm_models.construct import Fraction, Positive, PositiveFloat
from dgm_models.nn.backbones import Backbone, NoisyMlp
from dgm_models.nn.diffusion import Denoising, Diffusion, Scaling
from dgm_models.objective import Objective
from dgm_models.ops.paths import Grid, Path, Spacing
from dgm_models.ops.samplers import AnnealedLangevin, Sampler
from dgm_models.protocols import Batch, DataSpec


def level_ratio(dims: int) -> float:
    """The ratio g of neighbouring levels at which half of one level's noise is where the next one's noise is.

    The root of Phi(sqrt(2 D) (g - 1) + 3 g) - Phi(sqrt(2 D) (g - 1) - 3 g) = 1/2, D = `dims`.

    Source: Song and Ermon 2020, technique 2, arXiv:2006.09011. Differs: at most 2; in few dimensions there is no root.
    """

    def shared(g: float) -> float:
        centre = math.sqrt(2 * dims) * (g - 1)
        return 0.5 * (math.erf((centre + 3 * g) / math.sqrt(2)) - math.erf((centre - 3 * g) / math.sqrt(2)))

    low, high = 1.0, 2.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if shared(middle) > 0.5 else (low, middle)
    return high


class Ladder(nn.Module, Path):
    """alpha = 1, sigma at the time i / (levels - 1) the i-th of a geometric series; trained and sampled at these times.

    Buffers, since the largest level may be one that was found in the data; the checkpoint keeps them.

    Args:
        sigma_min, sigma_max: the ends.
        levels: how many; None for neighbours in the ratio that `level_ratio` says for `dims`, or nearer.
        dims: of the data.
    """

    name = "ladder"
    sigma_max: Tensor
    levels: Tensor

    def __init__(self, sigma_min: float, sigma_max: float, levels: int | None, dims: int) -> None:
        super().__init__()
        self.sigma_min, self.given = sigma_min, levels
        self.log_ratio = math.log(level_ratio(dims))
        self.register_buffer("sigma_max", torch.zeros((), dtype=torch.float64))
        self.register_buffer("levels", torch.zeros((), dtype=torch.float64))
        self.reach(torch.tensor(sigma_max, dtype=torch.float64))

    def reach(self, sigma_max: Tensor) -> None:
        """Sets the largest level, a scalar."""
        self.sigma_max.copy_(sigma_max)
        steps = self._log_range(sigma_max) / self.log_ratio
        self.levels.copy_(steps.ceil().clamp(min=1) + 1 if self.given is None else torch.full_like(steps, self.given))

    def _log_range(self, like: Tensor) -> Tensor:
        return (self.sigma_max / self.sigma_min).log().to(like.device)

    @property
    def first(self) -> float:
        return 0.0

    @property
    def chain(self) -> Grid:
        return self.grid(int(self.levels))

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t, dtype=torch.float64)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * (t.double() * self._log_range(t)).exp()

    def _when(self, noise: Tensor) -> Tensor:
        return (noise / self.sigma_min).log() / self._log_range(noise)

    def draw(self, u: Tensor) -> Tensor:
        """One of the levels."""
        levels = self.levels.to(u.device)
        return (u.double() * levels).floor() / (levels - 1)

    def grid(self, steps: int, spacing: Spacing = "uniform") -> Grid:
        """Levels, the largest first; all of them for `steps` of at least their number."""
        last = int(self.levels) - 1
        steps = min(steps, last + 1)
        u = torch.linspace(1, 0, steps, dtype=torch.float64)
        places = ((u if spacing == "uniform" else u.square()) * last).round()
        return self.at(torch.maximum(places, torch.arange(steps - 1, -1, -1, dtype=torch.float64)) / last)


class NoiseConditional(Diffusion):
    """The score s(x) = -F(x) / sigma at every level of a ladder.

    Args:
        noise_conditional: the network is told the level. If not, it sees x as it is and its output over sigma is the
            score.
        others: see `Diffusion`.
    """

    path: Ladder

    def __init__(
        self,
        data: DataSpec,
        path: Ladder,
        network: Backbone,
        sampler: Sampler,
        condition: Condition | None,
        optional: bool,
        noise_conditional: bool,
    ) -> None:
        super().__init__(data, path, network, "noise", sampler, condition, optional)
        self.noise_conditional = noise_conditional

    def scaling(self, t: Tensor) -> Scaling:
        found = super().scaling(t)
        if self.noise_conditional:
            return found
        return found._replace(into=torch.ones_like(found.into), c=torch.zeros_like(found.c))


class Measured(Denoising):
    """`Denoising` whose largest level is the largest distance between two examples of the first global batch.

    Source: Song and Ermon 2020, technique 1, arXiv:2006.09011. Differs: of a batch, where the paper takes all data.
    """

    def initialize(self, model: NoiseConditional, batch: Batch) -> None:
        x = batch.x.flatten(1).double()
        # with one example, or all alike, there is no distance: twice the smallest level keeps a ladder of two
        model.path.reach(torch.cdist(x, x).max().clamp(min=2 * model.path.sigma_min))


def ncsn(
    data: DataSpec,
    network: Backbone = NoisyMlp(),
    sigma_min: PositiveFloat = 0.01,
    sigma_max: PositiveFloat | None = None,
    levels: Positive | None = None,
    noise_conditional: bool = True,
    sampler: Sampler = AnnealedLangevin(steps=1000),
    cond: Condition | None = None,
    drop: Fraction = 0.1,
) -> tuple[NoiseConditional, Objective]:
    """NCSN: denoising score matching at geometric levels of noise, each weighted by sigma^2: E |sigma s + eps|^2.

    The first version: `sigma_max: 1.0, levels: 10`. The second: the defaults and `noise_conditional: false`.

    Source: Song and Ermon 2019, eq. 6 and algorithm 1, arXiv:1907.05600; Song and Ermon 2020, techniques 1 to 3,
    arXiv:2006.09011; technique 5, averaged weights, is `train.average`. Differs: the network sees x over
    sqrt(1 + sigma^2) where it is told the level.

    Args:
        data: what is modelled.
        network: the backbone.
        sigma_min, sigma_max: the ends of the levels; None for the largest distance between examples of the first batch.
        levels: their number; None for the one of technique 2.
        noise_conditional: the network is told the level; false for technique 3, an output over sigma.
        sampler: how samples are drawn; it takes every level where its steps are as many or more.
        cond: what samples are asked for.
        drop: the share of examples whose condition is left out in training (Ho and Salimans 2022, arXiv:2207.12598).
    Raises: ValueError for one level, or sigma_min not below sigma_max.
    """
    if levels == 1:
        raise ValueError("levels: 1 is no ladder; use 2 or more")
    if sigma_max is not None and sigma_min >= sigma_max:
        raise ValueError(f"sigma_min: {sigma_min:g} is not below sigma_max, {sigma_max:g}")
    diameter = 2 * math.sqrt(data.dims)  # of the cube of levels: until a batch says better
    path = Ladder(sigma_min, sigma_max or max(diameter, 2 * sigma_min), levels, data.dims)
    model = NoiseConditional(data, path, network, sampler, cond, bool(cond and drop), noise_conditional)
    return model, Denoising(drop) if sigma_max else Measured(drop)
