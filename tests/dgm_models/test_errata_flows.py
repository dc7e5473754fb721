"""The sign of a coupling layer's log-determinant, forward and inverse, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor


def scale(x: Tensor) -> Tensor:
    return 0.5 * torch.tanh(2 * x) + 0.6


def shift(x: Tensor) -> Tensor:
    return torch.sin(3 * x)


def forward(x: Tensor) -> Tensor:
    """x -> z: z1 = x1, z2 = x2 exp(s(x1)) + t(x1). RealNVP, section 3.3, read as the map f from data to latents."""
    return torch.stack([x[..., 0], x[..., 1] * scale(x[..., 0]).exp() + shift(x[..., 0])], -1)


def inverse(z: Tensor) -> Tensor:
    """z -> x: x1 = z1, x2 = (z2 - t(z1)) exp(-s(z1)). RealNVP, section 3.3."""
    return torch.stack([z[..., 0], (z[..., 1] - shift(z[..., 0])) * (-scale(z[..., 0])).exp()], -1)


def slogdet(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    jacobians = torch.stack([torch.autograd.functional.jacobian(function, row) for row in x])
    return torch.linalg.slogdet(jacobians)[1]


X = torch.randn(7, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_inverse_undoes_forward() -> None:
    assert torch.allclose(inverse(forward(X)), X, atol=1e-12)  # float64


def test_log_determinant_is_plus_s_forward_and_minus_s_backward() -> None:
    assert torch.allclose(slogdet(forward, X), scale(X[:, 0]), atol=1e-12)
    assert torch.allclose(slogdet(inverse, forward(X)), -scale(X[:, 0]), atol=1e-12)


@pytest.mark.parametrize(("sign", "total"), [(1, 1.0), (-1, None)])
def test_density_integrates_to_one_with_the_forward_sign_alone(sign: int, total: float | None) -> None:
    """log p(x) = log N(f(x)) + log|det df/dx|: with the sampling direction's sign it is no density."""
    grid = torch.linspace(-9, 9, 721, dtype=torch.float64)
    x = torch.cartesian_prod(grid, grid)
    log_normal = -0.5 * forward(x).square().sum(1) - math.log(2 * math.pi)
    mass = float((log_normal + sign * scale(x[:, 0])).exp().sum()) * float(grid[1] - grid[0]) ** 2
    if total is None:
        assert abs(mass - 1) > 0.1
    else:
        assert mass == pytest.approx(total, abs=1e-3)  # a grid of 1/40 on a smooth density, and no mass beyond 9


def test_bits_of_a_sample_agree_with_its_drawing() -> None:
    """Drawing x = f^-1(z) gives log p(x) = log N(z) - log|det df^-1/dz|, the same number."""
    z = forward(X)
    by_data = -0.5 * z.square().sum(1) + slogdet(forward, X)
    by_latent = -0.5 * z.square().sum(1) - slogdet(inverse, z)
    assert torch.allclose(by_data, by_latent, atol=1e-12)  # float64
