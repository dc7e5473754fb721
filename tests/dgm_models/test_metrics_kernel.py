"""The kernel distance and the Inception Score against their slow definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dgm_models.metrics import kernel as kernel_module
from dgm_models.metrics.estimate import Deleted, jackknife
from dgm_models.metrics.inception import inception_score
from dgm_models.metrics.kernel import kernel_distance


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def without(rows: Tensor) -> list[Tensor]:
    return [torch.cat([rows[:i], rows[i + 1 :]]) for i in range(len(rows))]


def slow_kernel_distance(x: Tensor, y: Tensor) -> float:
    def mean(a: Tensor, b: Tensor, pairs: float, keep: Tensor) -> Tensor:
        return (((a @ b.mT / a.shape[1] + 1) ** 3) * keep).sum() / pairs

    n, m = len(x), len(y)
    return float(
        mean(x, x, n * (n - 1), 1 - torch.eye(n)) + mean(y, y, m * (m - 1), 1 - torch.eye(m))
        - 2 * mean(x, y, n * m, torch.ones(n, m))
    )  # fmt: skip


def test_kernel_distance_equals_its_definition_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake = normal(23, 4, seed=1), 1.3 * normal(29, 4, seed=2) + 0.3
    slow = jackknife(
        slow_kernel_distance(real, fake),
        Deleted(torch.tensor([slow_kernel_distance(rows, fake) for rows in without(real)], dtype=torch.float64)),
        Deleted(torch.tensor([slow_kernel_distance(real, rows) for rows in without(fake)], dtype=torch.float64)),
    ).interval(23)
    for block in (4096, 7):
        monkeypatch.setattr(kernel_module, "_BLOCK", block)
        fast = kernel_distance(real, fake)
        assert fast.value == pytest.approx(slow_kernel_distance(real, fake), rel=1e-9)
        assert slow.value == pytest.approx(fast.value, rel=1e-6)  # unbiased: nothing to correct
        assert fast.high - fast.low == pytest.approx(slow.high - slow.low, rel=1e-9)


def test_kernel_distance_grows_with_the_shift_and_is_symmetric() -> None:
    real, noise = normal(100, 4, seed=1), normal(100, 4, seed=2)
    values = [kernel_distance(real, noise + shift).value for shift in (0.0, 0.5, 1.0, 2.0)]
    assert values == sorted(values)
    assert kernel_distance(noise, real).value == pytest.approx(values[0], rel=1e-9)


def test_kernel_distance_refuses_what_it_cannot_measure() -> None:
    good = normal(50, 4)
    with pytest.raises(ValueError, match="fake: 10 rows, at least 20"):
        kernel_distance(good, good[:10])
    with pytest.raises(ValueError, match="3 fake features, 4 real"):
        kernel_distance(good, good[:, :3])
    with pytest.raises(ValueError, match="real: 50 of 50 rows are not finite"):
        kernel_distance(good * torch.nan, good)
    with pytest.raises(ValueError, match="all 50 rows are equal"):
        kernel_distance(good, torch.zeros(50, 4))


def slow_inception_score(rows: Tensor) -> float:
    return float((rows * (rows / rows.mean(0)).log()).sum(1).mean().exp())


def test_inception_score_equals_its_definition() -> None:
    rows = (2 * normal(30, 4)).softmax(1)
    left_out = torch.tensor([slow_inception_score(rest) for rest in without(rows)], dtype=torch.float64)
    slow = jackknife(slow_inception_score(rows), Deleted(left_out)).interval(30)
    fast = inception_score(rows)
    assert (fast.value, fast.low, fast.high) == pytest.approx((slow.value, slow.low, slow.high), rel=1e-9)


def test_inception_score_of_sure_and_balanced_rows_is_the_number_of_classes() -> None:
    score = inception_score(torch.eye(5).repeat(200, 1))
    assert score.value == score.high == 5  # corrected upwards, never beyond what a score can be
    assert score.low > 4.98
    assert inception_score((1e-4 * normal(100, 5)).softmax(1)).value == pytest.approx(1, abs=1e-6)


def test_inception_score_refuses_what_it_cannot_measure() -> None:
    good = normal(100, 5).softmax(1)
    with pytest.raises(ValueError, match="give softmax"):
        inception_score(normal(100, 5))
    with pytest.raises(ValueError, match="24 rows for 5 classes; at least 25"):
        inception_score(good[:24])
    with pytest.raises(ValueError, match="1 class"):
        inception_score(good[:, :1])
    with pytest.raises(ValueError, match="all 100 rows are equal"):
        inception_score(torch.full((100, 5), 0.2))
    with pytest.raises(ValueError, match="not finite"):
        inception_score(good * torch.nan)
