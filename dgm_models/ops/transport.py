"""Optimal transport between two sets of equal size: the pairing of least total cost."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


@torch.library.custom_op("dgm_models::assignment", mutates_args=())
def assignment(cost: Tensor) -> Tensor:
    """The permutation j [n] int64 that minimises sum_i cost[i, j[i]]; exact, O(n^3), on the CPU.

    Shortest augmenting paths: every row is joined to a free column along the path of least reduced cost, which keeps
    the dual variables feasible. Rows that can take the cheapest column of theirs at once need no path.

    An operator of torch's own, so that a plan can run it without numbers and `torch.compile` passes it over.

    Source: Jonker and Volgenant 1987. Differs: of their initialisation, column and row reduction alone.

    Args:
        cost: [n, n], finite.
    """
    costs = cost.detach().double().cpu().numpy()
    n = len(costs)
    v = costs.min(
        0
    )  # reduced cost: costs - u[:, None] - v, at least 0 everywhere and 0 where rows and columns are joined
    u = (costs - v).min(1)
    row_of, column_of = np.full(n, -1), np.full(n, -1)
    for row, column in enumerate((costs - v).argmin(1)):
        if row_of[column] < 0:
            row_of[column], column_of[row] = row, column
    for free in np.flatnonzero(column_of < 0):
        length = costs[free] - u[free] - v  # of the shortest path to every column
        before = np.full(n, free)  # the row in front of the column on it
        open_length = length.copy()  # infinite once the path is settled
        reached = []
        while True:
            column = int(open_length.argmin())
            nearest = open_length[column]
            open_length[column] = np.inf
            row = row_of[column]
            if row < 0:
                break
            reached.append(column)
            through = nearest + costs[row] - u[row] - v
            shorter = through < open_length
            shorter &= open_length < np.inf
            open_length[shorter] = length[shorter] = through[shorter]
            before[shorter] = row
        u[free] += nearest
        u[row_of[reached]] += nearest - length[reached]
        v[reached] -= nearest - length[reached]
        while True:
            row = before[column]
            row_of[column] = row
            column, column_of[row] = column_of[row], column
            if row == free:
                break
    return torch.from_numpy(column_of.astype(np.int64)).to(cost.device)


@assignment.register_fake
def _(cost: Tensor) -> Tensor:
    return cost.new_empty(len(cost), dtype=torch.int64)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j|^2 [n, m] of x [n, d] and y [m, d], in float64."""
    x, y = x.double(), y.double()
    return x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
