"""Consistency models: the boundary, a Gaussian's trajectories in closed form, the levels drawn, a short training."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dgm_models.diffusion.consistency import ConsistencyModel, distance
from dgm_models.method import Method, build, fit, resampled
from dgm_models.protocols import DataSpec
from dgm_models.training.optim import Optim, Optims
from dgm_models.training.source import ArraySource
from dgm_models.training.trainer import Train, Trainer
from tests.dgm_models.test_diffusion_anchors import batch_of, draws

LINE = DataSpec("vector", (1,))
MEAN, DEVIATION = 0.7, 0.5


def made(**params) -> Method:
    return build("diffusion/consistency", LINE, network={"name": "mlp", "width": 64, "depth": 2}, **params)


def exact(x: Tensor, sigma: Tensor, low: float = 0.002) -> Tensor:
    """Where the trajectory of N(MEAN, DEVIATION^2) through x at sigma begins: deviations keep their ratio."""
    ratio = (DEVIATION**2 + low**2) / (DEVIATION**2 + sigma.square())
    return MEAN + (x - MEAN) * ratio.sqrt()[:, None]


def levels(n: int) -> Tensor:
    return torch.logspace(math.log10(0.002), math.log10(80), n, dtype=torch.float64)


def test_boundary_holds_whatever_the_network_says() -> None:
    model = made().model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 1)
    x = draws(50, 1)
    assert torch.equal(model.clean(x, torch.full((50,), 0.002, dtype=torch.float64)), x)
    assert not torch.allclose(model.clean(x, torch.full((50,), 0.01, dtype=torch.float64)), x)


def test_exact_map_has_no_distance_along_its_trajectories() -> None:
    x, sigma = MEAN + DEVIATION * draws(40, 1), levels(40)
    far = MEAN + (x - MEAN) * ((DEVIATION**2 + sigma.square()) / (DEVIATION**2 + 0.002**2)).sqrt()[:, None]
    low = torch.full_like(sigma, 0.002)
    assert float(distance(exact(far, sigma), exact(x, low)).max()) < 1e-20  # the square of float64's rounding
    assert torch.equal(exact(x, low), x)


def test_distance_is_the_pseudo_huber_one() -> None:
    a, b = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-9, 0.0]]), torch.zeros(3, 2)
    c = 0.00054 * math.sqrt(2)
    found = distance(a, b)
    assert float(found[0]) == pytest.approx(math.sqrt(25 + c**2) - c, rel=1e-7)  # 3 and 4 are float32
    assert float(found[1]) == 0.0
    assert float(found[2]) == pytest.approx(1e-18 / (2 * c), rel=1e-6)  # the plain difference would be 0


class Exact(ConsistencyModel):
    def clean(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        return exact(x, sigma)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_samples_of_the_exact_map_have_the_data_s_law(steps: int) -> None:
    """One step from N(0, 80^2) for N(MEAN, 80^2 + DEVIATION^2); further steps forget that difference."""
    model = made(steps=steps).model.double()
    model.__class__ = Exact
    n = 20_000
    x = model.sample(n, torch.Generator().manual_seed(0))
    assert model.evaluations == steps
    # the mean of the start is off by MEAN, of 80: by MEAN DEVIATION / 80 at the end; four standard errors
    assert float(x.mean()) == pytest.approx(MEAN, abs=4 * DEVIATION / math.sqrt(n) + MEAN * DEVIATION / 80)
    assert float(x.std()) == pytest.approx(DEVIATION, abs=4 * DEVIATION / math.sqrt(2 * n))


def test_levels_are_neighbours_drawn_by_the_normal_law_of_their_logarithm() -> None:
    """p(i) ~ Phi((ln s_i+1 - mean) / std) - Phi((ln s_i - mean) / std)."""
    method, n = made(), 40_000
    low, high = method.objective.levels(method.model, batch_of(draws(n, 1)))
    edges = method.model.path.sigma(torch.arange(11).double() / 10)
    place = torch.bucketize(low + 1e-9, edges) - 1
    assert torch.allclose(low, edges[place], rtol=1e-6) and torch.allclose(high, edges[place + 1], rtol=1e-6)
    share = torch.special.ndtr((edges.log() + 1.1) / 2.0).diff()
    share = share / share.sum()
    counts = torch.bincount(place, minlength=10).double()
    assert bool(((counts / n - share).abs() < 4.5 * (share * (1 - share) / n).sqrt() + 1e-12).all())


def test_intervals_double_with_training_and_stay_in_the_checkpoint(tmp_path) -> None:
    def trainer(steps: int) -> Trainer:
        method = made(intervals=3, intervals_last=20, doubling=4)
        source = ArraySource(draws(64, 1).float(), LINE, seed=0)
        return Trainer(method.model, method.objective, source, Train(steps=steps, batch_size=8), Optims(Optim()), 0)

    first, seen = trainer(20), []
    while not first.done:
        seen.append(int(first.objective.intervals))
        first.step()
    assert seen == [3] * 4 + [6] * 4 + [12] * 4 + [20] * 8  # 24 is above the last number
    first.save(tmp_path / "checkpoint")
    second = trainer(30)
    second.load(tmp_path / "checkpoint")
    assert int(second.objective.intervals) == 20


def test_target_has_no_gradient_and_the_same_noise() -> None:
    method = made()
    seen: list[tuple[Tensor, Tensor, bool]] = []

    class Watched(ConsistencyModel):
        def clean(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
            found = super().clean(x, sigma, cond)
            seen.append((x, sigma, found.requires_grad))
            return found

    method.model.__class__ = Watched
    batch = batch_of(draws(32, 1).float())
    method.objective.loss(method.model, batch)
    (low_x, low, learned), (high_x, high, also) = seen
    assert not learned and also
    assert torch.allclose((low_x - batch.x) / low[:, None], (high_x - batch.x) / high[:, None], rtol=1e-3, atol=1e-3)


def test_trained_map_is_near_the_exact_one() -> None:
    """On N(MEAN, DEVIATION^2), by the root mean square over the data's noisy law at every size of noise."""
    method = made(doubling=60, intervals_last=80)
    x = (MEAN + DEVIATION * draws(20_000, 1)).float()
    fit(method, x, steps=250, batch_size=256, average=0.97, optim={"lr": 5e-3, "schedule": "cosine"})
    sigma = levels(20).repeat_interleave(200)
    noisy = MEAN + (DEVIATION**2 + sigma.square()).sqrt()[:, None] * draws(4000, 1, 3)
    with torch.no_grad():
        found = method.model.clean(noisy.float(), sigma).double()
    apart = float((found - exact(noisy, sigma)).square().mean().sqrt())
    # measured 0.09 of three seeds; the data's mean for every x would be off by DEVIATION
    assert apart < 0.25 * DEVIATION
    drawn = resampled(method, {"steps": 2}).model.sample(4000, torch.Generator().manual_seed(0))
    assert float(drawn.std()) == pytest.approx(DEVIATION, rel=0.2)


def test_what_consistency_cannot_be_built_with_is_refused() -> None:
    with pytest.raises(ValueError, match="path: straight does not begin at a noise"):
        made(path={"name": "straight"})
    with pytest.raises(ValueError, match="intervals_last: 5 is below intervals, 10"):
        made(intervals_last=5)
