"""The mixture of Gaussians: its density, and EM held against a twin in plain numpy, step by step."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from dgm_models.method import build, encoded, fit
from dgm_models.protocols import DataSpec
from dgm_models.training.optim import Optim, Optims
from dgm_models.training.source import ArraySource
from dgm_models.training.trainer import Train, Trainer
from dgm_models.vae.gaussian_mixture import Covariance, Em, GaussianMixture, Gradient, seeds

DATA = DataSpec("vector", (2,))
COVARIANCES: tuple[Covariance, ...] = ("full", "diagonal")
Array = np.ndarray


def rows(n: int = 240, seed: int = 0) -> Tensor:
    """[n, 2] float64 from three overlapping Gaussians, one of them long and tilted."""
    rng = torch.Generator().manual_seed(seed)
    eps = torch.randn(n, 2, generator=rng, dtype=torch.float64)
    component = torch.arange(n) % 3
    roots = torch.tensor([[[1.5, 0.0], [1.2, 0.4]], [[0.5, 0.0], [0.0, 0.5]], [[0.3, 0.0], [0.0, 1.0]]]).double()
    centres = torch.tensor([[0.0, 0.0], [2.0, -1.0], [-2.0, 1.0]], dtype=torch.float64)
    return centres[component] + (roots[component] @ eps[..., None])[..., 0]


def running(
    x: Tensor, components: int, covariance: Covariance, rate: float = 1.0, batch: int = 0, floor: float = 1e-9
) -> Trainer:
    """EM in float64 through the trainer."""
    torch.manual_seed(0)
    data = DataSpec("vector", (x.shape[1],))
    model = GaussianMixture(data, components, covariance).double()
    settings = Train(steps=100, batch_size=batch or len(x), report_every=1)
    return Trainer(model, Em(rate, floor), ArraySource(x, data), settings, Optims(Optim(name="sgd", lr=1.0)), 0)


def parts(model: GaussianMixture) -> tuple[Array, Array, Array]:
    """Weights [K], means [K, D], covariances [K, D, D]."""
    with torch.no_grad():
        factor = model.factor()
        covariance = factor @ factor.mT if model.full else torch.diag_embed(factor**2)
        return model.logits.softmax(0).numpy().copy(), model.mean.numpy().copy(), covariance.numpy()


def normal(x: Array, mean: Array, covariance: Array) -> Array:
    away = x - mean
    square = np.einsum("bi,ij,bj->b", away, np.linalg.inv(covariance), away)
    return np.exp(-0.5 * square) / np.sqrt(np.linalg.det(2 * math.pi * covariance))


def log_likelihood(x: Array, weights: Array, means: Array, covariances: Array) -> float:
    each = [w * normal(x, m, c) for w, m, c in zip(weights, means, covariances, strict=True)]
    return float(np.log(np.sum(each, axis=0)).mean())


def twin(x: Array, weights: Array, means: Array, covariances: Array, full: bool, rate: float = 1.0):
    """One step of (stepwise) EM, written as the papers write it: expected statistics, then the M-step."""
    joint = np.array([w * normal(x, m, c) for w, m, c in zip(weights, means, covariances, strict=True)])  # [K, B]
    share = joint / joint.sum(0)
    statistics = [share.mean(1), share @ x / len(x), np.einsum("kb,bi,bj->kij", share, x, x) / len(x)]
    old = [
        weights,
        weights[:, None] * means,
        weights[:, None, None] * (covariances + np.einsum("ki,kj->kij", means, means)),
    ]
    zeroth, first, second = ((1 - rate) * a + rate * b for a, b in zip(old, statistics, strict=True))
    mean = first / zeroth[:, None]
    covariance = second / zeroth[:, None, None] - np.einsum("ki,kj->kij", mean, mean)
    return zeroth, mean, covariance if full else covariance * np.eye(x.shape[1])


# ---- the density


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_mixture_density_integrates_to_one(covariance: Covariance) -> None:
    torch.manual_seed(0)
    model = GaussianMixture(DATA, 3, covariance)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.7)
        side = torch.linspace(-16, 16, 801, dtype=torch.float64)
        grid = torch.cartesian_prod(side, side)
        mass = float(model.log_prob(grid).exp().sum() * (side[1] - side[0]) ** 2)
    assert mass == pytest.approx(1.0, abs=1e-6)  # the trapezium rule of smooth functions that vanish at the ends


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_mixture_density_is_torch_s(covariance: Covariance) -> None:
    torch.manual_seed(1)
    model = GaussianMixture(DATA, 3, covariance)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))
    weights, means, covariances = (torch.from_numpy(part).double() for part in parts(model))
    other = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(weights), torch.distributions.MultivariateNormal(means, covariances)
    )
    x = torch.randn(50, 2, dtype=torch.float64) * 3
    assert torch.allclose(model.log_prob(x), other.log_prob(x), rtol=1e-6)  # weights pass through float32


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_mixture_samples_have_its_moments(covariance: Covariance) -> None:
    torch.manual_seed(2)
    model, n = GaussianMixture(DATA, 3, covariance), 40_000
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
    x = model.sample(n, torch.Generator().manual_seed(0)).double()
    weights, means, covariances = parts(model)
    mean = weights @ means
    second = np.einsum("k,kij->ij", weights, covariances + np.einsum("ki,kj->kij", means, means))
    centred = x - torch.from_numpy(mean)
    assert np.allclose(x.mean(0).numpy(), mean, atol=5 * float(x.std()) / math.sqrt(n))  # five standard errors
    products = centred[:, :, None] * centred[:, None, :]
    error = products.std(0) / math.sqrt(n)
    assert bool(((products.mean(0) - torch.from_numpy(second - np.outer(mean, mean))).abs() < 5 * error).all())
    assert float(model.log_prob(x).detach().mean()) == pytest.approx(log_likelihood(x.numpy(), *parts(model)), abs=1e-4)


# ---- EM


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_em_step_is_that_of_the_numpy_twin(covariance: Covariance) -> None:
    x = rows()
    trainer = running(x, 3, covariance)
    trainer.step()
    for _ in range(12):
        expected = twin(x.numpy(), *parts(trainer.model), full=covariance == "full")
        trainer.step()
        for one, two in zip(parts(trainer.model), expected, strict=True):
            assert np.allclose(one, two, rtol=1e-9, atol=1e-12)  # float64
    trainer.metrics()
    before = log_likelihood(x.numpy(), *parts(trainer.model))
    trainer.step()
    # what is reported is not the half square that carries the gradient; summed as float32
    assert trainer.metrics()["loss"] == pytest.approx(-before, rel=1e-5)


@pytest.mark.parametrize("rate", [0.1, 0.6])
@pytest.mark.parametrize("covariance", COVARIANCES)
def test_stepwise_em_averages_the_expected_statistics(covariance: Covariance, rate: float) -> None:
    x = rows()
    trainer = running(x, 3, covariance, rate, batch=60)
    trainer.step()
    for _ in range(5):
        batch = trainer.source.batch(trainer.position, trainer.position + 60).x.numpy()
        expected = twin(batch, *parts(trainer.model), full=covariance == "full", rate=rate)
        trainer.step()
        for one, two in zip(parts(trainer.model), expected, strict=True):
            assert np.allclose(one, two, rtol=1e-9, atol=1e-12)  # float64


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("covariance", COVARIANCES)
def test_em_likelihood_never_falls(covariance: Covariance, seed: int) -> None:
    x = rows(seed=seed)
    trainer = running(x, 4, covariance)
    found = []
    for _ in range(40):
        trainer.step()
        found.append(log_likelihood(x.numpy(), *parts(trainer.model)))
    assert all(after >= before - 1e-12 for before, after in pairwise(found))  # float64
    assert found[-1] > found[0] + 0.01


def test_em_with_a_floor_that_binds_climbs_as_well() -> None:
    """Data on a line: without the floor the likelihood has no upper bound."""
    x = rows() @ torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    trainer = running(x, 3, "full", floor=1e-2)
    found = []
    for _ in range(30):
        trainer.step()
        found.append(log_likelihood(x.numpy(), *parts(trainer.model)))
    # the first step may fall: it takes the start, which does not keep the floor's condition, to where it is kept
    assert all(after >= before - 1e-12 for before, after in pairwise(found))
    smallest = np.linalg.eigvalsh(parts(trainer.model)[2])[:, 0]
    assert np.allclose(smallest, 1e-2, rtol=1e-6)  # an eigenvalue of a product of float64 factors


def test_em_keeps_a_component_that_explains_nothing() -> None:
    x = rows()
    trainer = running(x, 3, "full")
    trainer.step()
    with torch.no_grad():
        trainer.model.mean[0] = 1e4
    before = parts(trainer.model)
    trainer.step()
    weights, means, covariances = parts(trainer.model)
    assert 0 < weights[0] < 1e-11
    assert np.allclose(means[0], before[1][0]) and np.allclose(covariances[0], before[2][0])
    assert math.isfinite(log_likelihood(x.numpy(), weights, means, covariances))


def test_em_in_batches_comes_near_em_over_all_rows() -> None:
    x = rows(1200)
    whole, batches = running(x, 3, "full"), running(x, 3, "full", rate=0.1, batch=100)
    whole.step()
    batches.step()
    for mine, theirs in zip(batches.model.parameters(), whole.model.parameters(), strict=True):
        mine.data.copy_(theirs.data)  # the same place, so that both climb the same hill
    for _ in range(50):
        whole.step()
    for _ in range(240):
        batches.step()
    one, two = (log_likelihood(x.numpy(), *parts(trainer.model)) for trainer in (whole, batches))
    assert two == pytest.approx(one, abs=0.02)  # the last statistics weigh about 1000 rows
    assert two < one + 1e-3


def test_em_with_one_component_is_the_sample_s_mean_and_covariance() -> None:
    x = rows()
    trainer = running(x, 1, "full")
    trainer.step()
    _, mean, covariance = parts(trainer.model)
    assert np.allclose(mean[0], x.numpy().mean(0), rtol=1e-9)
    assert np.allclose(covariance[0], np.cov(x.numpy().T, bias=True), rtol=1e-9)


def test_em_validates_with_the_likelihood() -> None:
    x = rows().float()
    method = build("vae/gaussian_mixture", DATA, components=3)
    optim = {"name": "sgd", "lr": 1.0}
    fit(method, x, valid=x, steps=4, batch_size=len(x), validate_every=4, report_every=4, optim=optim)
    with torch.no_grad():
        expected = -float(method.model.log_prob(encoded(method.model, x).x).mean())
    assert method.history[-1][1]["valid/loss"] == pytest.approx(expected, rel=1e-6)  # summed as float32


# ---- the start, and the gradient


def test_seeds_are_examples_that_follow_their_keys_and_not_their_order() -> None:
    x = rows().float()
    batch = encoded(GaussianMixture(DATA, 5, "full"), x)
    centres, squares = seeds(batch, 5)
    assert all(bool((x.double() == centre).all(1).any()) for centre in centres)
    assert torch.allclose(squares, torch.cdist(x.double(), centres).min(1).values ** 2, atol=1e-9)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    shuffled = batch.map(lambda tensor: tensor[order])
    assert torch.equal(seeds(shuffled, 5)[0], centres)
    assert not torch.equal(seeds(batch.fold("other"), 5)[0], centres)
    assert float(seeds(batch, 5, trials=20)[1].sum()) < float(squares.sum())


def test_seeds_come_in_proportion_to_the_squared_distance() -> None:
    """Three places at 0, 1 and 3 with 20, 20 and 1 examples; by the keys of 2000 draws."""
    x = torch.tensor([0.0] * 20 + [1.0] * 20 + [3.0])[:, None]
    batch = encoded(GaussianMixture(DataSpec("vector", (1,)), 2, "full"), x)
    counts: dict[tuple[float, float], int] = {}
    for draw in range(2000):
        first, second = (float(c) for c in seeds(batch.fold(draw), 2)[0][:, 0])
        counts[first, second] = counts.get((first, second), 0) + 1
    from_zero = counts[0.0, 1.0] + counts[0.0, 3.0]
    assert (0.0, 0.0) not in counts
    for found, total, share in (
        (from_zero, 2000, 20 / 41),
        (counts[0.0, 3.0], from_zero, 9 / (20 * 1 + 9)),
    ):
        assert found / total == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / total))  # four s.e.


def test_start_needs_an_example_for_every_component() -> None:
    method = build("vae/gaussian_mixture", DATA, components=9)
    with pytest.raises(ValueError, match=r"train\.batch_size: 8 examples cannot seed 9 components"):
        fit(method, rows(12).float(), steps=1, batch_size=8)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_gradient_reaches_the_likelihood_of_em(covariance: Covariance) -> None:
    x = rows()
    x += 3 * x.new_tensor([[0.0, 0.0], [2.0, -1.0], [-2.0, 1.0]])[torch.arange(len(x)) % 3]  # apart: one hill
    em = running(x, 3, covariance)
    for _ in range(30):
        em.step()
    model = GaussianMixture(DATA, 3, covariance).double()
    optim = Optims(Optim(lr=0.1, schedule="cosine"))
    settings = Train(steps=150, batch_size=len(x), report_every=150)
    Trainer(model, Gradient(), ArraySource(x, DATA), settings, optim, 0).run()
    one, two = (log_likelihood(x.numpy(), *parts(m)) for m in (em.model, model))
    assert two == pytest.approx(one, abs=1e-3)  # 150 steps of Adam, a rate that falls to 0
