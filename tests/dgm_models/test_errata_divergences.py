"""The f-GAN paper's table of divergences against the definitions, on discrete distributions in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

RNG = torch.Generator().manual_seed(0)
P, Q = torch.rand(2, 6, generator=RNG, dtype=torch.float64).softmax(1)
TIGHT = 1e-12  # sums of six float64 terms


def divergence(f: Callable[[Tensor], Tensor], p: Tensor = P, q: Tensor = Q) -> float:
    """D_f(P || Q) = sum_x q f(p / q), the paper's equation 1."""
    return float((q * f(p / q)).sum())


def kl(p: Tensor, q: Tensor) -> float:
    return float((p * (p / q).log()).sum())


def jsd(p: Tensor, q: Tensor) -> float:
    m = (p + q) / 2
    return (kl(p, m) + kl(q, m)) / 2


def js_generator(u: Tensor) -> Tensor:
    return -(u + 1) * ((1 + u) / 2).log() + u * u.log()


def gan_generator(u: Tensor) -> Tensor:
    return u * u.log() - (u + 1) * (u + 1).log()


def pearson_generator(u: Tensor) -> Tensor:
    return (u - 1) ** 2


def neyman_generator(u: Tensor) -> Tensor:
    return (1 - u) ** 2 / u


def test_js_generator_gives_twice_the_jensen_shannon_divergence() -> None:
    assert divergence(js_generator) == pytest.approx(2 * jsd(P, Q), abs=TIGHT)
    assert divergence(js_generator) != pytest.approx(jsd(P, Q), rel=0.1)


def test_js_integral_of_the_table_is_half_of_what_its_generator_gives() -> None:
    integral = 0.5 * float((P * (2 * P / (P + Q)).log() + Q * (2 * Q / (P + Q)).log()).sum())
    assert integral == pytest.approx(jsd(P, Q), abs=TIGHT)
    assert divergence(js_generator) == pytest.approx(2 * integral, abs=TIGHT)


def test_pearson_generator_divides_by_q_and_neyman_s_by_p() -> None:
    over_q, over_p = float(((P - Q) ** 2 / Q).sum()), float(((Q - P) ** 2 / P).sum())
    assert abs(over_q - over_p) > 0.01
    assert divergence(pearson_generator) == pytest.approx(over_q, abs=TIGHT)  # the table prints the other integral
    assert divergence(neyman_generator) == pytest.approx(over_p, abs=TIGHT)


def test_pearson_and_neyman_exchange_when_the_arguments_do() -> None:
    assert divergence(pearson_generator, Q, P) == pytest.approx(divergence(neyman_generator), abs=TIGHT)


def test_gan_generator_is_not_zero_at_one() -> None:
    one = torch.tensor(1.0, dtype=torch.float64)
    assert float(gan_generator(one)) == pytest.approx(-2 * math.log(2), abs=TIGHT)
    for f in (js_generator, pearson_generator, neyman_generator):
        assert float(f(one)) == 0.0


def test_gan_generator_gives_twice_the_divergence_less_log_4() -> None:
    assert divergence(gan_generator) == pytest.approx(2 * jsd(P, Q) - math.log(4), abs=TIGHT)
    assert divergence(gan_generator, P, P) == pytest.approx(-math.log(4), abs=TIGHT)  # and not 0 at P = Q


# name, f, T* = f'(p / q), f*, as printed
CONJUGATES = {
    "kl": (lambda u: u * u.log(), lambda u: 1 + u.log(), lambda t: (t - 1).exp()),
    "reverse kl": (lambda u: -u.log(), lambda u: -1 / u, lambda t: -1 - (-t).log()),
    "pearson": (pearson_generator, lambda u: 2 * (u - 1), lambda t: t**2 / 4 + t),
    "neyman": (neyman_generator, lambda u: 1 - u**-2, lambda t: 2 - 2 * (1 - t).sqrt()),
    "squared hellinger": (lambda u: (u.sqrt() - 1) ** 2, lambda u: 1 - u**-0.5, lambda t: t / (1 - t)),
    "jensen-shannon": (js_generator, lambda u: (2 * u / (u + 1)).log(), lambda t: -(2 - t.exp()).log()),
    "gan": (gan_generator, lambda u: (u / (u + 1)).log(), lambda t: -(1 - t.exp()).log()),
}


@pytest.mark.parametrize("name", CONJUGATES)
def test_variational_bound_at_its_optimum_is_the_generator_s_divergence(name: str) -> None:
    """The conjugates and optimal critics of the table go with the generators, not with the exchanged integrals."""
    f, best, conjugate = CONJUGATES[name]
    t = best(P / Q)
    assert float((P * t - Q * conjugate(t)).sum()) == pytest.approx(divergence(f), abs=TIGHT)
    for scale in (0.9, 1.1):  # any other critic gives less
        assert float((P * t * scale - Q * conjugate(t * scale)).sum()) < divergence(f)
