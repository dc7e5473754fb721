"""A critic that classifies: its loss as the paper writes it, which labels it sees, and what it makes of a few."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dgm_models.construct import ConfigError
from dgm_models.gan.semi_supervised import chosen, unsupervised_loss
from dgm_models.method import Method, build, encoded, fit
from dgm_models.protocols import Batch, DataSpec
from tests.laws import cases

IMAGES = DataSpec("image", (1, 4, 4), 5, classes=3)
SMALL = {"network": {"name": "mlp", "width": 16, "depth": 1}, "latent_dim": 3, "feature_dim": 4}


def batch(n: int = 12) -> Batch:
    method = build("gan/semi_supervised", IMAGES, **SMALL)
    found = encoded(method.model, cases.rows(IMAGES, n))
    return replace(found, cond=torch.arange(n) % 3)


# ---- the loss


def test_unsupervised_loss_is_the_paper_s() -> None:
    real, fake = torch.randn(2, 7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z_real, z_fake = real.exp().sum(1), fake.exp().sum(1)
    expected = -(z_real / (z_real + 1)).log() - (1 - z_fake / (z_fake + 1)).log()
    assert torch.allclose(unsupervised_loss(real, fake), expected, rtol=1e-12)  # float64


def test_unsupervised_loss_is_that_of_k_plus_one_classes() -> None:
    real, fake = torch.randn(2, 7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    log_p_real, log_p_fake = (nn.functional.pad(logits, (0, 1)).log_softmax(1) for logits in (real, fake))
    expected = -log_p_real[:, :4].logsumexp(1) - log_p_fake[:, 4]  # the class "sample" has the logit 0
    assert torch.allclose(unsupervised_loss(real, fake), expected, rtol=1e-12)


def test_unsupervised_loss_is_finite_for_any_logits() -> None:
    huge = torch.tensor([[-1e4, -2e4], [1e4, 2e4]], requires_grad=True)
    loss = unsupervised_loss(huge, huge)
    loss.sum().backward()
    assert bool(loss.isfinite().all()) and bool(huge.grad.isfinite().all())


@pytest.mark.parametrize("supervised", [0.0, 1.0, 2.5])
def test_critic_s_loss_weighs_the_labels_that_are_used_by_their_share(supervised: float) -> None:
    method = build("gan/semi_supervised", IMAGES, labelled=0.4, supervised=supervised, **SMALL)
    rows = batch()
    used = chosen(rows.id, 0.4)
    assert 0 < int(used.sum()) < len(rows)
    loss = method.objective.critic_turn(method.model, rows)
    data, samples = method.objective.pair(method.model, rows)
    logits = method.model.critic(data)
    unsupervised = unsupervised_loss(logits, method.model.critic(samples)).sum()
    labels = -logits.log_softmax(1)[torch.arange(12), rows.cond][used].sum() / 0.4
    assert loss.total.item() == pytest.approx((unsupervised + supervised * labels).item(), rel=1e-5)  # float32


def test_critic_does_not_see_the_other_labels() -> None:
    method = build("gan/semi_supervised", IMAGES, labelled=0.4, **SMALL)
    rows = batch()
    used = chosen(rows.id, 0.4)

    def total(cond: Tensor) -> float:
        return method.objective.critic_turn(method.model, replace(rows, cond=cond)).total.item()

    others = torch.where(used, rows.cond, (rows.cond + 1) % 3)
    theirs = torch.where(used, (rows.cond + 1) % 3, rows.cond)
    assert total(others) == total(rows.cond) != total(theirs)


def test_generator_s_loss_is_the_distance_of_the_features_means() -> None:
    method = build("gan/semi_supervised", IMAGES, **SMALL)
    rows = batch()
    body = method.model.critic.body
    data, samples = method.objective.pair(method.model, rows)
    distance = (body(data).mean(0) - body(samples).mean(0)).square().sum()
    loss = method.objective.generator_turn(method.model, rows)
    assert loss.total.item() == pytest.approx(12 * distance.item(), rel=1e-5)  # a sum over the batch
    loss.total.backward()
    got = [p.grad.clone() for p in method.model.generator.parameters()]
    expected = torch.autograd.grad(12 * distance, list(method.model.generator.parameters()))
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_critic_s_input_is_as_noisy_as_asked(noise: float) -> None:
    method = build("gan/semi_supervised", IMAGES, noise=noise, **SMALL)
    rows = batch(2000)
    data, samples = method.objective.pair(method.model, rows)
    added = torch.stack([data - rows.x, samples - method.model.generate(rows)])
    # 2000 x 16 draws: 5 errors of the deviation are 5 noise / sqrt(64000)
    assert added.std((1, 2, 3, 4)).tolist() == pytest.approx([noise, noise], abs=0.02 * noise)
    assert noise == 0 or not torch.allclose(added[0], added[1])


# ---- which labels


def test_labels_that_are_used_depend_on_the_row_alone() -> None:
    ids = torch.arange(20000)
    used = chosen(ids, 0.05)
    # 5 standard errors of sqrt(.05 .95 / 20000)
    assert float(used.float().mean()) == pytest.approx(0.05, abs=0.008)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    assert torch.equal(chosen(ids[order], 0.05), used[order])
    assert bool((chosen(ids, 0.2) | ~used).all())  # more labels contain fewer
    assert bool(chosen(ids, 1.0).all())
    # written down once: another machine, another version, the same examples
    assert chosen(torch.arange(100), 0.05).nonzero()[:, 0].tolist() == FIRST_ROWS


FIRST_ROWS = [13, 15, 24, 41, 42, 58, 64, 89, 92, 93, 97, 99]


# ---- refusals


def test_data_without_classes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"learns from labels; this data has 0 classes: take a dataset with"):
        build("gan/semi_supervised", DataSpec("vector", (2,)), **SMALL)


def test_batch_without_labels_is_refused() -> None:
    data = DataSpec("vector", (2,), classes=3)
    with pytest.raises(ValueError, match="learns from labels; this data has none"):
        fit(build("gan/semi_supervised", data, **SMALL), torch.randn(8, 2), steps=1, batch_size=4)


def test_critic_with_minibatch_statistics_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"for stylegan2 set network\.group to 0"):
        build("gan/semi_supervised", IMAGES, network={"name": "stylegan2", "channels": 2})


def test_condition_is_refused() -> None:
    method = build("gan/semi_supervised", IMAGES, **SMALL)
    with pytest.raises(ValueError, match="cond"):
        method.model.sample(2, torch.Generator(), torch.zeros(2, dtype=torch.int64))


# ---- what it learns

CENTRES = torch.tensor([[-3.0, 0.0], [3.0, 0.0], [0.0, 3.0], [0.0, -3.0]])


def four(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Four Gaussians of deviation 0.5, 3 from the origin: (x [n, 2], class [n])."""
    rng = torch.Generator().manual_seed(seed)
    label = torch.randint(4, (n,), generator=rng)
    return CENTRES[label] + 0.5 * torch.randn(n, 2, generator=rng), label


@pytest.fixture(scope="module")
def trained() -> Method:
    x, label = four(600, seed=0)
    data = DataSpec("vector", (2,), classes=4)
    method = build(
        "gan/semi_supervised", data, network={"name": "mlp", "width": 48, "depth": 2}, latent_dim=4, feature_dim=32,
        labelled=0.03, watch={"gap_steps": 0, "curvature_steps": 0},
    )  # fmt: skip
    optim = {"lr": 1e-3, "betas": [0.5, 0.99], "generator": {"lr": 5e-3}}
    return fit(method, x, cond=label, steps=300, batch_size=64, report_every=100, optim=optim)


def test_a_few_labels_are_enough_for_separable_classes(trained: Method) -> None:
    assert int(chosen(torch.arange(600), 0.03).sum()) < 30
    x, label = four(1000, seed=1)
    features, probabilities = trained.model.features(x)
    assert features.shape == (1000, 32) and probabilities.shape == (1000, 4)
    assert torch.allclose(probabilities.sum(1), torch.ones(1000), atol=1e-5)
    assert float((probabilities.argmax(1) == label).float().mean()) > 0.9  # by chance 0.25


def test_samples_come_near_the_data(trained: Method) -> None:
    samples = trained.model.sample(1000, torch.Generator().manual_seed(0))
    x, _ = four(1000, seed=1)
    assert float((samples.mean(0) - x.mean(0)).norm()) < 0.8  # the centres are 3 from the mean; seeds gave 0.18 to 0.32
    spread = samples.std(0) / x.std(0)
    assert bool((spread > 0.5).all()) and bool((spread < 1.6).all())  # seeds gave 0.81 to 1.24
