"""Likelihoods as numbers to report: means with intervals, bits/dim, the importance-weighted bound."""

from __future__ import annotations

import math

from torch import Tensor

from dgm_models.metrics.estimate import Deleted, Estimate, jackknife


def mean_estimate(values: Tensor) -> Estimate:
    """The mean of one number an example, with a 95% t interval: mean +- t_{n-1} s / sqrt(n).

    Args:
        values: [n], one number an example (nats, bits/dim, a reward), n >= 2; summed over the event beforehand.
    Returns: in the unit of `values`. The examples are the sample: the spread over training seeds is not in it.
    Raises: ValueError when `values` is no vector, has fewer than 2 entries or an entry that is not finite.

    Source: Student 1908; for a mean the jackknife is exactly this interval.

    >>> import torch
    >>> mean_estimate(torch.tensor([1.0, 2.0, 3.0])).value
    2.0
    """
    values = _vector("mean_estimate: values", values)
    if len(values) < 2:
        raise ValueError(f"mean_estimate: values: {len(values)} example(s); an interval needs at least 2")
    total, n = values.sum(), len(values)
    return jackknife(float(total / n), Deleted((total - values) / (n - 1)), correct=False).interval(n)


def bits_per_dim(nats: Tensor, dims: int) -> Tensor:
    """Negative log-likelihood in nats an example -> bits a dimension: nats / (dims log 2).

    Args:
        nats: [n] nll (or minus an elbo) in the space of the stored data: the codec's log|det| is already in it, so
            nothing like log 256 is added here.
        dims: stored values of one example, `DataSpec.dims`.
    Returns: [n] float64 bits/dim; lower is better.
    Raises: ValueError when dims < 1 or a value is not finite (an infinite nll is a model's failure: report it as such).

    >>> import torch
    >>> round(bits_per_dim(torch.tensor([math.log(256.0)]), 1).item(), 6)
    8.0
    """
    if dims < 1:
        raise ValueError(f"bits_per_dim: dims: {dims!r} is below 1; give the dataset's number of values an example")
    return _vector("bits_per_dim: nats", nats) / (dims * math.log(2.0))


def importance_weighted(log_weights: Tensor) -> Tensor:
    """The importance-weighted bound: log (1/k) sum_i w_i = logsumexp_i log w_i - log k.

    Args:
        log_weights: [k, n] nats, log p(x, z_i) - log q(z_i | x) of k draws for each of n examples. -inf is a weight of
            zero, as long as not all of an example's weights are.
    Returns: [n] float64 nats, a lower bound of log p(x) in expectation; higher is better, and k = 1 is the elbo.
    Raises: ValueError when the shape is not [k, n], a weight is nan or +inf, or all weights of an example are zero.

    Source: Burda, Grosse, Salakhutdinov 2016, eq. 8, arXiv:1509.00519.
    """
    if log_weights.ndim != 2 or 0 in log_weights.shape:
        raise ValueError(
            f"importance_weighted: log_weights: shape {tuple(log_weights.shape)}, expected [k, n], not empty"
        )
    log_weights = log_weights.double()
    if not bool((log_weights < math.inf).all()):  # false for nan as well
        raise ValueError(
            "importance_weighted: log_weights: nan or +inf; the posterior or the likelihood has overflowed"
        )
    bound = log_weights.logsumexp(0) - math.log(len(log_weights))
    dead = int((bound == -math.inf).sum())
    if dead:
        raise ValueError(
            f"importance_weighted: log_weights: all {len(log_weights)} weights of {dead} of {len(bound)} examples are"
            " zero; the proposal misses the posterior: use more draws or a wider proposal"
        )
    return bound


def _vector(name: str, values: Tensor) -> Tensor:
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"{name}: shape {tuple(values.shape)}, expected [n] with n > 0: one number an example")
    values = values.detach().double()
    broken = int((~values.isfinite()).sum())
    if broken:
        raise ValueError(f"{name}: {broken} of {len(values)} are not finite; a mean that drops them would be made up")
    return values
