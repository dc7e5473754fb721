"""Contract: a composite. A VAE learns to code, a prior learns the codes, and prior -> decoder draws better samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dgm_models.codecs import Standardized
from dgm_models.method import Method, build, encoded, fit, load, save
from dgm_models.objective import Loss, Objective, Turn
from dgm_models.protocols import Batch, DataSpec, Model, capabilities
from dgm_models.sampling import sample
from dgm_models.training.optim import Optim, Optims
from dgm_models.training.source import ArraySource
from dgm_models.training.trainer import Train, Trainer

GLYPHS = (
    ".####...", "##..##..", "##..##..", "##..##..", "##..##..", "##..##..", ".####...", "........",
    "...##...", "..###...", ".####...", "...##...", "...##...", "...##...", ".######.", "........",
    ".#####..", "##...##.", ".....##.", "...###..", "..##....", "##......", "#######.", "........",
)  # fmt: skip
TEMPLATES = torch.tensor([[c == "#" for c in line] for line in GLYPHS]).reshape(3, 1, 8, 8).to(torch.uint8)
DATA = DataSpec("image", (1, 8, 8), 2)
LATENT = 4


def digits(n: int = 600) -> Tensor:
    """Three digits, 5% of their pixels exchanged."""
    rng = torch.Generator().manual_seed(0)
    x = TEMPLATES[torch.arange(n) % 3]
    return x ^ (torch.rand(x.shape, generator=rng) < 0.05).to(torch.uint8)


def distance(x: Tensor) -> float:
    """The mean number of pixels between an image and the nearest digit; 0.05 * 64 = 3.2 for the data."""
    return float((x[:, None] != TEMPLATES[None]).flatten(2).sum(2).min(1).values.float().mean())


class Mixture(Model):
    """A mixture of Gaussians with full covariance, on the codes of another model."""

    def __init__(self, data: DataSpec, components: int) -> None:
        super().__init__(data, Standardized(data))
        (dims,) = data.shape
        self.logits = nn.Parameter(torch.zeros(components))
        self.means = nn.Parameter(torch.zeros(components, dims))
        self.roots = nn.Parameter(torch.eye(dims).repeat(components, 1, 1))

    def log_prob(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        z = torch.einsum("kij,bkj->bki", self.roots, x[:, None] - self.means)
        each = -0.5 * z.square().sum(2) + torch.linalg.slogdet(self.roots)[1] - 0.5 * z.shape[2] * math.log(2 * math.pi)
        return (each + self.logits.log_softmax(0)).logsumexp(1)

    @torch.no_grad()
    def sample(self, n: int, rng: torch.Generator, cond: Tensor | None = None) -> Tensor:
        which = torch.multinomial(self.logits.softmax(0), n, replacement=True, generator=rng)
        z = torch.randn(n, self.means.shape[1], generator=rng)
        return self.means[which] + torch.linalg.solve(self.roots[which], z)


class MaximumLikelihood(Objective):
    def turns(self) -> Sequence[Turn]:
        return (Turn("model", self.loss),)

    def initialize(self, model: Mixture, batch: Batch) -> None:
        model.means.copy_(batch.x[: len(model.means)])

    def loss(self, model: Mixture, batch: Batch) -> Loss:
        return Loss(-model.log_prob(batch.x).sum())


@dataclass
class Composite:
    vae: Method
    codes: Tensor
    prior: Trainer

    def draw(self, latents: Tensor) -> Tensor:
        return self.vae.model.codec.decode(self.vae.model.decode(latents))


@pytest.fixture(scope="module")
def composite() -> Composite:
    params = {"network": {"name": "mlp", "width": 48, "depth": 1}, "latent_dim": LATENT, "beta": 0.1}
    vae = build("vae/beta_vae", DATA, **params)  # a small beta codes well and leaves the prior unmatched
    x = digits()
    fit(vae, x, steps=400, batch_size=100, optim={"lr": 5e-3})
    codes = vae.model.encode(encoded(vae.model, x).x)
    data = DataSpec("vector", (LATENT,), None, location=float(codes.mean()), scale=float(codes.std()))
    torch.manual_seed(0)
    settings = Train(steps=250, batch_size=200, report_every=50)
    source = ArraySource(codes, data)
    prior = Trainer(Mixture(data, 3), MaximumLikelihood(), source, settings, Optims(Optim(lr=0.03)), 0)
    prior.run()
    return Composite(vae, codes, prior)


def from_prior(composite: Composite, n: int = 300) -> Tensor:
    model = composite.prior.model
    return composite.draw(model.codec.decode(model.sample(n, torch.Generator().manual_seed(1))))


def test_composite_reconstructs_the_digits(composite: Composite) -> None:
    assert distance(digits()) == pytest.approx(3.2, abs=0.3)  # 600 images of 64 pixels: a standard error of 0.07
    assert distance(composite.draw(composite.codes)) < 1.5  # the decoder's mode removes most of the noise


def test_composite_prior_learns_the_codes(composite: Composite) -> None:
    losses = [metrics["loss"] for _, metrics in composite.prior.history]
    assert losses[-1] < losses[0] - 0.5  # nats
    assert capabilities(composite.prior.model) == ("samples", "density")


def test_composite_samples_are_digits_and_a_standard_normal_s_are_not(composite: Composite) -> None:
    standard = composite.draw(torch.randn(300, LATENT, generator=torch.Generator().manual_seed(1)))
    pixels = (torch.rand(300, 1, 8, 8, generator=torch.Generator().manual_seed(1)) < digits().float().mean(0)).to(
        torch.uint8
    )
    found = [distance(x) for x in (from_prior(composite), standard, pixels)]
    assert found[0] < 2.0  # nearer than the data, of whose noise the decoder's mode has less
    assert found[0] < 0.6 * found[1] < found[2]  # far beyond the 3% of a mean over 300


def test_composite_samples_all_three_digits_in_their_shares(composite: Composite) -> None:
    nearest = (from_prior(composite)[:, None] != TEMPLATES[None]).flatten(2).sum(2).argmin(1)
    shares = torch.bincount(nearest, minlength=3) / 300
    assert float((shares - 1 / 3).abs().max()) < 0.1  # four standard errors of a share of 300


def test_composite_of_two_registered_methods_survives_its_artifacts(composite: Composite, tmp_path: Path) -> None:
    data = composite.prior.model.data
    prior = build("gan/wgan_gp", data, network={"name": "mlp", "width": 16, "depth": 1}, latent_dim=LATENT)
    fit(prior, composite.codes, steps=3, batch_size=50)

    def draw(prior: Method, vae: Method) -> Tensor:
        return vae.model.codec.decode(vae.model.decode(sample(prior, 20)))

    before = draw(prior, composite.vae)
    folders = [save(method, tmp_path / method.name.split("/")[0]) for method in (prior, composite.vae)]
    assert torch.equal(draw(*(load(folder) for folder in folders)), before)
    assert before.shape == (20, *DATA.shape) and before.dtype == torch.uint8
