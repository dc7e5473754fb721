"""The table of divergences against its definitions: suprema and integrals of two known Gaussians, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dgm_models.ops.divergences import DIVERGENCES

NAMES = list(DIVERGENCES)
# q is the wider one: the tails of p^2 / q and of p log(p / q) vanish within the grid, where no density underflows
X = torch.linspace(-14.0, 14.0, 28001, dtype=torch.float64)
STEP = float(X[1] - X[0])
P_MEAN, P_STD, Q_MEAN, Q_STD = 0.3, 0.9, -0.5, 1.2
V = torch.linspace(-5.0, 5.0, 201, dtype=torch.float64)


def log_normal(mean: float, std: float) -> Tensor:
    return -((X - mean) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)


LOG_P, LOG_Q = log_normal(P_MEAN, P_STD), log_normal(Q_MEAN, Q_STD)
P, Q = LOG_P.exp(), LOG_Q.exp()
RATIO = (LOG_P - LOG_Q).exp()


def integral(values: Tensor) -> float:
    return float(values.sum()) * STEP


def kl(m1: float, s1: float, m2: float, s2: float) -> float:
    return math.log(s2 / s1) + (s1**2 + (m1 - m2) ** 2) / (2 * s2**2) - 0.5


def pearson() -> float:
    """int p^2 / q - 1 in closed form: the Gaussian integral of precision a = 2 / sp^2 - 1 / sq^2."""
    a = 2 / P_STD**2 - 1 / Q_STD**2
    b = 2 * P_MEAN / P_STD**2 - Q_MEAN / Q_STD**2
    c = 2 * P_MEAN**2 / P_STD**2 - Q_MEAN**2 / Q_STD**2
    return Q_STD / P_STD**2 / math.sqrt(a) * math.exp((b**2 / a - c) / 2) - 1


def hellinger() -> float:
    total = P_STD**2 + Q_STD**2
    overlap = math.sqrt(2 * P_STD * Q_STD / total) * math.exp(-((P_MEAN - Q_MEAN) ** 2) / (4 * total))
    return 2 - 2 * overlap


def jensen_shannon() -> float:
    m = (P + Q) / 2
    return (integral(torch.xlogy(P, P / m)) + integral(torch.xlogy(Q, Q / m))) / 2


# each from its usual definition, none from the table
EXACT = {
    "kl": kl(P_MEAN, P_STD, Q_MEAN, Q_STD),
    "reverse_kl": kl(Q_MEAN, Q_STD, P_MEAN, P_STD),
    "pearson": pearson(),
    "hellinger": hellinger(),
    "jensen_shannon": 2 * jensen_shannon(),
    "gan": 2 * jensen_shannon() - math.log(4),
    "total_variation": integral((P - Q).abs()) / 2,
}
# sums of smooth densities that vanish at both ends are exact to rounding; |p - q| has kinks: errors of STEP^2
QUADRATURE = dict.fromkeys(NAMES, 1e-10) | {"total_variation": 1e-6}


@pytest.mark.parametrize("name", NAMES)
def test_divergence_of_two_gaussians_is_the_known_one(name: str) -> None:
    assert integral(Q * DIVERGENCES[name].f(RATIO)) == pytest.approx(EXACT[name], abs=QUADRATURE[name])


@pytest.mark.parametrize("name", NAMES)
def test_bound_at_the_best_critic_is_the_divergence_and_less_elsewhere(name: str) -> None:
    divergence = DIVERGENCES[name]

    def bound(t: Tensor) -> float:
        return integral(P * t - Q * divergence.conjugate(t))

    best = divergence.slope(RATIO)
    assert bound(best) == pytest.approx(EXACT[name], abs=QUADRATURE[name])
    # towards a constant, which stays within the conjugate's domain
    for share in (0.9, 0.5, 0.0):
        assert bound(share * best + (1 - share) * divergence.threshold) < EXACT[name] - 1e-4
    assert bound(torch.full_like(X, divergence.threshold)) == pytest.approx(divergence.least, abs=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_bound_through_the_output_activation_is_below_the_divergence(name: str) -> None:
    divergence = DIVERGENCES[name]
    for slope, offset in ((0.0, 0.0), (0.5, 0.2), (-1.0, 0.0)):
        v = slope * X.clamp(-3, 3) + offset
        assert integral(P * divergence.activation(v) - Q * divergence.conjugate_at(v)) < EXACT[name]


@pytest.mark.parametrize("name", NAMES)
def test_conjugate_is_the_supremum(name: str) -> None:
    divergence = DIVERGENCES[name]
    u = torch.logspace(-6, 6, 240001, dtype=torch.float64)
    t = divergence.slope(torch.logspace(-2, 2, 41, dtype=torch.float64))
    if name == "total_variation":
        t = torch.linspace(-0.5, 0.5, 41, dtype=torch.float64)
    found = torch.stack([(value * u - divergence.f(u)).max() for value in t])
    # neighbours on the grid of u differ by 1.2e-4 of u, and the maximum is flat: an error of half its square times
    # u^2 f''(u), below 1e4 for u up to 100; the kink of |u - 1| and its end at 0 are off by a step: 6e-5
    assert torch.allclose(found, divergence.conjugate(t), rtol=1e-6, atol=7e-5)


@pytest.mark.parametrize("name", NAMES)
def test_conjugate_at_is_the_conjugate_of_the_activation(name: str) -> None:
    divergence = DIVERGENCES[name]
    unstable = divergence.conjugate(divergence.activation(V))
    assert torch.allclose(divergence.conjugate_at(V), unstable, rtol=1e-10, atol=1e-12)  # float64 less e^5 of it


@pytest.mark.parametrize(("name", "v"), [("jensen_shannon", 60.0), ("gan", 60.0), ("reverse_kl", 800.0)])
def test_conjugate_at_is_finite_where_the_conjugate_is_not(name: str, v: float) -> None:
    divergence = DIVERGENCES[name]
    x = torch.tensor(v, dtype=torch.float64)
    assert not bool(divergence.conjugate(divergence.activation(x)).isfinite())
    assert float(divergence.conjugate_at(x)) == pytest.approx(v, abs=1.1)  # v - 1, v - log 2, v


@pytest.mark.parametrize("name", NAMES)
def test_slope_and_threshold_are_the_derivative(name: str) -> None:
    divergence = DIVERGENCES[name]
    u = torch.tensor([0.2, 0.7, 1.3, 4.0], dtype=torch.float64, requires_grad=True)
    (derivative,) = torch.autograd.grad(divergence.f(u).sum(), u)
    assert torch.allclose(divergence.slope(u.detach()), derivative, rtol=1e-12)
    one = torch.ones(1, dtype=torch.float64)
    assert float(divergence.slope(one)) == pytest.approx(divergence.threshold, abs=1e-12)
    assert float(divergence.f(one)) == pytest.approx(divergence.least, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_activation_rises_through_the_threshold_into_the_domain(name: str) -> None:
    divergence = DIVERGENCES[name]
    t = divergence.activation(V)
    assert bool((t.diff() > 0).all()) and bool(divergence.conjugate(t).isfinite().all())
    assert float(t[0]) < divergence.threshold < float(t[-1])
    # from networks' outputs about 0: data and samples are told apart at v = 0, for KL at v = 1
    at = torch.tensor([1.0 if name == "kl" else 0.0], dtype=torch.float64)
    assert float(divergence.activation(at)) == pytest.approx(divergence.threshold, abs=1e-12)
