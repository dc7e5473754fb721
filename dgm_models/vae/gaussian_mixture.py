"""The mixture of Gaussians: a latent-variable model whose posterior and likelihood are exact."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from dgm_models.codecs import continuous
from dgm_models.construct import Positive, PositiveFloat, Range
from dgm_models.nn.computed import Computed
from dgm_models.nn.conditioner import check
from dgm_models.nn.maximum_likelihood import MaximumLikelihood
from dgm_models.protocols import Batch, DataSpec, Model
from dgm_models.training import runtime

Covariance = Literal["full", "diagonal"]
LEAST = 1e-12  # weight of a component that explains no example: its logarithm has to be finite


class GaussianMixture(Model):
    """p(x) = sum_k w_k N(x; mean_k, L_k L_k^T), computed in float64.

    Parameters are free real numbers: w = softmax(logits); L_k is lower triangular, with the logarithms of its diagonal
    on the diagonal of `root[k]`. For diagonal covariances `root[k]` is those logarithms alone.

    Args:
        data: real data of any shape; an example is its D values.
        components: how many.
        covariance: "full" or "diagonal".
    """

    def __init__(self, data: DataSpec, components: int, covariance: Covariance) -> None:
        super().__init__(data, continuous(data))
        self.components, self.full = components, covariance == "full"
        dims = data.dims
        self.logits = nn.Parameter(torch.zeros(components))
        self.mean = nn.Parameter(torch.randn(components, dims))
        self.root = nn.Parameter(torch.zeros(components, dims, dims) if self.full else torch.zeros(components, dims))

    def factor(self) -> Tensor:
        """L [K, D, D], or its diagonal [K, D]; float64."""
        root = self.root.double()
        if not self.full:
            return root.exp()
        return root.tril(-1) + torch.diag_embed(root.diagonal(dim1=1, dim2=2).exp())

    def log_joint(self, x: Tensor) -> Tensor:
        """log w_k + log N(x; mean_k, L_k L_k^T) [B, K] nats, float64."""
        away = x.flatten(1).double() - self.mean.double()[:, None]  # [K, B, D]
        factor = self.factor()
        if self.full:
            white = torch.linalg.solve_triangular(factor, away.mT, upper=False).mT
            log_det = factor.diagonal(dim1=1, dim2=2).log().sum(1)
        else:
            white, log_det = away / factor[:, None], factor.log().sum(1)
        log_normal = -0.5 * (white.square().sum(2) + self.data.dims * math.log(2 * math.pi)) - log_det[:, None]
        joint: Tensor = self.logits.double().log_softmax(0)[:, None] + log_normal
        return joint.T

    def log_prob(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """[B] nats, exact, float64."""
        check(self.condition, cond)
        return self.log_joint(x).logsumexp(1)

    @torch.no_grad()
    def sample(self, n: int, rng: torch.Generator, cond: Tensor | None = None) -> Tensor:
        check(self.condition, cond)
        chosen = torch.multinomial(self.logits.softmax(0), n, replacement=True, generator=rng)
        eps = torch.randn(n, self.data.dims, generator=rng, device=rng.device, dtype=torch.float64)
        factor = self.factor()[chosen]
        moved = (factor @ eps[..., None])[..., 0] if self.full else factor * eps
        return (self.mean[chosen] + moved).to(self.mean.dtype).reshape(n, *self.data.shape)


class Gradient(MaximumLikelihood):
    """-log p(x), by its gradient, from the means that `start` gives."""

    def initialize(self, model: GaussianMixture, batch: Batch) -> None:
        start(model, batch)


class Em(Computed):
    """Expectation maximisation: theta' is what one EM step over the global batch makes of theta.

    With `rate` below 1 the expected statistics (weights, first and second moments) are rate times the batch's plus
    (1 - rate) times those that the parameters stand for: stepwise EM, for batches that are not the whole data.

    Source: Dempster, Laird, Rubin 1977; Cappe and Moulines 2009, eq. 10, arXiv:0712.4273. Differs: no eigenvalue of a
    covariance falls below `floor`; the M-step is the maximum under this condition.
    """

    def __init__(self, rate: float, floor: float) -> None:
        super().__init__()
        self.rate, self.floor = rate, floor

    def initialize(self, model: GaussianMixture, batch: Batch) -> None:
        start(model, batch)

    def target(self, model: GaussianMixture, x: Tensor) -> dict[str, Tensor]:
        shares = model.log_joint(x).softmax(1).T  # [K, B]
        away = x.flatten(1).double() - model.mean.double()[:, None]  # [K, B, D]; from the old means, to cancel less
        weighted = shares[..., None] * away
        second = weighted.mT @ away if model.full else (weighted * away).sum(1)
        share, first = shares.sum(1), weighted.sum(1)
        count = share.new_tensor(float(len(x)))
        runtime.current().sum([share, first, second, count])

        weight = (1 - self.rate) * model.logits.double().softmax(0) + self.rate * share / count
        weight = weight.clamp_min(LEAST)
        part = self.rate * share / count / weight  # [K] the batch's part in a component: 0 keeps the old one
        share = share.clamp_min(LEAST)
        shift = first / share[:, None]
        mean = model.mean.double() + part[:, None] * shift
        factor = model.factor()
        if model.full:
            part, share = part[:, None, None], share[:, None, None]
            square = shift[:, :, None] * shift[:, None, :]
            covariance = (1 - part) * factor @ factor.mT + part * second / share - part**2 * square
            values, vectors = torch.linalg.eigh(covariance)
            factor = torch.linalg.cholesky(vectors * values.clamp_min(self.floor)[:, None] @ vectors.mT)
            root = factor.tril(-1) + torch.diag_embed(factor.diagonal(dim1=1, dim2=2).log())
        else:
            part, share = part[:, None], share[:, None]
            variance = (1 - part) * factor.square() + part * second / share - part**2 * shift.square()
            root = 0.5 * variance.clamp_min(self.floor).log()
        return {"logits": weight.log(), "mean": mean, "root": root}


def start(model: GaussianMixture, batch: Batch) -> None:
    """Means at k-means++ seeds of the batch, one variance for all: the mean squared distance from the nearest seed."""
    if len(batch) < model.components:
        raise ValueError(
            f"train.batch_size: {len(batch)} examples cannot seed {model.components} components; use at least that many"
        )
    centres, squares = seeds(batch, model.components, trials=2 + int(math.log(model.components)))
    model.mean.copy_(centres)
    log_scale = 0.5 * float((squares.mean() / model.data.dims).clamp_min(LEAST).log())
    (model.root.diagonal(dim1=1, dim2=2) if model.full else model.root).fill_(log_scale)


def seeds(batch: Batch, k: int, trials: int = 1) -> tuple[Tensor, Tensor]:
    """k examples as centres, each drawn with probability in proportion to the squared distance from those before it.

    Of `trials` draws for a centre the one is kept that leaves the least sum of squared distances.

    Returns: centres [k, D], and every example's squared distance [B] from the nearest one.
    Source: Arthur and Vassilvitskii 2007, SODA, section 2.2, and section 5 for several trials.
    """
    x = batch.x.flatten(1).double()
    squares = torch.full((len(x),), torch.inf, dtype=torch.float64, device=x.device)
    centres = []
    for i in range(k):
        found = []
        for trial in range(trials if i else 1):
            # the least of exponential waiting times with rates r is that of i with probability r_i / sum r
            waiting = -batch.uniform(f"seed/{i}/{trial}", ()).double().log()
            centre = x[(waiting / squares if i else waiting).argmin()]
            nearest = torch.minimum(squares, (x - centre).square().sum(1))
            found.append((float(nearest.sum()), centre, nearest))
        _, centre, squares = min(found, key=lambda one: one[0])
        centres.append(centre)
    return torch.stack(centres), squares


def gaussian_mixture(
    data: DataSpec,
    components: Positive = 8,
    covariance: Covariance = "full",
    fit: Literal["em", "gradient"] = "em",
    rate: Annotated[float, Range(0, 1, "low")] = 1.0,
    floor: PositiveFloat = 1e-6,
) -> tuple[GaussianMixture, Gradient | Em]:
    """A mixture of Gaussians, by expectation maximisation or by gradient.

    Args:
        data: what is modelled.
        components: how many Gaussians.
        covariance: of each of them.
        fit: "em" wants `optim: {name: sgd, lr: 1.0}`, and `train.batch_size` at the dataset's size for classical EM;
            "gradient" takes any optimizer.
        rate: of em, the weight of a batch against what was learned before; 1 forgets it.
        floor: of em, the least variance in any direction, in model space.
    """
    return GaussianMixture(data, components, covariance), Em(rate, floor) if fit == "em" else Gradient()
