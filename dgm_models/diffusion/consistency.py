"""Consistency models: one network evaluation from noise of any size to data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dgm_models.codecs import continuous
from dgm_models.conditions import Condition
from dgm_models.construct import Positive, PositiveFloat
from dgm_models.nn.backbones import Backbone, Denoiser, NoisyMlp
from dgm_models.nn.conditioner import check
from dgm_models.objective import Loss, Objective, Turn
from dgm_models.ops.paths import Karras
from dgm_models.protocols import Batch, DataSpec, Model


@dataclass(frozen=True)
class Multistep:
    """How a consistency model samples.

    Args:
        steps: network evaluations. One maps noise to data. Each further one adds noise to them, at times evenly between
            1 and 0, and maps again.
    """

    steps: Positive = 1


class ConsistencyModel(Model):
    """f(x, sigma), the beginning of the probability-flow trajectory through x: f = skip x + out F(into x).

    At sigma_min skip is 1 and out is 0: f(x, sigma_min) = x, whatever the network says.

    Source: Song et al. 2023, eq. 5 and appendix C, and algorithm 1, arXiv:2303.01469.

    Args:
        data: what is modelled.
        path: the levels of noise.
        network: the backbone.
        sigma_data: the standard deviation of the data in model space.
        sampling: how samples are drawn.
        condition: what a sample is asked for, or None.
    """

    def __init__(
        self,
        data: DataSpec,
        path: Karras,
        network: Backbone,
        sigma_data: float,
        sampling: Multistep,
        condition: Condition | None,
    ) -> None:
        super().__init__(data, continuous(data))
        self.path, self.sigma_data = path, sigma_data
        self.condition = condition
        self.sampling = sampling
        self.network = Denoiser(network, data, 1, condition)

    def clean(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        """f(x, sigma) [B, *event] of x [B, *event] and sigma [B] float64."""
        above, square = sigma - self.path.sigma_min, sigma.square() + self.sigma_data**2
        skip = self.sigma_data**2 / (above.square() + self.sigma_data**2)
        out = self.sigma_data * above * square.rsqrt()
        found: Tensor = self.network(_column(square.rsqrt(), x) * x, (250 * sigma.log()).to(x.dtype), cond)
        return _column(skip, x) * x + _column(out, x) * found[:, 0]

    @torch.no_grad()
    def sample(self, n: int, rng: torch.Generator, cond: Tensor | None = None) -> Tensor:
        check(self.condition, cond)
        dtype = next(self.parameters()).dtype
        levels = self.path.sigma(1 - torch.arange(self.sampling.steps) / self.sampling.steps).tolist()
        x = torch.zeros(n, *self.data.shape, device=rng.device, dtype=dtype)
        for i, level in enumerate(levels):
            eps = torch.randn(x.shape, generator=rng, device=rng.device, dtype=dtype)
            # data that were mapped have the noise of sigma_min already
            x = x + (math.sqrt(level**2 - self.path.sigma_min**2) if i else level) * eps
            x = self.clean(x, torch.full((n,), level, device=rng.device, dtype=torch.float64), cond)
            if self.data.levels is not None:
                x = x.clamp(-1, 1)
        self.evaluations = len(levels)
        return x


class ConsistencyTraining(Objective):
    """E d(f(x + sigma' eps, sigma'), f(x + sigma eps, sigma)) / (sigma' - sigma) of neighbouring levels sigma < sigma'.

    d(a, b) = sqrt(|a - b|^2 + c^2) - c, c = 0.00054 sqrt(D). The second f has the weights of the first and no gradient.

    The levels are those of `path` at the times i / intervals. Their number doubles until it reaches `intervals_last`.
    log(sigma) is drawn normal and taken for the level below it.

    Source: Song and Dhariwal 2024, sections 3.1 to 3.5 and table 1, arXiv:2310.14189.

    Args:
        intervals, intervals_last: between levels, at first and at last.
        doubling: trainer steps until the number of intervals doubles.
        mean, deviation: of log(sigma).
    """

    intervals: Tensor

    def __init__(self, intervals: int, intervals_last: int, doubling: int, mean: float, deviation: float) -> None:
        super().__init__()
        self.first, self.last, self.doubling = intervals, intervals_last, doubling
        self.mean, self.deviation = mean, deviation
        self.register_buffer("intervals", torch.tensor(intervals, dtype=torch.int64))

    def turns(self) -> Sequence[Turn]:
        return (Turn("model", self.loss),)

    def advance(self, model: ConsistencyModel, step: int) -> None:
        doublings = min((step + 1) // self.doubling, 40)  # 2^40 intervals are above any last number
        self.intervals.fill_(min(self.first * 2**doublings, self.last))

    def levels(self, model: ConsistencyModel, batch: Batch) -> tuple[Tensor, Tensor]:
        """Neighbouring sigma < sigma' [B] float64: the interval in which a log-normal draw between the ends falls."""
        path = model.path
        ends = torch.tensor([path.sigma_min, path.sigma_max], dtype=torch.float64, device=batch.x.device)
        low, high = torch.special.ndtr((ends.log() - self.mean) / self.deviation)
        share = torch.lerp(low, high, batch.uniform("level", ()).double())
        sigma = (self.mean + self.deviation * torch.special.ndtri(share)).exp()
        place = (path.when(sigma / (1 + sigma)) * self.intervals).floor().clamp(max=self.intervals - 1)
        return path.sigma(place / self.intervals), path.sigma((place + 1) / self.intervals)

    def loss(self, model: ConsistencyModel, batch: Batch) -> Loss:
        x, eps, cond = batch.x, batch.normal("noise", batch.x.shape[1:]), model.given(batch)
        low, high = self.levels(model, batch)
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad():  # the same dropout in both
            target = model.clean(x + _column(low, x) * eps, low, cond)
        found = model.clean(x + _column(high, x) * eps, high, cond)
        apart = distance(found, target)
        return Loss((apart / (high - low)).sum(), {"apart": apart.detach().sum()})


def distance(a: Tensor, b: Tensor) -> Tensor:
    """sqrt(|a - b|^2 + c^2) - c [B], c = 0.00054 sqrt(D), of a and b [B, *event]; without cancellation near 0.

    Source: Song and Dhariwal 2024, section 3.3, arXiv:2310.14189.
    """
    square = (a - b).double().square().flatten(1).sum(1)
    c = 0.00054 * math.sqrt(a[0].numel())
    return square / ((square + c**2).sqrt() + c)


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def consistency(
    data: DataSpec,
    network: Backbone = NoisyMlp(),
    path: Karras = Karras(),
    sigma_data: PositiveFloat = 0.5,
    intervals: Positive = 10,
    intervals_last: Positive = 1280,
    doubling: Positive = 500,
    level_mean: float = -1.1,
    level_deviation: PositiveFloat = 2.0,
    steps: Positive = 1,
    cond: Condition | None = None,
) -> tuple[ConsistencyModel, ConsistencyTraining]:
    """A consistency model by consistency training, without a teacher.

    Source: Song et al. 2023, arXiv:2303.01469; Song and Dhariwal 2024, table 1, arXiv:2310.14189. Differs: the steps
    until the number of intervals doubles are given; the paper divides the training by the number of doublings.

    Args:
        data: what is modelled.
        network: the backbone.
        path: of the noise; karras.
        sigma_data: the standard deviation of the data in model space.
        intervals, intervals_last: s_0 and s_1, between levels of noise at first and at last.
        doubling: trainer steps until the number of intervals doubles.
        level_mean, level_deviation: P_mean and P_std, of log(sigma) in training.
        steps: network evaluations of a sample.
        cond: what samples are asked for.
    Raises: ValueError for another path, or a last number of intervals below the first.
    """
    if not isinstance(path, Karras):
        raise ValueError(f"path: {path.name} does not begin at a noise from which f(x) = x follows; use karras")
    if intervals > intervals_last:
        raise ValueError(f"intervals_last: {intervals_last} is below intervals, {intervals}")
    model = ConsistencyModel(data, path, network, sigma_data, Multistep(steps), cond)
    return model, ConsistencyTraining(intervals, intervals_last, doubling, level_mean, level_deviation)
