"""The classifier two-sample test: calibrated on equal distributions, powerful on others."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dgm_models.metrics import two_sample
from dgm_models.metrics.two_sample import classifier_two_sample


def normal(n: int, d: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    x[:, 0] += shift
    return x


def best(shift: float) -> float:
    """The Bayes classifier's accuracy between unit Gaussians that far apart."""
    return 0.5 * (1 + math.erf(shift / 2 / math.sqrt(2)))


@pytest.mark.parametrize("d", [1, 8])
def test_two_sample_interval_holds_one_half_for_equal_distributions(d: int) -> None:
    held, values = 0, []
    for seed in range(400):
        found = classifier_two_sample(normal(200, d, 2 * seed), normal(200, d, 2 * seed + 1))
        held += found.low <= 0.5 <= found.high
        values.append(found.value)
    # 95% but for the steps of a count: 400 repeats have a standard error of 1.1%
    assert 0.92 <= held / 400 <= 0.985
    assert sum(values) / 400 == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(200 * 400))


def test_two_sample_spread_is_that_of_independent_rows() -> None:
    values = torch.tensor([classifier_two_sample(normal(200, 2, 2 * s), normal(200, 2, 2 * s + 1)).value
                           for s in range(400)])  # fmt: skip
    assert float(values.std()) == pytest.approx(0.5 / math.sqrt(200), rel=0.15)  # of a standard deviation: 4 x 3.5%


@pytest.mark.parametrize("shift", [0.5, 1.0, 2.0, 4.0])
def test_two_sample_accuracy_of_shifted_gaussians_nears_that_of_the_best_classifier(shift: float) -> None:
    found = classifier_two_sample(normal(4000, 2, 0), normal(4000, 2, 1, shift))
    assert found.n == 4000
    assert best(shift) - 0.04 < found.value < best(shift) + 3 * 0.5 / math.sqrt(4000)
    assert found.low > 0.5


def test_two_sample_sees_another_scale_and_a_missing_mode() -> None:
    real = normal(2000, 2, 0)
    assert classifier_two_sample(real, normal(2000, 2, 1, scale=0.5)).low > 0.55
    fake = normal(2000, 2, 1)
    assert classifier_two_sample(real, fake[fake[:, 0] > 0]).low > 0.55
    assert classifier_two_sample(real, torch.zeros(2000, 2)).low > 0.9  # collapsed to a point


def test_two_sample_power_grows_with_the_rows() -> None:
    seen = [
        sum(classifier_two_sample(normal(n, 2, 2 * s), normal(n, 2, 2 * s + 1, 0.5)).low > 0.5 for s in range(40))
        for n in (40, 200, 1000)
    ]
    assert seen[0] < seen[1] < seen[2] and seen[2] >= 38


def test_two_sample_takes_as_many_rows_of_both_up_to_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    assert classifier_two_sample(normal(200, 2, 0), normal(61, 2, 1)).n == 60
    monkeypatch.setattr(two_sample, "MOST", 50)
    assert classifier_two_sample(normal(200, 2, 0), normal(200, 2, 1)).n == 50


def test_two_sample_twin_that_is_judged_on_rows_it_has_seen_is_far_from_one_half() -> None:
    """Why the halves are held out: with its own label among its neighbours a row is right too often."""
    x = torch.cat([normal(100, 8, 0), normal(100, 8, 1)])
    labels = torch.arange(200) >= 100
    own = torch.cdist(x, x).topk(3, dim=1, largest=False).indices
    assert float(((labels[own].sum(1) > 1) == labels).double().mean()) > 0.6


def test_two_sample_refuses_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="3 fake features, 2 real"):
        classifier_two_sample(normal(40, 2, 0), normal(40, 3, 1))
    with pytest.raises(ValueError, match="5 rows, at least 20"):
        classifier_two_sample(normal(40, 2, 0), normal(5, 2, 1))
