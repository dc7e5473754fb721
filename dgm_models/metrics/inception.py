"""The Inception Score: how sure a classifier is of each sample, and how unsure it is of their mixture."""

from __future__ import annotations

import torch
from torch import Tensor

from dgm_models.metrics.estimate import Deleted, Estimate, checked, jackknife


def inception_score(probabilities: Tensor, rows_per_class: float = 5.0) -> Estimate:
    """exp(mean_i KL(p_i || mean_j p_j)) = exp(H(mean p) - mean H(p)), with a 95% jackknife interval.

    The plain score of n samples is too low (the entropy of a mixture seen through n rows is), by a factor of about
    1 - (classes - 1) / 2n at worst; the jackknife removes that to first order. It sees neither memorised data nor what
    the classifier does not.

    Args:
        probabilities: [n, classes], rows that sum to one (softmax, not logits).
        rows_per_class: fewest rows for each class.
    Returns: between 1 and the number of classes; higher is better.
    Raises: ValueError when rows are no distributions, fewer than rows_per_class classes, not finite, or all equal.

    Source: Salimans et al. 2016, section 4, arXiv:1606.03498. Differs: one score of all rows in place of the mean over
    10 splits, which multiplies the bias by 10 and gives the spread of the splits rather than of the score.
    """
    name = "inception_score: probabilities"
    rows = checked(name, probabilities)
    n, classes = rows.shape
    if classes < 2:
        raise ValueError(f"{name}: {classes} class; the score needs a classifier of at least 2")
    if n < rows_per_class * classes:
        raise ValueError(
            f"{name}: {n} rows for {classes} classes; at least {rows_per_class * classes:g} are needed"
            f" ({rows_per_class:g} a class): draw more samples"
        )
    if float(rows.min()) < 0 or float((rows.sum(1) - 1).abs().max()) > 1e-3:
        raise ValueError(f"{name}: rows must be >= 0 and sum to 1; give softmax(logits), not logits")
    rows = rows / rows.sum(1, keepdim=True)  # float32 softmax is off by 1e-7
    total, negentropy = rows.sum(0), torch.special.entr(rows).sum(1).neg()

    def score(mixture: Tensor, certainty: Tensor) -> Tensor:
        entropy: Tensor = torch.special.entr(mixture).sum(-1)
        return (entropy + certainty).exp()

    whole = score(total / n, negentropy.mean())
    left_out = score((total - rows).clamp_min(0) / (n - 1), (negentropy.sum() - negentropy) / (n - 1))
    found = jackknife(float(whole), Deleted(left_out)).interval(n)
    value, low, high = (min(max(1.0, each), float(classes)) for each in (found.value, found.low, found.high))
    return Estimate(value, low, high, n)
