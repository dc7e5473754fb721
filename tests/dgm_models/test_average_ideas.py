"""One object for five ideas, each against its formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dgm_models.training.average import Average

PATH = (1.0, 4.0, -2.0, 3.0)


def walk(decay, path=PATH) -> list[float]:
    """The average of one weight that starts at 10 and walks the path."""
    module = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(module.weight, 10.0)
    average, found = Average(module, decay), []
    for value in path:
        nn.init.constant_(module.weight, value)
        average.update(module)
        found.append(float(average.module.weight))
    return found


def test_average_with_a_constant_decay_is_exponential() -> None:
    expected, value = [], 10.0
    for x in PATH:
        value = 0.75 * value + 0.25 * x
        expected.append(value)
    assert walk(0.75) == pytest.approx(expected, rel=1e-14)  # float64


def test_average_with_decay_one_is_a_frozen_reference() -> None:
    assert walk(1.0) == [10.0] * 4


def test_average_with_decay_zero_is_a_copy() -> None:
    assert walk(0.0) == list(PATH)


def test_average_with_decay_one_minus_one_over_t_is_the_mean_of_the_history() -> None:
    means = [sum(PATH[: t + 1]) / (t + 1) for t in range(4)]
    assert walk(lambda t: 1 - 1 / t) == pytest.approx(means, rel=1e-14)  # float64; the initial 10 has no weight


def test_average_copies_buffers_and_never_averages_them() -> None:
    module = nn.BatchNorm1d(2)
    average = Average(module, 0.9)
    module.train()(torch.randn(8, 2) + 5)
    average.update(module)
    assert torch.equal(average.module.running_mean, module.running_mean)
    assert int(average.module.num_batches_tracked) == 1


def test_average_is_in_eval_mode_without_gradient() -> None:
    average = Average(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).train(), 0.9)
    assert not average.module.training
    assert not any(p.requires_grad for p in average.parameters())


def test_average_counts_its_updates_in_its_state() -> None:
    module = nn.Linear(1, 1)
    one = Average(module, lambda t: 1 - 1 / t)
    for _ in range(3):
        one.update(module)
    two = Average(module, lambda t: 1 - 1 / t)
    two.load_state_dict(one.state_dict())
    assert int(two.updates) == 3


def test_average_refuses_a_module_of_another_structure() -> None:
    with pytest.raises(ValueError, match="zip"):
        Average(nn.Linear(1, 1), 0.5).update(nn.Linear(1, 1, bias=False))
