"""The shell of adversarial models: a generator and a critic, two players with disjoint parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dgm_models.codecs import continuous
from dgm_models.conditions import Condition
from dgm_models.construct import Fraction, NonNegative, NonNegativeFloat, Positive
from dgm_models.nn.conditioner import Conditioner
from dgm_models.nn.networks import Network
from dgm_models.nn.tricks import MinibatchDiscrimination, MinibatchStd, VirtualBatch, spectral
from dgm_models.protocols import Batch, DataSpec, Model


@dataclass(frozen=True)
class Tricks:
    """Parts that go with any adversarial method, as a params section; the default is none of them.

    Args:
        feature_matching: weight of |E f(x) - E f(G(z))|^2 in the generator's loss, f the critic's hidden layer.
        adversarial: weight of the generator's own loss; 0 leaves feature matching alone.
        smooth_real: what a critic that classifies is to answer to data; 0.9 is one-sided label smoothing.
        smooth_fake: what it is to answer to samples; above 0 the best critic no longer ends where the data end.
        historical_averaging: weight of every player's squared distance to the mean of its past parameters.
        r1: weight of |grad D(x)|^2 / 2 at the data.
        r1_every: steps between critic updates by R1, each with r1_every times the weight.
        spectral_norm: the critic's matrices are divided by their largest singular value.
        virtual_batch_norm: rows of a fixed reference batch by which both players normalise, 0 for none.
        minibatch_discrimination: kernels by which the critic compares an example with its batch, 0 for none.
        kernel_dim: of each of these kernels.
        minibatch_std: the critic is told the batch's standard deviation.
        feature_dim: of the critic's hidden layer that feature matching, minibatch parts and projection work on.

    Source: Salimans et al. 2016, sections 3.1 to 3.5, arXiv:1606.03498; Mescheder et al. 2018, eq. 9,
    arXiv:1801.04406; Karras et al. 2020, section 3.1 (lazy regularisation), arXiv:1912.04958; Miyato et al. 2018,
    arXiv:1802.05957. Differs: feature matching is added to the generator's loss by weight, or replaces it.
    """

    feature_matching: NonNegativeFloat = 0.0
    adversarial: NonNegativeFloat = 1.0
    smooth_real: Fraction = 1.0
    smooth_fake: Fraction = 0.0
    historical_averaging: NonNegativeFloat = 0.0
    r1: NonNegativeFloat = 0.0
    r1_every: Positive = 16
    spectral_norm: bool = False
    virtual_batch_norm: NonNegative = 0
    minibatch_discrimination: NonNegative = 0
    kernel_dim: Positive = 5
    minibatch_std: bool = False
    feature_dim: Positive = 128

    def __post_init__(self) -> None:
        if not self.adversarial and not self.feature_matching:
            raise ValueError("adversarial: 0 leaves the generator without a loss; set feature_matching above 0")
        if self.smooth_fake >= self.smooth_real:
            raise ValueError(
                f"smooth_fake: {self.smooth_fake:g} is not below smooth_real, {self.smooth_real:g}: "
                "the critic would be taught to take samples for data"
            )

    @property
    def smooth(self) -> bool:
        return (self.smooth_real, self.smooth_fake) != (1.0, 0.0)

    @property
    def layered(self) -> bool:
        """Whether a hidden layer of the critic is needed apart from its last one."""
        return bool(self.feature_matching or self.minibatch_discrimination or self.minibatch_std)


class Generator(nn.Module):
    """z [B, latent_dim], cond -> x [B, *event] in model space."""

    def __init__(
        self, data: DataSpec, network: Network, latent_dim: int, cond: Condition | None, tricks: Tricks
    ) -> None:
        super().__init__()
        self.conditioner = Conditioner(cond, data, network)
        in_dim = latent_dim + self.conditioner.vector_dim
        self.body = network.up(in_dim, data.shape)
        if tricks.virtual_batch_norm:
            self.body = VirtualBatch(self.body, (in_dim,), tricks.virtual_batch_norm)
        # model space is (-1, 1) for whole levels, unbounded for real data
        self.bound = nn.Identity() if data.levels is None else nn.Tanh()

    def forward(self, z: Tensor, cond: Tensor | None = None) -> Tensor:
        x: Tensor = self.bound(self.body(self.conditioner.with_vector(z, cond)))
        return x

    def refer(self, z: Tensor, cond: Tensor | None) -> None:
        """Gives virtual batch normalisation its reference batch."""
        assert isinstance(self.body, VirtualBatch)
        self.body.fill(self.conditioner.with_vector(z, cond))


class Critic(nn.Module):
    """x [B, *event] in model space, cond -> one number an example [B]: judge(features(x)).

    Args:
        data, network: what is judged, and by what.
        cond: what samples are asked for; joined to x, or with `projection` multiplied with the features.
        projection: D(x, y) = judge(f(x)) + <V y, f(x)>.
        tricks: those that change the network.

    Without projection and tricks the network itself ends in the number, and has no separate hidden layer.
    Source (projection): Miyato and Koyama 2018, eq. 3, arXiv:1802.05637.
    """

    def __init__(
        self, data: DataSpec, network: Network, cond: Condition | None, projection: bool, tricks: Tricks
    ) -> None:
        super().__init__()
        self.joined = not projection
        self.conditioner = Conditioner(cond, data, network if projection else None)
        shape = self.conditioner.joined(data.shape) if self.joined else data.shape
        self.projection: nn.Linear | None = None
        split = projection or tricks.layered
        dim = tricks.feature_dim if split else 1
        self.body = network.down(shape, dim)
        if tricks.virtual_batch_norm:
            self.body = VirtualBatch(self.body, shape, tricks.virtual_batch_norm)
        self.activation = nn.LeakyReLU(0.2) if split else nn.Identity()
        parts: list[nn.Module] = []
        if split:
            if projection:
                self.projection = nn.Linear(self.conditioner.vector_dim, dim, bias=False)
            if tricks.minibatch_discrimination:
                parts.append(MinibatchDiscrimination(dim, tricks.minibatch_discrimination, tricks.kernel_dim))
                dim += tricks.minibatch_discrimination
            if tricks.minibatch_std:
                parts.append(MinibatchStd())
                dim += 1
            parts.append(nn.Linear(dim, 1))
        self.head = nn.Sequential(*parts, nn.Flatten(0))
        if tricks.spectral_norm:
            spectral(self)

    def features(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """[B, feature_dim]; [B, 1], the number itself, where the critic has no separate hidden layer."""
        found: Tensor = self.activation(self.body(self._joined(x, cond)))
        return found

    def _joined(self, x: Tensor, cond: Tensor | None) -> Tensor:
        return self.conditioner.join(x, cond) if self.joined else x

    def judge(self, features: Tensor, cond: Tensor | None = None) -> Tensor:
        """[B] numbers of features that `features` gave under the same condition."""
        number: Tensor = self.head(features)
        if self.projection is not None:
            number = number + (self.projection(self.conditioner.vector(cond)) * features).sum(1)
        return number

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.judge(self.features(x, cond), cond)

    def refer(self, x: Tensor, cond: Tensor | None) -> None:
        """Gives virtual batch normalisation its reference batch."""
        assert isinstance(self.body, VirtualBatch)
        self.body.fill(self._joined(x, cond))


class Adversarial(Model):
    """x = generator(z, cond), z ~ N(0, I), and a critic that sees x.

    Args:
        data: what is modelled.
        latent_dim: the dimension of z.
        generator: z [B, latent_dim], cond -> x [B, *event] in model space.
        critic: whatever the objective needs of it.
        cond: what a sample is asked for, None for nothing.
    """

    def __init__(
        self, data: DataSpec, latent_dim: int, generator: nn.Module, critic: nn.Module, cond: Condition | None = None
    ) -> None:
        super().__init__(data, continuous(data))
        self.condition = cond
        self.latent_dim = latent_dim
        self.generator = generator
        self.critic = critic

    def players(self) -> dict[str, nn.Module]:
        return {"critic": self.critic, "generator": self.generator}

    def generate(self, batch: Batch) -> Tensor:
        """As many samples as the batch has rows [B, *event], by the rows' keys and conditions, with gradient."""
        fake: Tensor = self.generator(batch.normal("latent", (self.latent_dim,)), self.given(batch))
        return fake

    @torch.no_grad()
    def sample(self, n: int, rng: torch.Generator, cond: Tensor | None = None) -> Tensor:
        fake: Tensor = self.generator(torch.randn(n, self.latent_dim, generator=rng, device=rng.device), cond)
        return fake


class GeneratorCritic(Adversarial):
    """An adversarial pair whose critic gives a number for x and cond: a logit or a Wasserstein potential.

    Args:
        data: what is modelled.
        network: gives generator and critic.
        latent_dim: the dimension of z.
        cond: what a sample is asked for, None for nothing.
        projection: the critic reads the condition by an inner product with its features, not joined to x.
        tricks: those that change the networks.
    """

    generator: Generator
    critic: Critic

    def __init__(
        self,
        data: DataSpec,
        network: Network,
        latent_dim: int,
        cond: Condition | None = None,
        projection: bool = False,
        tricks: Tricks = Tricks(),
    ) -> None:
        if projection and cond is None:
            raise ValueError("projection: needs a condition; set cond, such as {name: label}")
        generator = Generator(data, network, latent_dim, cond, tricks)
        super().__init__(data, latent_dim, generator, Critic(data, network, cond, projection, tricks), cond)

    def refer(self, batch: Batch) -> None:
        """Gives virtual batch normalisation its reference batches: latents, and data."""
        self.generator.refer(batch.normal("latent", (self.latent_dim,)), self.given(batch))
        self.critic.refer(batch.x, self.given(batch))
