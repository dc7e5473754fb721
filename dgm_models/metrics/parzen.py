"""The Parzen-window log-likelihood of held-out data under samples: a sample metric, not a model's likelihood."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dgm_models.metrics.estimate import Estimate, checked
from dgm_models.metrics.likelihood import mean_estimate

_ENTRIES = 2**24  # distances held at once: 128 MB in float64
WIDTHS = tuple(10 ** (-1 + step / 10) for step in range(11))  # of the kernel, for values in [0, 1]


@dataclass(frozen=True)
class Parzen:
    """Attributes: test: mean log density of the test rows, nats, higher is better; width: of the kernel."""

    test: Estimate
    width: float


def parzen(samples: Tensor, valid: Tensor, test: Tensor, widths: Sequence[float] = WIDTHS) -> Parzen:
    """log p(x) = log 1/n sum_i N(x; sample_i, width^2 I), the width chosen on valid rows.

    Theis et al. 2016, arXiv:1511.01844, section 3.3: it does not rank models as their likelihood does, and more samples
    give more; it is here to be compared with tables of its time, at their number of samples.

    Args:
        samples: [n, D] of a model; values are those that the published figures use, often [0, 1].
        valid, test: [m, D] of the data.
        widths: candidates for the width.
    Returns: with a 95% t interval over test rows; neither samples nor training seeds are in it.
    Raises: ValueError when rows are too few, not finite or of unequal width, or a width is not above 0; when the best
        width is the first or the last one, since a better one lies beyond.

    Source: Breuleux et al. 2009; Goodfellow et al. 2014, section 5, arXiv:1406.2661.
    """
    samples = checked("parzen: samples", samples)
    valid, test = checked("parzen: valid", valid), checked("parzen: test", test)
    if not samples.shape[1] == valid.shape[1] == test.shape[1]:
        raise ValueError(
            f"parzen: samples have {samples.shape[1]} values, valid {valid.shape[1]}, test {test.shape[1]}; give all "
            "in the same coordinates"
        )
    widths = sorted(widths)
    if len(widths) < 3 or widths[0] <= 0:
        raise ValueError(f"parzen: widths: {list(widths)}; give at least three, all above 0")
    means = [float(values.mean()) for values in _log_densities(samples, valid, widths)]
    best = max(range(len(widths)), key=means.__getitem__)
    if best in (0, len(widths) - 1):
        raise ValueError(
            f"parzen: widths: {widths[best]:g}, an end of [{widths[0]:g}, {widths[-1]:g}], is the best on valid; "
            "give candidates beyond it"
        )
    (values,) = _log_densities(samples, test, [widths[best]])
    return Parzen(mean_estimate(values), widths[best])


def _log_densities(samples: Tensor, rows: Tensor, widths: Sequence[float]) -> list[Tensor]:
    """For each width the log density [m] of the rows, in nats."""
    n, dims = samples.shape
    found: list[list[Tensor]] = [[] for _ in widths]
    for part in rows.split(max(1, _ENTRIES // n)):  # type: ignore[no-untyped-call]
        square = torch.cdist(part, samples, compute_mode="use_mm_for_euclid_dist").square()
        for width, values in zip(widths, found, strict=True):
            constant = math.log(n) + dims * (math.log(width) + 0.5 * math.log(2 * math.pi))
            values.append((square / (-2 * width**2)).logsumexp(1) - constant)
    return [torch.cat(values) for values in found]
