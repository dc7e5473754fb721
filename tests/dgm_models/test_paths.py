"""Paths from data to noise: they are what the papers print, they rise, and grids and inverses agree with them."""

from __future__ import annotations

import math

import pytest
import torch

from dgm_models.diffusion.ncsn import Ladder
from dgm_models.ops.paths import (
    Cosine,
    Karras,
    Linear,
    Path,
    Straight,
    SubVariancePreserving,
    VarianceExploding,
    VariancePreserving,
)

PATHS = [
    Linear(), Linear(length=300), Cosine(), Cosine(length=50), VariancePreserving(),
    VariancePreserving(beta_min=3.0, beta_max=3.0), SubVariancePreserving(), VarianceExploding(), Karras(), Straight(),
    Ladder(0.02, 3.0, 20, 2),
]  # fmt: skip
CHAINS = [path for path in PATHS if isinstance(path, Linear | Cosine | Ladder)]


def called(path: Path) -> str:
    return path.name


def times(path: Path, n: int = 201) -> torch.Tensor:
    return torch.linspace(path.first, 1, n, dtype=torch.float64)


@pytest.mark.parametrize("path", PATHS, ids=called)
def test_path_goes_from_data_to_noise_without_a_turn(path: Path) -> None:
    t = times(path)
    alpha, sigma = path.alpha(t), path.sigma(t)
    assert alpha.dtype == sigma.dtype == torch.float64
    assert bool((path.ratio(t).diff() > 0).all()) and bool((alpha.diff() <= 0).all())
    assert bool((path.snr(t).diff() < 0).all())
    assert float(path.ratio(t)[0]) < 0.06 and float(path.ratio(t)[-1]) > 0.55
    assert torch.allclose(path.snr(t), (1 / path.ratio(t) - 1).square())  # r = sigma / (alpha + sigma)


@pytest.mark.parametrize("path", PATHS, ids=called)
def test_path_says_when_a_ratio_is_reached(path: Path) -> None:
    t = times(path)
    assert float((path.when(path.ratio(t)) - t).abs().max()) < 1e-12  # rounding of a float64, a few times over
    assert path.when(float(path.ratio(t[77]))) == pytest.approx(float(t[77]), abs=1e-12)
    assert float(path.when(1.0)) == 1.0 and 0.0 <= float(path.when(0.0)) <= path.first


@pytest.mark.parametrize("path", PATHS, ids=called)
@pytest.mark.parametrize("spacing", ["uniform", "quadratic"])
@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_grid_falls_from_noise_to_data(path: Path, spacing: str, steps: int) -> None:
    grid = path.grid(steps, spacing)
    assert len(grid) == steps and len(grid.t) == len(grid.alpha) == len(grid.sigma) == steps + 1
    assert bool((grid.t[:-1].diff() < 0).all())  # no time twice
    assert float(grid.t[0]) == 1.0 and float(grid.t[-1]) == 0.0
    assert float(grid.alpha[-1]) == 1.0 and float(grid.sigma[-1]) == 0.0
    assert torch.equal(grid.alpha[:-1], path.alpha(grid.t[:-1]))
    assert float(grid.t[-2]) >= path.first - 1e-15
    if steps > 1 and path not in CHAINS:
        assert float(grid.t[-2]) == pytest.approx(path.first)
        uniform = (grid.t[:-1] - path.first) / (1 - path.first)
        told = uniform if spacing == "uniform" else uniform.sqrt()
        assert torch.allclose(told, torch.linspace(1, 0, steps, dtype=torch.float64), atol=1e-7)  # a root near 0


@pytest.mark.parametrize("path", CHAINS, ids=called)
def test_chain_is_trained_and_sampled_at_its_own_steps(path: Path) -> None:
    last = len(path.chain)
    steps = torch.arange(last) if isinstance(path, Ladder) else torch.arange(1, last + 1)
    places = steps.double() / (last - 1 if isinstance(path, Ladder) else last)
    u = (torch.arange(10 * last) + 0.5) / (10 * last)
    drawn = path.draw(u)
    assert torch.allclose(drawn.unique(), places)  # every step, and no other time
    assert bool((drawn.unique(return_counts=True)[1] == 10).all())  # all alike
    assert torch.allclose(path.grid(last).t[:-1].flip(0), places)


@pytest.mark.parametrize("path", [path for path in PATHS if path not in CHAINS], ids=called)
def test_chain_of_a_continuous_path_tells_as_much_in_every_step(path: Path) -> None:
    grid = path.chain
    told = path.snr(grid.t[:-1]).log1p().diff()
    assert len(grid) == 1000 and float(grid.t[0]) == 1.0 and float(grid.t[-2]) == path.first
    assert float((told / told.mean() - 1).abs().max()) < 1e-6  # differences of 1e-2 between numbers of about 10
    u = torch.tensor([1e-7, 0.5, 1 - 1e-7])
    assert float(path.draw(u)[0]) >= path.first and float(path.draw(u)[-1]) <= 1


@pytest.mark.parametrize(("length", "steps"), [(1000, 1000), (1000, 37), (50, 50), (50, 49)])
def test_grid_of_a_chain_has_its_steps_and_refuses_more(length: int, steps: int) -> None:
    path = Linear(length=length)
    places = path.grid(steps).t[:-1] * length
    assert torch.allclose(places, places.round(), atol=1e-9) and len(places.round().unique()) == steps
    with pytest.raises(ValueError, match=f"steps: {length + 1} of a chain that has {length}"):
        path.grid(length + 1)


def test_linear_chain_is_the_product_of_its_steps() -> None:
    path, kept, variance = Linear(), 1.0, 0.0
    for i in range(1, 1001):
        beta = 1e-4 + (0.02 - 1e-4) * (i - 1) / 999
        kept, variance = (
            kept * math.sqrt(1 - beta),
            (1 - beta) * variance + beta,
        )  # x_i = sqrt(1 - beta) x + sqrt(beta) eps
        if i in (1, 2, 500, 1000):
            t = torch.tensor(i / 1000)
            assert float(path.alpha(t)) == pytest.approx(kept, rel=1e-6)  # t is a float32 here
            assert float(path.sigma(t)) == pytest.approx(math.sqrt(variance), rel=1e-6)


def test_cosine_chain_is_what_is_printed() -> None:
    path = Cosine()

    def f(i: int) -> float:
        return math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    for i in (1, 250, 999):
        found = float(path.alpha(torch.tensor(i / 1000, dtype=torch.float64)) ** 2)
        assert found == pytest.approx(f(i) / f(0), rel=1e-9)
    last = path.alpha(torch.tensor([0.999, 1.0], dtype=torch.float64)).square()
    assert float(last[1] / last[0]) == pytest.approx(0.001, rel=1e-6)  # beta is at most 0.999


def test_variance_preserving_paths_are_integrals_of_beta() -> None:
    t = torch.tensor([0.003, 0.4, 1.0], dtype=torch.float64)
    for i, end in enumerate(t):
        s = torch.linspace(0, float(end), 20_001, dtype=torch.float64)
        total = float(torch.trapezoid(0.1 + s * (20 - 0.1), s))
        assert float(VariancePreserving().alpha(t)[i]) == pytest.approx(math.exp(-total / 2), rel=1e-9)
        assert float(VariancePreserving().sigma(t)[i] ** 2) == pytest.approx(1 - math.exp(-total), rel=1e-9)
        assert float(SubVariancePreserving().sigma(t)[i]) == pytest.approx(1 - math.exp(-total), rel=1e-9)


def test_karras_grid_is_the_published_one() -> None:
    n, low, high, rho = 18, 0.002, 80.0, 7.0
    for i, sigma in enumerate(Karras().grid(n).sigma[:-1]):
        root = high ** (1 / rho) + i / (n - 1) * (low ** (1 / rho) - high ** (1 / rho))
        assert float(sigma) == pytest.approx(root**rho, rel=1e-9)


def test_exploding_levels_are_geometric() -> None:
    sigma = VarianceExploding(0.01, 50.0).grid(11).sigma[:-1]
    assert torch.allclose(sigma[1:] / sigma[:-1], torch.full((10,), (0.01 / 50) ** 0.1, dtype=torch.float64))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VarianceExploding(2.0, 1.0), "sigma_min: 2 is not below sigma_max, 1"),
        (lambda: Karras(1.0, 1.0), "sigma_min: 1 is not below sigma_max, 1"),
        (lambda: VariancePreserving(2.0, 1.0), "beta_min: 2 is above beta_max, 1"),
        (lambda: Linear(length=20), "beta_last: 0.02"),
    ],
)
def test_path_that_cannot_be_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
