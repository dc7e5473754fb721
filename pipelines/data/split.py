"""Which row belongs to which split: a function of the seed and the row's number."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from dgm_models import noise
from pipelines.data.raw import SPLITS, Array


def split_rows(
    name: str,
    rows: int,
    fixed: Mapping[str, tuple[int, int]] | None,
    split: tuple[float, ...],
    seed: int,
    groups: Array | None = None,
) -> dict[str, Array]:
    """Disjoint row numbers [n] int64 a split, each in an order drawn from the seed, so that a prefix is a fair sample.

    Args:
        name: the dataset, for messages.
        rows: how many there are.
        fixed: what the source gives to a split; see `Raw.splits`.
        split: (train, valid, test) fractions, for what the source leaves open: of all rows, or of the source's train
            when only valid is missing; valid is then its share valid / (train + valid).
        seed: another seed is another order and, where the source leaves it open, other splits.
        groups: [rows], see `Raw.groups`: the fractions are then of the groups.
    Raises: ValueError for an empty split.
    """
    order = _shuffled(rows, seed)
    fractions = dict(zip(SPLITS, split, strict=True))
    what = f"{rows} rows"
    if groups is not None:
        assert fixed is None
        numbers = np.unique(groups)
        parts = _cut(numbers[_shuffled(len(numbers), seed)], fractions)
        found = {key: order[np.isin(groups[order], part)] for key, part in parts.items()}
        what += f" in {len(numbers)} groups that are not divided"
    elif fixed is None:
        found = _cut(order, fractions)
    else:
        found = {key: order[(order >= start) & (order < stop)] for key, (start, stop) in fixed.items()}
        if "valid" not in fixed:
            train, valid = split[0] / (split[0] + split[1]), split[1] / (split[0] + split[1])
            found |= _cut(found["train"], {"train": train, "valid": valid})
    for key in SPLITS:
        if not len(found[key]):
            raise ValueError(f"{name}: split {tuple(split)} of {what} leaves {key} empty; expected at least a row")
    return {key: found[key] for key in SPLITS}


def _shuffled(rows: int, seed: int) -> Array:
    """A permutation that is the same with every version of numpy and torch: the order of hashes."""
    keys: Array = noise.fold(torch.arange(rows), "split", seed).numpy()
    return np.argsort(keys, kind="stable")


def _cut(order: Array, fractions: Mapping[str, float]) -> dict[str, Array]:
    """Consecutive pieces; train takes what rounding leaves."""
    counts = {key: round(len(order) * fraction) for key, fraction in fractions.items()}
    counts["train"] += len(order) - sum(counts.values())
    ends = np.cumsum(list(counts.values()))
    return dict(zip(counts, np.split(order, ends[:-1]), strict=True))
