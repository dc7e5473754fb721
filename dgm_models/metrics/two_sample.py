"""The classifier two-sample test: can a classifier tell samples from data?"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dgm_models.metrics.estimate import Estimate, Spread, checked

MOST = 5000  # rows of each sample that are used
_BLOCK = 2048


def classifier_two_sample(real: Tensor, fake: Tensor) -> Estimate:
    """Held-out accuracy of a nearest-neighbour classifier of data against samples, with a 95% Wilson interval.

    Equal numbers of both, at most `MOST` of each and chosen by a fixed seed, are halved: the classifier takes the
    majority label of the k nearest rows of one half, k the odd number at or below the square root of its size, and is
    judged on the other half. There rows are independent of the classifier, so the interval is that of a share; with
    the halves exchanged as well, neighbours of each other would count twice.

    Args:
        real: [n, d] features of data.
        fake: [m, d] features of samples.
    Returns: accuracy in [0, 1], n the rows that are judged; 0.5 is best, 1 is worst. An interval that holds 0.5: this
        classifier finds no difference in so many rows. The accuracy for other distributions grows with n: compare
        values of one n.
    Raises: ValueError when rows are fewer than 20, not finite, or of unequal width, or all reals are equal.

    Source: Lopez-Paz and Oquab 2017, sections 2 and 3, arXiv:1610.06545 (C2ST-KNN). Differs: k is odd; a Wilson
    interval in place of a p-value.
    """
    real = checked("classifier_two_sample: real", real)
    fake = checked("classifier_two_sample: fake", fake, varied=False)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(
            f"classifier_two_sample: {fake.shape[1]} fake features, {real.shape[1]} real; use one extractor"
        )
    half = min(len(real), len(fake), MOST) // 2
    rng = torch.Generator().manual_seed(0)
    learn, judge = [], []
    for rows in (real, fake):
        chosen = rows[torch.randperm(len(rows), generator=rng)[: 2 * half].to(rows.device)]
        learn.append(chosen[:half])
        judge.append(chosen[half:])
    k = math.isqrt(2 * half)
    k -= 1 - k % 2
    train = torch.cat(learn)
    right = 0
    for label, rows in enumerate(judge):
        for part in torch.split(rows, _BLOCK):
            nearest = torch.cdist(part, train).topk(k, dim=1, largest=False).indices
            says_fake = (nearest >= half).sum(1) > k // 2
            right += int((says_fake == bool(label)).sum())
    share, judged = right / (2 * half), 2 * half
    return Spread(share, share * (1 - share) / judged, math.inf).share(judged, judged)
