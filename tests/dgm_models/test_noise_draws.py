"""Draws by key: their distribution, and that nothing but the key, the stream and the element enters."""

from __future__ import annotations

import math

import pytest
import torch

from dgm_models import noise

KEYS = torch.arange(20_000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_draws_have_the_uniform_moments(dtype: torch.dtype) -> None:
    u = noise.uniform(KEYS, "x", (5,), dtype)
    assert u.dtype == dtype and float(u.min()) > 0 and float(u.max()) < 1
    n = u.numel()
    assert float(u.mean()) == pytest.approx(0.5, abs=5 / math.sqrt(12 * n))  # five standard errors
    assert float(u.var()) == pytest.approx(1 / 12, abs=5 * math.sqrt(1 / 180 / n))
    counts = torch.histc(u.float(), 64, 0, 1)
    assert float(((counts - n / 64) ** 2 / (n / 64)).sum()) < 63 + 5 * math.sqrt(2 * 63)  # chi-squared, five deviations


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normal_draws_have_the_normal_moments(dtype: torch.dtype) -> None:
    z = noise.normal(KEYS, "x", (5,), dtype).double()
    n = z.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert float((z**power).mean()) == pytest.approx(
            moment, abs=5 * math.sqrt(variance / n)
        )  # five standard errors
    correlation = torch.corrcoef(z.T) - torch.eye(5)
    assert float(correlation.abs().max()) < 5 / math.sqrt(len(KEYS))  # columns, keys and both halves of Box-Muller


def test_draws_of_neighbouring_keys_are_uncorrelated() -> None:
    z = noise.normal(KEYS, "x", (1,))[:, 0].double()
    for lag in (1, 2, 64):
        assert abs(float((z[lag:] * z[:-lag]).mean())) < 5 / math.sqrt(len(z))  # five standard errors


def test_draws_depend_on_the_key_and_not_on_its_batch() -> None:
    whole = noise.normal(KEYS[:100], "x", (3, 2))
    assert torch.equal(noise.normal(KEYS[40:41], "x", (3, 2)), whole[40:41])
    permuted = torch.randperm(100)
    assert torch.equal(noise.normal(KEYS[:100][permuted], "x", (3, 2)), whole[permuted])


def test_draws_of_other_streams_and_folds_are_others() -> None:
    one = noise.uniform(KEYS, "a", (1,))[:, 0].double()
    for other in (
        noise.uniform(KEYS, "b", (1,)),
        noise.uniform(noise.fold(KEYS, "seed", 0), "a", (1,)),
        noise.uniform(noise.fold(KEYS, "seed", 1), "a", (1,)),
        noise.uniform(KEYS + 1, "a", (1,)),
    ):
        correlation = float(torch.corrcoef(torch.stack([one, other[:, 0].double()]))[0, 1])
        assert abs(correlation) < 5 / math.sqrt(len(KEYS))  # five standard errors


def test_fold_keeps_keys_apart() -> None:
    keys = torch.cat([noise.fold(KEYS, "seed", 0, "train"), noise.fold(KEYS, "seed", 1, "train"), KEYS])
    assert len(keys.unique()) == 3 * len(KEYS)


def test_digest_tells_paths_apart() -> None:
    paths = [("a", 1), ("a", "1"), ("a/1",), ("a", 1, 1), ("a", 11), (1, "a"), ()]
    assert len({noise.digest(*path) for path in paths}) == len(paths)
    assert all(-(2**63) <= noise.digest(*path) < 2**63 for path in paths)


def test_draws_are_pinned() -> None:
    """A change of these numbers changes every training: it is a new version of the library."""
    key = torch.tensor([0, 1, -1])
    assert noise.fold(key, "seed", 0).tolist() == [-2999277814716665896, 3654621269462693653, 5646873480982247474]
    uniform = noise.uniform(key, "x", (1,), torch.float64)[:, 0].tolist()
    assert uniform == [0.9746201344114008, 0.6697429835200542, 0.8116319175986494]  # integer arithmetic and one product
    normal = noise.normal(key, "x", (1,), torch.float64)[:, 0].tolist()
    expected = [-0.09666247103309511, 0.8407257635045401, -0.6387251782836038]
    assert normal == pytest.approx(expected, abs=1e-14)  # log, sqrt and cos may differ in the last bit between machines
