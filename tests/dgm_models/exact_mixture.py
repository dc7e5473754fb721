"""A mixture of Gaussians under the noise of a path: density, score and denoiser in closed form, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dgm_models.nn.diffusion import Diffusion
from dgm_models.ops.paths import Path
from dgm_models.protocols import DataSpec


@dataclass(frozen=True)
class Mixture:
    """Components of equal weight with means [K, D] and one standard deviation."""

    means: Tensor
    deviation: float

    @property
    def data(self) -> DataSpec:
        return DataSpec("vector", (self.means.shape[1],))

    def draw(self, n: int, seed: int = 0) -> Tensor:
        rng = torch.Generator().manual_seed(seed)
        k = torch.randint(len(self.means), (n,), generator=rng)
        return self.means[k] + self.deviation * torch.randn(n, self.means.shape[1], generator=rng, dtype=torch.float64)

    def _parts(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """log of the joint [B, K] of x_t [B, D] and its component, and the variance [B, 1] of x_t in a component."""
        variance = (alpha * self.deviation).square() + sigma.square()
        apart = (x[:, None] - alpha[:, None, None] * self.means).square().sum(2)
        dims = x.shape[1]
        joint = -0.5 * (apart / variance[:, None] + dims * (2 * math.pi * variance[:, None]).log())
        return joint - math.log(len(self.means)), variance[:, None]

    def log_prob(self, x: Tensor, alpha: Tensor | None = None, sigma: Tensor | None = None) -> Tensor:
        """[B] of x_t [B, D]; of data by default."""
        one = torch.ones(len(x), dtype=torch.float64)
        return self._parts(x, one if alpha is None else alpha, 0 * one if sigma is None else sigma)[0].logsumexp(1)

    def denoise(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[x_0 | x_t] [B, D]: the mean of each component's posterior, by the component's probability."""
        joint, variance = self._parts(x, alpha, sigma)
        shift = (alpha[:, None] * self.deviation**2 / variance)[:, None]
        each = self.means + shift * (x[:, None] - alpha[:, None, None] * self.means)
        return (joint.softmax(1)[:, :, None] * each).sum(1)


PAIR = Mixture(torch.tensor([[-1.0], [1.5]], dtype=torch.float64), 0.4)
SQUARE = Mixture(torch.tensor([[-1.0, 1.0], [1.0, 1.0], [0.0, -1.0]], dtype=torch.float64), 0.3)


def normal(deviation: float, dims: int = 1) -> Mixture:
    return Mixture(torch.zeros(1, dims, dtype=torch.float64), deviation)


def exactly(model: Diffusion, mixture: Mixture) -> Diffusion:
    """The model with the network that is right for data of the mixture, in float64."""
    model.double()

    def outputs(x: Tensor, t: Tensor, cond: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        t = t.expand(len(x))
        scales = model.scaling(t)
        x_0 = mixture.denoise(x, model.path.alpha(t), model.path.sigma(t))
        return ((x_0 - scales.skip[:, None] * x) / scales.out[:, None])[:, None]

    model.outputs = outputs  # type: ignore[method-assign]
    return model


def spaced(path: Path, n: int) -> Tensor:
    """[n] times from the first to just below 1, where every path has data left."""
    return torch.linspace(path.first, 0.999, n, dtype=torch.float64)
