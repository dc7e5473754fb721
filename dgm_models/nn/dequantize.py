"""Flows of stored levels: where they live, and the noise that makes them real numbers, fixed or learned."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_models.codecs import Codec, Dequantized, Discrete, Logit, Standardized, centred
from dgm_models.nn.coupling import Affine, Coupling, Flatten, alternating
from dgm_models.nn.flow import Chain, Flow, Transform
from dgm_models.nn.image_flow import ResidualNetwork, checkerboard, image_shape
from dgm_models.nn.networks import Mlp
from dgm_models.nn.normalisation import NormalisedLikelihood, fill_norms
from dgm_models.objective import Loss, Objective, Turn
from dgm_models.protocols import Batch, DataSpec, Model

Space = Literal["linear", "logit"]
Dequantization = Literal["uniform", "variational"]
PASS = 2**22  # values that the flow is given at once by `elbo`


def codec_of(data: DataSpec, space: Space) -> Codec:
    """Of whole levels: (-1, 1), or the logit of it squeezed; of real data: standardised."""
    if data.levels is None:
        return Standardized(data)
    return Logit(data) if space == "logit" else Dequantized(data)


class NoisePosterior(nn.Module):
    """q(u|x): u = sigmoid(f(e; x)), e standard logistic, f two affine couplings that read x; uniform at first.

    Source: Ho et al. 2019, section 3.1, arXiv:1902.00275. Differs: smaller networks, and logistic e, so that f = 1 is
    uniform dequantisation.

    Args:
        data: what x is.
        width: of the couplings' networks.
    """

    def __init__(self, data: DataSpec, width: int) -> None:
        super().__init__()
        self.data = data
        self.image = image_shape(data.shape)
        self.transform: Transform
        if self.image:
            channels = self.image[0]
            self.transform = Chain(
                *(
                    Coupling(
                        checkerboard(self.image, odd),
                        Affine(),
                        ResidualNetwork(channels, channels, 2, width, 1, channels),
                    )
                    for odd in (False, True)
                )
            )
        else:
            network = Mlp(width=width, depth=2, activation="relu")
            self.transform = Flatten(Chain(*alternating(data.dims, 2, Affine(), network, data.dims)))

    def forward(self, x: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Stored x [B, *event] and draws in (0, 1) of that shape -> (u in (0, 1), log q(u|x) [B] nats)."""
        e = uniform.logit()
        given = centred(x, self.data).to(e.dtype)
        h, log_det = self.transform(e, given if self.image else given.flatten(1))
        # log q(u|x) = log p(e) - log|dh/de| - log|du/dh|, and sigmoid's slope is the logistic density
        return h.sigmoid(), _logistic(e) - log_det - _logistic(h)


def _logistic(x: Tensor) -> Tensor:
    """[B] nats: the standard logistic log-density, summed over the event."""
    return -(F.softplus(x) + F.softplus(-x)).flatten(1).sum(1)


class VariationallyDequantized(Model):
    """log p(x) >= E_q(u|x) [log p(y) + log|det dy/dv| - log q(u|x)], y the place of v = x + u in the flow's space.

    Source: Ho et al. 2019, section 3.1, arXiv:1902.00275.

    Args:
        flow: of dequantised levels.
        width: of q's networks.
    Raises: ValueError when the flow models real data.
    """

    def __init__(self, flow: Flow, width: int) -> None:
        if not isinstance(flow.codec, Dequantized | Logit):
            raise ValueError("dequantization: 'variational' is of whole levels, and this data is real; use uniform")
        super().__init__(flow.data, Discrete(flow.data))
        self.flow, self.space = flow, flow.codec
        self.noise = NoisePosterior(flow.data, width)
        self.condition = flow.condition

    @property
    def sampling(self) -> Any:
        """The settings of the flow's sampler."""
        return self.flow.sampling

    @sampling.setter
    def sampling(self, settings: Any) -> None:
        self.flow.sampling = settings

    def log_weights(self, x: Tensor, uniform: Tensor, cond: Tensor | None = None) -> Tensor:
        """[B, K] nats: log p(x + u) - log q(u|x) of stored x [B, *event], u from draws [B, K, *event] in (0, 1)."""
        rows, draws = uniform.shape[:2]
        xs = x.repeat_interleave(draws, 0)
        conds = None if cond is None else cond.repeat_interleave(draws, 0)
        u, log_q = self.noise(xs, uniform.flatten(0, 1))
        y, log_det = self.space.place(xs.double() + u.double())
        found: Tensor = self.flow.log_prob(y.to(u.dtype), conds) + log_det.to(u.dtype) - log_q
        return found.reshape(rows, draws)

    @torch.no_grad()
    def elbo(self, x: Tensor, rng: torch.Generator, cond: Tensor | None = None, k: int = 1) -> Tensor:
        """[B] nats of stored x; with k > 1 the importance-weighted bound of k draws."""
        found = [self.log_weights(x, draws, cond) for draws in self._draws(x, rng, k)]
        return torch.cat(found, 1).logsumexp(1) - math.log(k)

    def _draws(self, x: Tensor, rng: torch.Generator, k: int) -> Iterator[Tensor]:
        """k draws in (0, 1) for every example, in portions [B, n, *event] that `PASS` allows."""
        dtype = next(self.parameters()).dtype
        each, tiny = max(1, PASS // (len(x) * self.data.dims)), torch.finfo(dtype).eps
        for start in range(0, k, each):
            shape = (min(each, k - start), *x.shape)
            drawn = torch.rand(shape, generator=rng, device=x.device, dtype=dtype)
            yield drawn.clamp(tiny, 1 - tiny).transpose(0, 1)

    @torch.no_grad()
    def sample(self, n: int, rng: torch.Generator, cond: Tensor | None = None) -> Tensor:
        """[n, *event] int64: the cells of the flow's samples."""
        y = self.flow.sample(n, rng, cond)
        self.evaluations = self.flow.evaluations
        return self.space.decode(y).long()

    @torch.no_grad()
    def encode(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """[B, D]: the latents of the middle of x's cell."""
        middle = self.space.place(x.double() + 0.5)[0]
        return self.flow.encode(middle.to(next(self.parameters()).dtype), cond)

    @torch.no_grad()
    def decode(self, z: Tensor, cond: Tensor | None = None) -> Tensor:
        """[B, *event] int64: the cell in which the point with these latents lies."""
        return self.space.decode(self.flow.decode(z, cond)).long()


class DequantizationBound(Objective):
    """-(log p(x + u) - log q(u|x)) with one draw of u, in nats."""

    def turns(self) -> Sequence[Turn]:
        return (Turn("model", self.loss),)

    def initialize(self, model: Any, batch: Batch) -> None:
        fill_norms(self, model, batch)

    def loss(self, model: VariationallyDequantized, batch: Batch) -> Loss:
        uniform = batch.uniform("dequantize", (1, *batch.x.shape[1:])).to(next(model.parameters()).dtype)
        return Loss(-model.log_weights(batch.x, uniform, model.given(batch)).sum())


def dequantized(flow: Flow, dequantization: Dequantization, width: int) -> tuple[Model, Objective]:
    """The flow and its objective; with variational dequantisation a bound around it, q's networks of `width`."""
    if dequantization == "uniform":
        return flow, NormalisedLikelihood()
    return VariationallyDequantized(flow, width), DequantizationBound()
