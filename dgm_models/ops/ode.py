"""Ordinary differential equations dy/ds = f(s, y), as pure functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Dormand and Prince's pair: places of the stages, their weights, and the difference of the two solutions' weights
_PLACES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERRORS = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
_SMALLEST = 1e-9  # of the interval: the step at which rounding, not the step, is what the estimated error shows


class Solution(NamedTuple):
    """What a solver found.

    Attributes:
        y: [B, *state] at the end of the interval.
        evaluations: calls of f.
    """

    y: Tensor
    evaluations: int


def rk45(
    f: Callable[[float, Tensor], Tensor], y: Tensor, start: float, stop: float, tolerance: float = 1e-5
) -> Solution:
    """y at `stop` from y at `start`: steps of order 5, each as long as the estimated error of order 4 allows.

    One step is taken for the whole batch. It is accepted when, for every example, the root mean square over its values
    of error / (tolerance (1 + |y|)) is at most 1. The last stage is the first of the next step, so a step costs 6
    calls, and the first one 7.

    Args:
        f: (s, y [B, *state]) -> dy/ds.
        y: [B, *state]; float64 unless the tolerance is coarse.
        start, stop: the interval, in either direction.
        tolerance: of a step, relative and absolute.
    Raises: ValueError when no step is short enough, which says that f is not smooth or its rounding is above the
        tolerance.

    Source: Dormand and Prince 1980; Hairer, Norsett, Wanner 1993, II.4 and II.5, with a first step of 1/50.
    """
    s, h, length = start, (stop - start) / 50, abs(stop - start)
    slope, evaluations = f(s, y), 1
    while s != stop:
        last = abs(stop - s) <= abs(h) * (1 + 1e-6)
        h = stop - s if last else h
        slopes = [slope]
        for place, weights in zip(_PLACES[1:], _STAGES[1:], strict=True):
            found = y + h * _sum(weights, slopes)
            slopes.append(f(s + place * h, found))
        evaluations += 6
        error = h * _sum(_ERRORS, slopes) / (tolerance * (1 + torch.maximum(y.abs(), found.abs())))
        size = float(error.square().flatten(1).mean(1).sqrt().max())
        if size <= 1:
            s, y, slope = stop if last else s + h, found, slopes[-1]
        elif not abs(h) > _SMALLEST * length:
            raise ValueError(f"tolerance: {tolerance:g} is met by no step at {s:g}; give a larger one")
        h *= min(5.0, max(0.2, 0.9 * max(size, 1e-10) ** -0.2))  # a size that is no number shortens the step
    return Solution(y, evaluations)


def _sum(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    total = weights[0] * slopes[0]
    for weight, slope in zip(weights[1:], slopes[1:], strict=True):
        if weight:
            total = total + weight * slope
    return total
