"""Invertible residual networks and residual flows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_models.codecs import continuous
from dgm_models.conditions import Condition
from dgm_models.construct import NonNegative, Positive, Range
from dgm_models.nn.coupling import context_dim
from dgm_models.nn.fixed_point import fixed_point, tolerance
from dgm_models.nn.flow import Chain, Flow, Transform
from dgm_models.nn.image_flow import Reshape, Squeeze, image_shape, squeezed, squeezings
from dgm_models.nn.normalisation import ActNorm, NormalisedLikelihood
from dgm_models.objective import Loss
from dgm_models.protocols import Batch, DataSpec

LogDet = Literal["auto", "exact", "series", "unbiased"]
Smooth = Literal["lipswish", "elu"]

SMALL, EXACT = 4, 64  # values of an example up to which "auto" trains, and evaluation measures, by the whole Jacobian
LONG, PROBES = 50, 4  # terms and probes of an evaluation beyond
KEPT, ON = 2, 0.5  # the roulette: terms that are always taken, and the probability of each further one
CLOSE, MOST = 1e-3, 500  # power iteration in training: the relative change at which it ends, and iterations at most
ITERATIONS = 2000  # of the inverse: 0.99^2000 is 2e-9


# ---- layers


def apply(weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """A dense layer, or a convolution that keeps the size, as the weight's shape says."""
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)


def adjoint(weight: Tensor, y: Tensor) -> Tensor:
    """The transposed operator of `apply`."""
    if weight.ndim == 2:
        return y @ weight
    return F.conv_transpose2d(y, weight, padding=weight.shape[-1] // 2)


class Lipschitz(nn.Module):
    """A dense or convolutional layer whose norm as an operator is at most `bound`: it applies W min(1, bound / norm).

    The norm is that of the map of whole events, zero padding included, by power iteration; its vectors are buffers. In
    training they move in `tighten` alone, so that a step's forward passes see one weight; an evaluation goes on from
    them until the norm does not change.
    Source: Behrmann et al. 2019, section 2.1, arXiv:1811.00995; Gouk et al. 2018, arXiv:1804.04368.

    Args:
        layer: gives the weight and bias at the start.
        shape: of one input.
        bound: of the norm.
    """

    left: Tensor
    right: Tensor

    def __init__(self, layer: nn.Linear | nn.Conv2d, shape: tuple[int, ...], bound: float) -> None:
        super().__init__()
        assert layer.bias is not None
        self.weight, self.bias, self.bound = layer.weight, layer.bias, bound
        right = torch.randn(1, *shape)
        self.register_buffer("right", right)
        self.register_buffer("left", apply(self.weight, right).detach())
        self._found: tuple[object, tuple[Tensor, Tensor]] | None = None
        self.tighten(tolerance(right.dtype))

    @torch.no_grad()
    def _vectors(self, close: float) -> tuple[Tensor, Tensor]:
        """The singular vectors of the largest singular value, when its relative change has fallen to `close`."""
        right, norm = self.right / self.right.norm(), self.right.new_zeros(())
        for _ in range(MOST):
            left = apply(self.weight, right)
            left = left / left.norm()
            right = adjoint(self.weight, left)
            before, norm = norm, right.norm()
            right = right / norm
            if bool((norm - before).abs() <= close * norm):
                break
        return left, right

    @torch.no_grad()
    def tighten(self, close: float = CLOSE) -> None:
        """Moves the singular vectors to those of the weight as it is now."""
        left, right = self._vectors(close)
        self.left.copy_(left)
        self.right.copy_(right)

    def _converged(self) -> tuple[Tensor, Tensor]:
        """The singular vectors of the weight as it is; found once for every weight."""
        weight = (self.weight._version, self.weight.data_ptr(), self.weight.dtype)
        if self._found is None or self._found[0] != weight:
            self._found = weight, self._vectors(tolerance(self.weight.dtype))
        return self._found[1]

    def kept(self) -> Tensor:
        """The weight as it is applied."""
        with torch.autocast(self.weight.device.type, enabled=False):  # a norm in bfloat16 is off by 0.4%
            vectors = (self.left, self.right) if self.training else self._converged()
            norm = (vectors[0] * apply(self.weight, vectors[1])).sum()
        return self.weight * (self.bound / norm).clamp(max=1.0)


class LipSwish(nn.Module):
    """x sigmoid(b x) / 1.1 with a learned b > 0: its slope is at most 1, and its second derivative does not vanish.

    Source: Chen et al. 2019, section 3.3, arXiv:1906.02735.
    """

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * (F.softplus(self.raw) * x).sigmoid() / 1.1


# ---- log-determinants of x + g(x)


@dataclass(frozen=True)
class Series:
    """How log|det(I + J)| = sum_k (-1)^(k+1) tr(J^k) / k is estimated.

    Attributes:
        probes: P of them, each [B, *event] with independent entries of mean 0 and variance 1: tr(A) = E[v^T A v].
        weights: [B, n] or [1, n], of the terms k = 1 to n: 1, or 1 / P(term is taken) for an unbiased estimate.
    """

    probes: Sequence[Tensor]
    weights: Tensor


def roulette(uniform: Tensor) -> Tensor:
    """Weights [B, n] of terms of which a random number is taken, by draws [B] in (0, 1): 1 / P(term k is taken), or 0.

    Two terms always, each further one with probability 1/2 given those before it; n is the batch's largest number.
    Source: Chen et al. 2019, eq. 6, arXiv:1906.02735, with their 2 exact terms and p = 0.5.
    """
    further = (uniform.double().log() / math.log(ON)).floor()  # P(further >= m) = ON^m
    terms = torch.arange(1, KEPT + int(further.max()) + 1, device=uniform.device)
    beyond = (terms - KEPT).clamp_min(0)
    return torch.where(beyond <= further[:, None], ON ** -beyond.double(), 0.0).to(uniform.dtype)


def exact_log_det(g: Tensor, x: Tensor, differentiable: bool) -> Tensor:
    """[B] nats: log|det(I + dg/dx)| from all rows of the Jacobian; g [B, *event] must have been made from x."""
    flat, rows = g.flatten(1), []
    for d in range(flat.shape[1]):
        (row,) = torch.autograd.grad(flat[:, d].sum(), x, retain_graph=True, create_graph=differentiable)
        rows.append(row.flatten(1))
    jacobian = torch.stack(rows, 1)
    log_det: Tensor = torch.linalg.slogdet(jacobian + torch.eye(len(rows), dtype=x.dtype, device=x.device))[1]
    return log_det


def series_log_det(g: Tensor, x: Tensor, series: Series, differentiable: bool) -> Tensor:
    """[B] nats: the series' estimate of log|det(I + dg/dx)|.

    Its gradient is the estimate sum_k (-1)^(k-1) v^T J^(k-1) dJ v of tr((I + J)^-1 dJ), which needs one pass
    through the graph where the gradient of the terms needs n.
    Source: Behrmann et al. 2019, section 3.2, arXiv:1811.00995; Chen et al. 2019, eq. 6 and 8, arXiv:1906.02735.
    """
    found = []
    for probe in series.probes:
        row, total, value = probe, torch.zeros_like(probe), x.new_zeros(len(x))
        for k, weight in enumerate(series.weights.unbind(1), 1):
            weight = weight if k % 2 else -weight
            total = total + weight.reshape(-1, *[1] * (probe.ndim - 1)) * row
            (row,) = torch.autograd.grad(g, x, row, retain_graph=True)  # v^T J^k
            value = value + weight / k * (row * probe).flatten(1).sum(1)
        if differentiable:
            (last,) = torch.autograd.grad(g, x, total, create_graph=True)
            slope = (last * probe).flatten(1).sum(1)
            value = slope + (value - slope).detach()
        found.append(value)
    return torch.stack(found).mean(0)


Estimator = Callable[[int, Tensor], Series]  # the number of a block and its input -> its series


# ---- the flow


class ResidualBlock(Transform):
    """z = x + g(x), Lip(g) <= bound < 1; the inverse is the fixed point of x = z - g(x).

    Every one of the n layers has the norm bound^(1/n), and the activations slopes of at most 1.
    Source: Behrmann et al. 2019, theorem 1 and algorithm 1, arXiv:1811.00995. Differs: each layer's norm is bounded by
    the n-th root of the coefficient there is for g, not by the coefficient.

    Args:
        shape: of an event: [D], or [C, H, W] for convolutions (3x3, 1x1 between, 3x3).
        width: units or channels of the hidden layers.
        layers: hidden layers.
        bound: of Lip(g).
        activation: between the layers.
        context_dim: of the vector that is added before the first activation, 0 without a context.
    """

    def __init__(
        self, shape: tuple[int, ...], width: int, layers: int, bound: float, activation: Smooth, context_dim: int
    ) -> None:
        super().__init__()
        widths, rest = [shape[0], *[width] * layers, shape[0]], shape[1:]
        made: list[Lipschitz] = []
        for i, (before, after) in enumerate(pairwise(widths)):
            size = 3 if i in (0, layers) else 1
            layer = nn.Conv2d(before, after, size, padding=size // 2) if rest else nn.Linear(before, after)
            made.append(Lipschitz(layer, (before, *rest), bound ** (1 / (layers + 1))))
        self.layers = nn.ModuleList(made)
        self.activations = nn.ModuleList(LipSwish() if activation == "lipswish" else nn.ELU() for _ in range(layers))
        self.context = nn.Linear(context_dim, width, bias=False) if context_dim else None

    def _kept(self) -> list[tuple[Tensor, Tensor]]:
        """Weights and biases as they are applied."""
        found = []
        for layer in self.layers:
            assert isinstance(layer, Lipschitz)
            found.append((layer.kept(), layer.bias))
        return found

    def _added(self, x: Tensor, context: Tensor | None) -> Tensor | None:
        if self.context is None or context is None:
            return None
        added: Tensor = self.context(context.to(x.dtype))
        return added.reshape(*added.shape, *[1] * (x.ndim - 2))

    def _branch(self, x: Tensor, kept: list[tuple[Tensor, Tensor]], added: Tensor | None) -> Tensor:
        """g(x)."""
        h = apply(kept[0][0], x, kept[0][1])
        h = h if added is None else h + added
        for activation, (weight, bias) in zip(self.activations, kept[1:], strict=True):
            h = apply(weight, activation(h), bias)
        return h.to(x.dtype)

    def forward(self, x: Tensor, context: Tensor | None, series: Series | None = None) -> tuple[Tensor, Tensor]:
        """As `Transform.forward`; the log-determinant is exact without a series."""
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():  # the Jacobian is needed in evaluations too
            at = x if differentiable and x.requires_grad else x.detach().requires_grad_()
            g = self._branch(at, self._kept(), self._added(at, context))
            if series is None:
                log_det = exact_log_det(g, at, differentiable)
            else:
                log_det = series_log_det(g, at, series, differentiable)
        return (x + g, log_det) if differentiable else (x + g.detach(), log_det.detach())

    def inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        kept, added = self._kept(), self._added(z, context)
        x, iterations = fixed_point(lambda x, _: z - self._branch(x, kept, added), z, ITERATIONS)
        self.evaluations += iterations
        return x


class ResidualChain(Chain):
    """A Chain that hands every residual block its own series."""

    def forward(self, x: Tensor, context: Tensor | None, series: Estimator | None = None) -> tuple[Tensor, Tensor]:
        """As `Transform.forward`; log-determinants are exact without an estimator."""
        total, block = x.new_zeros(len(x)), 0
        for part in self.parts:
            if series is not None and isinstance(part, ResidualBlock):
                x, log_det = part(x, context, series(block, x))
                block += 1
            else:
                x, log_det = part(x, context)
            total = total + log_det
        return x, total


class ResidualFlow(Flow):
    """Residual blocks with an ActNorm before each, and images squeezed between the scales.

    `log_prob` measures log-determinants by the whole Jacobian for examples of up to 64 values. Beyond, it estimates
    them by 50 terms of the series and 4 fixed probes: see `estimated`.

    Args:
        data, condition: as `Flow`.
        transform: the blocks.
        log_det: of training: exact, `terms` terms of the series, or an unbiased random number of terms.
        terms: of "series".
    """

    transform: ResidualChain
    probes: Tensor

    def __init__(
        self, data: DataSpec, transform: ResidualChain, log_det: LogDet, terms: int, condition: Condition | None
    ) -> None:
        super().__init__(data, continuous(data), transform, condition=condition)
        if log_det == "auto":
            log_det = "exact" if data.dims <= SMALL else "unbiased"
        self.log_det, self.terms = log_det, terms
        self.estimated = data.dims > EXACT
        if self.estimated:
            blocks = sum(isinstance(part, ResidualBlock) for part in transform.parts)
            self.register_buffer("probes", torch.randn(blocks, PROBES, data.dims).sign())

    def _measured(self, x: Tensor, cond: Tensor | None, series: Estimator | None) -> Tensor:
        z, log_det = self.transform(x, self.context(cond), series)
        log_p: Tensor = self.base_log_prob(z) + log_det
        return log_p

    def log_prob(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """[B] nats in model space; the same at every call."""

        def fixed(block: int, x: Tensor) -> Series:
            probes = [probe.reshape(1, *x.shape[1:]).expand_as(x) for probe in self.probes[block]]
            return Series(probes, x.new_ones(1, LONG))

        return self._measured(x, cond, fixed if self.estimated else None)

    def drawn_log_prob(self, batch: Batch, cond: Tensor | None = None) -> Tensor:
        """[B] nats as training measures them: probes and numbers of terms follow the examples' keys."""

        def drawn(block: int, x: Tensor) -> Series:
            probe = batch.normal(f"probe/{block}", x.shape[1:]).to(x.dtype).sign()
            if self.log_det == "series":
                return Series([probe], x.new_ones(1, self.terms))
            return Series([probe], roulette(batch.uniform(f"terms/{block}", ())).to(x.dtype))

        return self._measured(batch.x, cond, None if self.log_det == "exact" else drawn)

    @torch.no_grad()
    def encode(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """[B, D]: the latents, without log-determinants."""

        def none(block: int, x: Tensor) -> Series:
            return Series([torch.zeros_like(x)], x.new_ones(1, 0))

        z: Tensor = self.transform(x, self.context(cond), none)[0]
        return z.flatten(1)


class ResidualLikelihood(NormalisedLikelihood):
    """-log p(x|c) in nats, with the log-determinants of training; layers are tightened once a step."""

    double_backward = True

    def prepare(self, model: ResidualFlow, batch: Batch) -> Batch:
        if model.training:
            for layer in model.modules():
                if isinstance(layer, Lipschitz):
                    layer.tighten()
        return batch

    def loss(self, model: Any, batch: Batch) -> Loss:
        cond = model.given(batch)
        log_p = model.drawn_log_prob(batch, cond) if model.training else model.log_prob(batch.x, cond)
        return Loss(-log_p.sum())


def i_resnet(
    data: DataSpec,
    width: Positive = 64,
    layers: Positive = 2,
    blocks: Positive = 8,
    halvings: NonNegative | None = None,
    lipschitz: Annotated[float, Range(0, 1, "both")] = 0.9,
    log_det: LogDet = "auto",
    terms: Positive = 10,
    activation: Smooth = "lipswish",
    cond: Condition | None = None,
) -> tuple[ResidualFlow, ResidualLikelihood]:
    """i-ResNet, and Residual Flow with log_det "unbiased" and lipswish: blocks x + g(x) with Lip(g) < 1.

    Source: Behrmann et al. 2019, arXiv:1811.00995; Chen et al. 2019, arXiv:1906.02735. Differs: no scale leaves latents
    behind, and there are no dense layers at the end.

    Args:
        data: what is modelled; examples that are no images are vectors.
        width, layers: units or channels of the hidden layers of g, and how many there are.
        blocks: residual blocks, of images those of one scale.
        halvings: of an image's sides; null: until the smaller would be below 4.
        lipschitz: c: Lip(g) <= c.
        log_det: of training: "exact" costs as many passes as an example has values, "series" is the first `terms`
            terms of the power series (biased), "unbiased" a random number of them; "auto" is exact up to 4 values and
            unbiased beyond.
        terms: of "series".
        activation: lipswish, or elu.
        cond: what samples are asked for; every g reads it.
    """
    extra, image = context_dim(cond, data), image_shape(data.shape)
    shape: tuple[int, ...] = image or (data.dims,)
    parts: list[Transform] = [Reshape(data.shape, shape)]
    scales = 1 + (squeezings(image, halvings) if image else 0)
    for scale in range(scales):
        if scale:
            assert image
            parts.append(Squeeze())
            image = squeezed(image)
            shape = image
        for _ in range(blocks):
            parts += [ActNorm(shape[0]), ResidualBlock(shape, width, layers, lipschitz, activation, extra)]
    parts.append(Reshape(shape, (data.dims,)))
    return ResidualFlow(data, ResidualChain(*parts), log_det, terms, cond), ResidualLikelihood()
