"""A GAN whose critic is a classifier that learns from a few labels, and from all examples that they are data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_models.construct import NonNegativeFloat, Positive, Range
from dgm_models.nn.adversarial import Adversarial, Generator, Tricks
from dgm_models.nn.game import between_means
from dgm_models.nn.networks import Mlp, Network
from dgm_models.nn.tricks import MinibatchDiscrimination, MinibatchStd
from dgm_models.noise import fold, uniform
from dgm_models.objective import Loss, Objective, Turn
from dgm_models.ops.games import Watch
from dgm_models.ops.games import watch as watch_game
from dgm_models.protocols import Batch, DataSpec


def chosen(ids: Tensor, share: float) -> Tensor:
    """[B] bool: whether the label of the example with this row number [B] is used; about `share` of all examples.

    A hash of the row number: the same examples on any machine, in any order.
    """
    return uniform(fold(ids, "labelled"), "share", ()) < share


def unsupervised_loss(real: Tensor, fake: Tensor) -> Tensor:
    """-log D(x) - log(1 - D(G(z))), D = Z / (Z + 1), Z = sum_k exp(logit_k), from logits [B, K]: [B] nats."""
    return F.softplus(-real.logsumexp(1)) + F.softplus(fake.logsumexp(1))


class Classifier(nn.Module):
    """x [B, *event] in model space -> features [B, feature_dim] -> class logits [B, classes]."""

    def __init__(self, data: DataSpec, network: Network, feature_dim: int) -> None:
        super().__init__()
        self.body = nn.Sequential(network.down(data.shape, feature_dim), nn.LeakyReLU(0.2))
        if any(isinstance(part, (MinibatchStd, MinibatchDiscrimination)) for part in self.body.modules()):
            raise ValueError(
                "network: minibatch statistics in a critic that classifies would make a class depend on the other "
                "examples; for stylegan2 set network.group to 0"
            )
        self.head = nn.Linear(feature_dim, data.classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x))
        return logits


class SemiSupervisedModel(Adversarial):
    """An adversarial pair whose critic gives K logits for x; their softmax is p(class | x) for data."""

    critic: Classifier

    def __init__(self, data: DataSpec, network: Network, latent_dim: int, feature_dim: int) -> None:
        generator = Generator(data, network, latent_dim, None, Tricks())
        super().__init__(data, latent_dim, generator, Classifier(data, network, feature_dim))

    @torch.no_grad()
    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """([B, feature_dim], [B, classes]) of model-space x; the probabilities are given that x is data."""
        found = self.critic.body(x)
        return found, self.critic.head(found).softmax(1)


class SemiSupervised(Objective):
    """Critic: -log D(x) - log(1 - D(G(z))), and -log p(label | x) where the label is used.

    Generator: |E f(x) - E f(G(z))|^2, f the critic's features. The mean of the labelled examples' cross-entropy has
    the weight `supervised`, however few they are: a labelled example counts supervised / labelled times.
    Reported as means over all examples: `supervised` (so weighted), `unsupervised`, `accuracy` (data against samples).
    Source: Salimans et al. 2016, sections 3.1 and 5, arXiv:1606.03498. Differs: the labelled examples come as they
    fall into a batch, not as a batch of their own; they count among the data of the unsupervised loss; the critic's
    input is noisy in training, where the paper's code has noise in every layer, and no weight normalisation.
    """

    additive = False  # the distance of two means over the batch

    def __init__(self, labelled: float, supervised: float, noise: float, watch: Watch) -> None:
        super().__init__()
        self.labelled, self.supervised, self.noise, self.watching = labelled, supervised, noise, watch

    def turns(self) -> Sequence[Turn]:
        return (Turn("critic", self.critic_turn), Turn("generator", self.generator_turn))

    def pair(self, model: SemiSupervisedModel, batch: Batch) -> tuple[Tensor, Tensor]:
        """Data and samples as the critic gets them in training, each [B, *event]."""
        x = batch.x + self.noise * batch.normal("noise of data", model.data.shape)
        return x, model.generate(batch) + self.noise * batch.normal("noise of samples", model.data.shape)

    def critic_turn(self, model: SemiSupervisedModel, batch: Batch) -> Loss:
        if batch.cond is None:
            raise ValueError("gan/semi_supervised learns from labels; this data has none: take a dataset with classes")
        data, samples = self.pair(model, batch)
        real, fake = model.critic(data), model.critic(samples.detach())
        unsupervised = unsupervised_loss(real, fake).sum()
        used = chosen(batch.id, self.labelled)
        cross_entropy = F.cross_entropy(real, batch.cond.long(), reduction="none")
        supervised = torch.where(used, cross_entropy, 0.0).sum() / self.labelled
        right = ((real.logsumexp(1) > 0).sum() + (fake.logsumexp(1) < 0).sum()) / 2
        return Loss(
            unsupervised + self.supervised * supervised,
            {"unsupervised": unsupervised, "supervised": supervised, "accuracy": right},
        )

    def generator_turn(self, model: SemiSupervisedModel, batch: Batch) -> Loss:
        data, samples = self.pair(model, batch)
        with torch.no_grad():
            wanted = model.critic.body(data)
        return Loss(between_means(model.critic.body(samples), wanted))

    def watch(self, model: SemiSupervisedModel, batch: Batch, last: bool) -> Mapping[str, Tensor]:
        return watch_game(model, self, batch, last, self.watching)


def semi_supervised(
    data: DataSpec,
    network: Network = Mlp(),
    latent_dim: Positive = 32,
    feature_dim: Positive = 128,
    labelled: Annotated[float, Range(0, 1, "low")] = 0.05,
    supervised: NonNegativeFloat = 1.0,
    noise: NonNegativeFloat = 0.5,
    watch: Watch = Watch(),
) -> tuple[SemiSupervisedModel, SemiSupervised]:
    """A GAN that classifies.

    Args:
        data: must have classes.
        network: gives generator and critic.
        latent_dim: the dimension of z.
        feature_dim: of the critic's hidden layer whose mean the generator matches.
        labelled: share of the training examples whose label is used.
        supervised: weight of the cross-entropy.
        noise: standard deviation of the noise on the critic's input in training, in model space.
        watch: what is measured of the game at reports.
    Raises: ValueError for data without classes.
    """
    if data.classes < 2:
        raise ValueError(
            f"gan/semi_supervised learns from labels; this data has {data.classes} classes: take a dataset with "
            "classes, or gan/non_saturating"
        )
    model = SemiSupervisedModel(data, network, latent_dim, feature_dim)
    return model, SemiSupervised(labelled, supervised, noise, watch)
