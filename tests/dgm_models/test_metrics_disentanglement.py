"""The mutual information gap and DCI against codes whose numbers are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dgm_models.metrics import disentanglement
from dgm_models.metrics.disentanglement import GROUPS, Gap, dci, mig_histogram, mig_sampled

SIZES = (3, 4, 6)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def grid(*sizes: int, repeats: int = 1, seed: int = 0) -> Tensor:
    """[n, F]: every combination of the factors equally often, in an order drawn by the seed."""
    rows = torch.cartesian_prod(*[torch.arange(size) for size in sizes]).repeat(repeats, 1)
    return rows[torch.randperm(len(rows), generator=rng(seed))]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def permuted(factors: Tensor) -> Tensor:
    """The factors in another order, scaled and turned round, and a code of noise between them."""
    codes = [-3.0 * factors[:, 2], 0.1 * factors[:, 0] + 5.0, normal(len(factors), seed=9), factors[:, 1]]
    return torch.stack([code.double() for code in codes], 1)


def sampled(codes: Tensor, factors: Tensor, deviation: float = 1e-3) -> Gap:
    """`mig_sampled` of codes with one posterior deviation."""
    return mig_sampled(codes, torch.full_like(codes, 2 * math.log(deviation)), factors, normal(*codes.shape, seed=5))


def entropy(*p: float) -> float:
    return -sum(each * math.log(each) for each in p if each)


def test_gap_is_one_for_the_factors_in_another_order() -> None:
    factors = grid(*SIZES, repeats=10)
    found = mig_histogram(permuted(factors), factors)
    assert found.entropy == pytest.approx([math.log(size) for size in SIZES])
    assert found.information[[1, 3, 0], [0, 1, 2]] == pytest.approx(found.entropy)
    # the code of noise comes second: in 720 rows it tells about 19 (V - 1) / (2 n) nats of every factor
    lost = [19 * (size - 1) / (2 * 720) / math.log(size) for size in SIZES]
    assert found.score.value == pytest.approx(1 - sum(lost) / 3, abs=0.02)
    alone = permuted(factors)[:, [0, 1, 3]]
    for found in (mig_histogram(alone, factors), sampled(alone, factors)):
        assert found.score.value == pytest.approx(1, abs=1e-6)  # the grid is complete: the factors share nothing
        assert found.score.high - found.score.low < 0.02
        assert [gap.value for gap in found.factors] == pytest.approx([1, 1, 1], abs=1e-6)


@pytest.mark.parametrize("measure", [mig_histogram, lambda codes, factors: sampled(codes, factors, 0.5)])
def test_gap_is_nothing_for_codes_that_know_nothing(measure: Callable[[Tensor, Tensor], Gap]) -> None:
    factors = grid(*SIZES, repeats=20)
    found = measure(normal(len(factors), 6), factors)
    assert 0 <= found.score.value < 0.02
    assert found.score.low < 0.02 and found.score.high > 0


def test_gap_is_nothing_for_a_code_that_is_there_twice() -> None:
    factors = grid(*SIZES, repeats=3)
    twice = torch.cat([factors, factors], 1).double()
    assert mig_histogram(twice, factors).score.value == pytest.approx(0, abs=1e-12)
    assert sampled(twice, factors).score.value == pytest.approx(0, abs=1e-6)


def test_gap_of_noisy_copies_is_known() -> None:
    factors = grid(2, 4, repeats=200)
    wrong = torch.zeros(len(factors), 2, dtype=torch.long)
    for code, share in enumerate((0.1, 0.3)):  # the first factor, wrong in so many of the rows of either value
        for value in range(2):
            rows = (factors[:, 0] == value).nonzero()[:, 0]
            wrong[rows[: round(share * len(rows))] if code else rows[-round(share * len(rows)) :], code] = 1
    codes = torch.cat([factors[:, :1] ^ wrong, factors[:, 1:]], 1).double()
    known = [math.log(2) - entropy(share, 1 - share) for share in (0.1, 0.3)]
    for found in (mig_histogram(codes, factors), sampled(codes, factors)):
        assert found.information[:2, 0] == pytest.approx(known, abs=1e-6)
        assert found.factors[0].value == pytest.approx((known[0] - known[1]) / math.log(2), abs=1e-6)
        assert found.factors[1].value == pytest.approx(1, abs=1e-2)  # `wrong` follows the rows' order, not the factor
        assert found.factors[0].low < found.factors[0].value < found.factors[0].high


def test_sampled_information_of_a_gaussian_mixture_is_its_integral() -> None:
    factors = grid(2, 2, repeats=500)
    means = factors.double() * torch.tensor([2.0, 0.0])  # q(z_1|v) = N(2 v, 1): one density for each value
    found = mig_sampled(means, torch.zeros_like(means), factors, normal(*means.shape, seed=3))
    z = torch.linspace(-12, 14, 20_001, dtype=torch.float64)
    each = torch.exp(-0.5 * (z[:, None] - torch.tensor([0.0, 2.0])) ** 2) / math.sqrt(2 * math.pi)
    mixture = each.mean(1)
    nats = float(-torch.xlogy(mixture, mixture).sum() * (z[1] - z[0])) - 0.5 * math.log(2 * math.pi * math.e)
    # 2,000 draws of log q(z|v) - log q(z), whose deviation is below 0.6 nats: 4 standard errors are 0.054
    assert float(found.information[0, 0]) == pytest.approx(nats, abs=0.054)
    assert float(found.information[1].abs().max()) < 1e-6
    assert found.factors[0].low < nats / math.log(2) < found.factors[0].high


def test_histogram_tells_no_more_than_its_bins() -> None:
    factors = grid(40, 2, repeats=20)
    found = mig_histogram(factors.double(), factors)
    assert found.factors[0].value == pytest.approx(math.log(20) / math.log(40), abs=1e-9)
    assert sampled(factors.double(), factors).factors[0].value == pytest.approx(1, abs=1e-6)


def test_conventions_differ_where_posteriors_are_wide() -> None:
    factors = grid(*SIZES, repeats=4)
    codes = permuted(factors)[:, [0, 1, 3]]
    assert mig_histogram(codes, factors).score.value == pytest.approx(1, abs=1e-6)
    assert sampled(codes, factors, 2.0).score.value < 0.5  # the means tell the factors, the draws do not


def test_sampled_does_not_depend_on_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = grid(*SIZES)
    whole = sampled(permuted(factors), factors, 0.3)
    monkeypatch.setattr(disentanglement, "_BLOCK", 100)
    assert sampled(permuted(factors), factors, 0.3).score.value == pytest.approx(whole.score.value, abs=1e-6)


def without(group: int, rows: Tensor) -> Tensor:
    return rows[torch.arange(len(rows)) % GROUPS != group]


def test_left_out_values_are_those_of_the_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    factors, seen = grid(*SIZES, repeats=2), {}

    def keep(whole: float, deleted: Any, correct: bool) -> Any:
        seen[whole] = deleted.values
        return real(whole, deleted, correct=correct)

    real = disentanglement.jackknife
    monkeypatch.setattr(disentanglement, "jackknife", keep)
    codes = factors.double() @ normal(3, 4, seed=4) + 0.1 * normal(len(factors), 4, seed=8)
    codes[0], codes[1] = codes.amax(0), codes.amin(0)  # the extremes stay, so the bins do
    for name, measure in {
        "histogram": lambda keep: mig_histogram(keep(codes), keep(factors)).score.value,
        "sampled": lambda keep: (
            mig_sampled(
                keep(codes), torch.full_like(keep(codes), -2.0), keep(factors), keep(normal(*codes.shape, seed=5))
            ).score.value
        ),
    }.items():
        left_out = seen_of(measure, seen)
        for group in (2, 7):
            other = measure(lambda rows, group=group: without(group, rows))
            assert float(left_out[group]) == pytest.approx(other, abs=1e-5), name  # densities are summed in float32


def seen_of(measure: Callable[..., float], seen: dict[float, Tensor]) -> Tensor:
    whole = measure(lambda rows: rows)
    return seen[whole]


def test_interval_covers_the_gap_of_many_rows() -> None:
    """Codes of one noise and another: the interval of 1,000 rows holds the number of 60,000, less the bias of 1,000."""

    def gap(n: int, seed: int) -> Any:
        factors = torch.randint(4, (n, 2), generator=rng(seed))
        return mig_histogram(factors + 0.7 * normal(n, 2, seed=seed + 1000), factors).score

    many = gap(60_000, 77).value
    found = [gap(1000, seed) for seed in range(40)]
    bias = sum(each.value for each in found) / 40 - many
    inside = sum(each.low - bias <= many <= each.high - bias for each in found)
    assert abs(bias) < 0.02
    assert inside >= 33  # of 95% intervals 38 are expected, 33 or fewer in one of 100 such tests


def test_dci_is_one_for_the_factors_in_another_order() -> None:
    factors = grid(*SIZES, repeats=5)
    found = dci(permuted(factors), factors)
    for score in (found.disentanglement, found.completeness, found.informativeness):
        assert score.value == pytest.approx(1, abs=1e-3)  # straight lines are among the functions
    assert found.importance.argmax(0).tolist() == [1, 3, 0]
    assert found.told == pytest.approx([1, 1, 1], abs=1e-4)


def test_dci_sees_through_a_monotone_code_and_through_clusters() -> None:
    factors = grid(5, 5, 5, repeats=5)
    places = torch.tensor([3.0, -1.0, 7.0, 0.0, 4.0])  # a code without order: every value has its own place
    codes = torch.stack([factors[:, 0].double().exp(), factors[:, 1] ** 3.0, places[factors[:, 2]].double()], 1)
    found = dci(codes, factors)
    assert found.disentanglement.value > 0.97 and found.informativeness.value > 0.9


def test_dci_is_nothing_for_a_rotated_code() -> None:
    factors = grid(6, 6, 6, 6)
    signs = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=torch.float64)
    found = dci((factors - 2.5).double() @ signs / 2, factors)
    assert found.informativeness.value == pytest.approx(1, abs=1e-6)  # all of it is there,
    assert found.disentanglement.value == pytest.approx(0, abs=1e-3)  # and nothing has a place of its own
    assert found.completeness.value == pytest.approx(0, abs=1e-3)


def test_dci_of_a_shared_code_is_known() -> None:
    factors = grid(8, 8, repeats=8)
    codes = torch.stack([factors[:, 0].double(), factors.double().sum(1)], 1)  # v_2 = z_2 - z_1
    found = dci(codes, factors)
    # R = [[1, 1], [0, 2]]: Var z_2 is twice Var v_2
    assert found.importance.flatten().tolist() == pytest.approx([1, 1, 0, 2], abs=1e-3)
    assert found.disentanglement.value == pytest.approx(0.5 * 0 + 0.5 * 1, abs=2e-3)
    third = 1 - entropy(1 / 3, 2 / 3) / math.log(2)
    assert found.completeness.value == pytest.approx(0.25 * 1 + 0.75 * third, abs=2e-3)


def test_dci_of_codes_that_know_nothing_is_near_nothing() -> None:
    factors = grid(4, 4, 4, repeats=40)
    found = dci(normal(len(factors), 5), factors)
    assert -0.05 < found.informativeness.value < 0.0  # held-out rows: what was fitted is noise
    assert float(found.importance.max()) < 0.02
    assert found.disentanglement.value < 0.15


def test_dci_informativeness_is_that_of_fits_without_the_fold() -> None:
    factors = grid(3, 4, repeats=20)
    codes = factors.double() @ normal(2, 2, seed=1) + normal(len(factors), 2, seed=2)
    target = factors.double() - factors.double().mean(0)
    knots = codes.quantile(torch.linspace(0, 1, 9, dtype=torch.float64), dim=0)
    ramps = ((codes[:, None] - knots[:-1]) / (knots[1:] - knots[:-1])).clamp(0, 1).flatten(1)
    design = torch.cat([torch.ones(len(codes), 1), ramps], 1)
    errors = torch.zeros(2, dtype=torch.float64)
    for fold in range(GROUPS):
        held = torch.arange(len(codes)) % GROUPS == fold
        fitted = torch.linalg.lstsq(design[~held], target[~held]).solution
        errors += ((target[held] - design[held] @ fitted) ** 2).sum(0)
    assert dci(codes, factors).told == pytest.approx(1 - errors / (target**2).sum(0), abs=1e-4)  # the ridge


def test_dci_of_a_dead_code_is_that_of_the_others() -> None:
    factors = grid(*SIZES, repeats=10)
    alive = permuted(factors)[:, [0, 1, 3]]
    dead = torch.cat([alive, torch.zeros(len(alive), 1)], 1)
    assert dci(dead, factors).disentanglement.value == pytest.approx(1, abs=1e-3)
    assert float(dci(dead, factors).importance[3].abs().max()) == 0
    assert mig_histogram(dead, factors).score.value == pytest.approx(1, abs=1e-6)


FACTORS = grid(*SIZES)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"codes": normal(len(FACTORS), 1)}, "one code; at least 2"),
        ({"codes": normal(len(FACTORS) - 1, 3)}, r"factors of shape \(72, 3\).*expected integers \[71, F\]"),
        ({"codes": normal(len(FACTORS), 3).where(FACTORS > 0, torch.nan)}, "not finite"),
        ({"codes": normal(10, 3), "factors": FACTORS[:10]}, "10 rows, at least 20"),
        ({"factors": FACTORS.double()}, "expected integers"),
        ({"factors": FACTORS * 0}, "factor 0 has values 0 to 0; expected at least two"),
        ({"factors": FACTORS - 1}, "factor 0 has values -1 to 1; .*from 0 on"),
    ],
)
def test_inputs_that_cannot_be_measured_are_refused(change: dict[str, Tensor], words: str) -> None:
    given = {"codes": normal(len(FACTORS), 2), "factors": FACTORS} | change
    for name, measure in {"mig_histogram": mig_histogram, "mig_sampled": sampled, "dci": dci}.items():
        with pytest.raises(ValueError, match=f"{name}: .*{words}"):
            measure(given["codes"], given["factors"])


def test_sampled_refuses_shapes_that_differ() -> None:
    codes = normal(len(FACTORS), 2)
    with pytest.raises(
        ValueError, match=r"means \(72, 2\), log_variances \(72, 2\), eps \(72, 3\); expected one shape"
    ):
        mig_sampled(codes, codes, FACTORS, normal(len(FACTORS), 3))


def test_dci_refuses_too_few_rows_and_a_single_factor() -> None:
    with pytest.raises(ValueError, match="72 rows for 3 codes; 96 are needed"):
        dci(normal(len(FACTORS), 3), FACTORS)
    with pytest.raises(ValueError, match="one factor; at least 2"):
        dci(normal(len(FACTORS), 2), FACTORS[:, :1])
