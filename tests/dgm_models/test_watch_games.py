"""The watchers of a game against games whose duality gap, gradients and curvatures have closed forms."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from dgm_models.codecs import Standardized
from dgm_models.objective import Loss, Objective, Turn
from dgm_models.ops import games
from dgm_models.ops.games import Conditions, Watch
from dgm_models.protocols import Batch, DataSpec, Model

DATA = DataSpec("vector", (1,))


class Point(nn.Module):
    def __init__(self, *values: float) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.tensor(values, dtype=torch.float64))


class Two(Model):
    """Two players, each a point."""

    def __init__(self, x: Sequence[float], y: Sequence[float]) -> None:
        super().__init__(DATA, Standardized(DATA))
        self.x, self.y = Point(*x), Point(*y)

    def players(self) -> dict[str, nn.Module]:
        return {"critic": self.y, "generator": self.x}


Value = Callable[[Tensor, Tensor], Tensor]


class Rules(Objective):
    """Every player minimises its own function of (x, y), whatever the rows are."""

    def __init__(self, critic: Value, generator: Value, noise: float = 0.0) -> None:
        super().__init__()
        self.critic, self.generator, self.noise = critic, generator, noise
        self.register_buffer("calls", torch.zeros(()))

    def turns(self) -> Sequence[Turn]:
        return Turn("critic", self.loss(self.critic)), Turn("generator", self.loss(self.generator))

    def loss(self, value: Value) -> Callable[[Two, Batch], Loss]:
        def total(model: Two, batch: Batch) -> Loss:
            self.calls += 1
            push = self.noise * batch.normal("push", model.x.at.shape).to(model.x.at) @ model.x.at
            return Loss(value(model.x.at, model.y.at) * len(batch) + push.sum())

        return total


def zero_sum(value: Value, **more: float) -> Rules:
    return Rules(lambda x, y: -value(x, y), value, **more)


def bilinear(x: Tensor, y: Tensor) -> Tensor:
    return x @ y


def quadratic(a: float, b: float, c: float) -> Value:
    """V = a x^2 / 2 + b x y - c y^2 / 2: max over y is x^2 (a + b^2/c) / 2, min over x is -y^2 (c + b^2/a) / 2."""
    return lambda x, y: (a * x * x / 2 + b * x * y - c * y * y / 2).sum()


def batch(rows: int = 8) -> Batch:
    return Batch(x=torch.zeros(rows, 1), key=torch.arange(rows), id=torch.arange(rows))


def gap(model: Two, rules: Rules, steps: int) -> float:
    return sum(float(gain) for gain in games.duality_gap(model, rules, batch(), steps).values())


# ---- the duality gap


def test_duality_gap_of_a_bilinear_game_grows_by_the_reach_of_the_steps() -> None:
    # constant gradients: k steps go R = RATE (1 + 1.5 + ... + 1.5^(k-1)) along them: y' = y + R x, x' = x - R y
    model, rules = Two([0.5, -2.0], [3.0, 1.0]), zero_sum(bilinear)
    for steps in (1, 5):
        reach = games.RATE * (1.5**steps - 1) / 0.5
        found = games.duality_gap(model, rules, batch(), steps)
        assert float(found["critic"]) == pytest.approx(reach * 4.25, rel=1e-6)  # x.x; the noise term is float32
        assert float(found["generator"]) == pytest.approx(reach * 10.0, rel=1e-6)


@pytest.mark.parametrize(("a", "b", "c"), [(1.0, 0.5, 2.0), (3.0, -1.0, 0.5), (1.0, 2.0, 1.0), (500.0, 2.0, 0.1)])
def test_duality_gap_of_a_quadratic_game_is_the_closed_form(a: float, b: float, c: float) -> None:
    x, y = 0.4, -0.3
    exact = x * x * (a + b * b / c) / 2 + y * y * (c + b * b / a) / 2
    assert gap(Two([x], [y]), zero_sum(quadratic(a, b, c)), 100) == pytest.approx(exact, rel=1e-6)


def test_duality_gap_grows_with_the_steps_up_to_its_value_and_no_further() -> None:
    found = [gap(Two([0.4], [0.3]), zero_sum(quadratic(1.0, 0.5, 1.0)), steps) for steps in (1, 3, 10, 100)]
    assert found == sorted(found) and found[0] > 0
    assert found[-1] == pytest.approx((0.16 + 0.09) * 1.25 / 2, rel=1e-6)


def test_duality_gap_vanishes_at_the_equilibrium_alone() -> None:
    rules = zero_sum(quadratic(1.0, 0.5, 1.0))
    assert gap(Two([0.0], [0.0]), rules, 50) == 0.0
    assert gap(Two([0.1], [0.0]), rules, 50) > 1e-3


def test_duality_gap_of_a_game_that_is_not_zero_sum_takes_each_player_s_own_loss() -> None:
    rules = Rules(lambda x, y: ((y - x) ** 2).sum(), lambda x, y: ((x - 1) ** 2).sum())
    found = games.duality_gap(Two([0.0], [0.5]), rules, batch(), 100)
    assert float(found["critic"]) == pytest.approx(0.25, rel=1e-6)
    assert float(found["generator"]) == pytest.approx(1.0, rel=1e-6)


def test_best_response_never_raises_the_loss_it_descends() -> None:
    steep = zero_sum(lambda x, y: ((1e4 * x) ** 4 + x * y).sum())  # the first step of RATE would be far too long
    model = Two([0.01], [0.5])
    losses = []
    for steps in range(0, 60, 5):
        best, _ = games.best_response(model, steep, "generator", batch(), steps)
        losses.append(float(((1e4 * best.x.at.detach()) ** 4 + best.x.at.detach() * 0.5).sum()))
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.01 * losses[0]


def test_duality_gap_is_judged_on_rows_that_the_best_response_has_not_seen() -> None:
    # the loss is noise x: whatever is gained on the rows that were seen is chance; on others it is as often lost
    rules = zero_sum(lambda x, y: (y * 0).sum() + (x * 0).sum(), noise=1.0)
    model = Two([0.0] * 200, [0.0])
    find, judge = batch(64).split(2)
    best, _ = games.best_response(model, rules, "generator", find, 5)
    moved = best.x.at.detach().float()
    seen, unseen = (float(rows.normal("push", (200,)).mean(0) @ moved) for rows in (find, judge))
    reach = games.RATE * (1.5**5 - 1) / 0.5
    assert seen == pytest.approx(-reach * 200 / 32, rel=0.3)  # R |mean noise|^2
    assert abs(unseen) < 4 * reach * 200**0.5 / 32  # products of independent means: 4 standard deviations
    gain = float(games.duality_gap(model, rules, batch(64), 5)["generator"])
    assert gain == pytest.approx(-unseen, rel=1e-4)


def test_turns_that_are_taken_rarely_count_by_their_rate() -> None:
    class Lazy(Rules):
        def turns(self) -> Sequence[Turn]:
            first, second = super().turns()
            return first, Turn("critic", self.loss(lambda x, y: 16 * (y * y).sum()), every=16), second

    lazy = Lazy(lambda x, y: -(x * y).sum(), lambda x, y: (x * y).sum())
    # the critic's loss is y^2 - x y: curvature 2, gradient 2 y - x
    found = games.nash_conditions(Two([1.0], [3.0]), lazy, batch(), 1)["critic"]
    assert found == pytest.approx((5.0, 2.0, 2.0))


# ---- the Nash conditions


def test_nash_conditions_are_the_gradients_and_curvatures_of_the_players_own_losses() -> None:
    curves = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)
    rules = zero_sum(lambda x, y: (curves * x * x).sum() / 2 + x @ y - 3 * (y * y).sum() / 2)
    found = games.nash_conditions(Two([0.0, 0.1, 0.0], [0.3, 0.0, 0.0]), rules, batch(), 3)
    assert found["generator"] == pytest.approx(((0.3**2 + 0.1**2) ** 0.5, 0.5, 4.0))
    assert found["critic"] == pytest.approx(((0.9**2 + 0.1**2) ** 0.5, 3.0, 3.0))
    assert games.verdict(found) == "moving"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (quadratic(1.0, 0.5, 2.0), "nash"),
        (quadratic(-1.0, 3.0, 2.0), "saddle"),  # the generator's loss falls in both directions
        (quadratic(1.0, 3.0, -2.0), "saddle"),  # the critic could raise V without end
        (bilinear, "undecided"),  # no curvature at all: the second order does not tell
        (quadratic(1.0, 0.5, 0.0), "undecided"),
    ],
)
def test_verdict_at_a_stationary_point(value: Value, expected: str) -> None:
    assert games.verdict(games.nash_conditions(Two([0.0], [0.0]), zero_sum(value), batch(), 5)) == expected


def test_verdict_thresholds_are_those_that_are_named() -> None:
    still, up = Conditions(games.GRADIENT, 0.1, 1.0), Conditions(0.0, 1.0, 2.0)
    assert games.verdict({"a": still, "b": up}) == "nash"
    assert games.verdict({"a": still._replace(gradient=1.01 * games.GRADIENT), "b": up}) == "moving"
    assert games.verdict({"a": still._replace(gradient=float("nan")), "b": up}) == "moving"
    share = games.CURVATURE
    for least, expected in ((1.01 * share, "nash"), (0.99 * share, "undecided"), (-0.99 * share, "undecided"),
                            (-1.01 * share, "saddle")):  # fmt: skip
        assert games.verdict({"a": still._replace(least=least), "b": up}) == expected


def test_nash_gradient_has_no_floor_of_noise() -> None:
    # the expected gradient is zero; a batch of 64 rows has one of norm sqrt(50 / 64) = 0.9
    rules = zero_sum(quadratic(1.0, 0.0, 1.0), noise=1.0)
    model = Two([0.0] * 50, [0.0] * 50)
    found = []
    for start in range(40):
        rows = Batch(x=torch.zeros(64, 1), key=torch.arange(64) + 64 * start, id=torch.arange(64))
        found.append(games.nash_conditions(model, rules, rows, 1)["generator"].gradient)
    # halves of 32 rows: the inner product has sd sqrt(50) / 32 = 0.22; the square root of its positive part, on average
    assert sum(found) / len(found) < 0.4


# ---- what is watched


def test_watch_leaves_the_game_as_it_is_and_says_the_same_twice() -> None:
    model, rules = Two([0.4], [0.3]), zero_sum(quadratic(1.0, 0.5, 1.0))
    before = [p.detach().clone() for p in model.parameters()]
    first, second = (games.watch(model, rules, batch(), True, Watch()) for _ in range(2))
    assert first == second
    assert all(torch.equal(p, kept) and p.grad is None for p, kept in zip(model.parameters(), before, strict=True))
    assert float(rules.calls) == 0


def test_watch_tells_the_nash_conditions_at_the_last_report_only() -> None:
    model, rules = Two([0.4], [0.3]), zero_sum(quadratic(1.0, 0.5, 2.0))
    gap = {"critic/gain", "generator/gain", "duality_gap"}
    found = games.watch(model, rules, batch(), False, Watch())
    assert set(found) == gap
    assert float(found["duality_gap"]) == pytest.approx(float(found["critic/gain"] + found["generator/gain"]))
    last = games.watch(model, rules, batch(), True, Watch())
    names = ("gradient", "least_curvature", "greatest_curvature")
    assert set(last) == gap | {f"nash/{player}/{name}" for player in ("critic", "generator") for name in names}
    assert float(last["nash/critic/least_curvature"]) == pytest.approx(2.0)
    assert games.watch(model, rules, batch(), True, Watch(gap_steps=0, curvature_steps=0)) == {}


# ---- Hessians and Lanczos' method


def symmetric(dim: int, seed: int, spectrum: Tensor | None = None) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    square = torch.randn(dim, dim, generator=rng, dtype=torch.float64)
    if spectrum is None:
        return (square + square.T) / 2
    basis = torch.linalg.qr(square).Q
    return basis @ spectrum.diag() @ basis.T


def extremes(a: Tensor, steps: int) -> tuple[float, float]:
    return games.lanczos(lambda v: a @ v, len(a), steps, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dim", [1, 2, 7, 40])
def test_lanczos_with_a_step_for_every_dimension_gives_the_ends_of_the_spectrum(dim: int) -> None:
    for seed in range(5):
        a = symmetric(dim, seed)
        exact = torch.linalg.eigvalsh(a)
        assert extremes(a, dim + 5) == pytest.approx((float(exact[0]), float(exact[-1])), rel=1e-10)


@pytest.mark.parametrize(
    ("spectrum", "steps"),
    [
        (torch.tensor([-1.0] * 10 + [2.0] * 20), 2),  # as many steps as distinct eigenvalues
        (torch.tensor([-1.0, 3.0] + [0.5] * 30), 3),
        (torch.cat([torch.linspace(-1e-6, 1e-6, 30), torch.tensor([-2.0, 5.0])]), 6),
        (torch.cat([1 + torch.linspace(0, 1e-9, 20), 2 + torch.linspace(0, 1e-9, 20)]), 40),
        (torch.zeros(9), 9),
        (torch.full((9,), 4.0), 9),
    ],
)
def test_lanczos_finds_the_ends_of_clustered_spectra(spectrum: Tensor, steps: int) -> None:
    spectrum = spectrum.double()
    low, high = extremes(symmetric(len(spectrum), 3, spectrum), steps)
    assert low == pytest.approx(float(spectrum.min()), abs=1e-8)
    assert high == pytest.approx(float(spectrum.max()), abs=1e-8)


def test_lanczos_stays_within_the_spectrum_and_nears_its_ends() -> None:
    a = symmetric(300, 0)
    exact = torch.linalg.eigvalsh(a)
    found = [extremes(a, steps) for steps in (5, 20, 60)]
    for low, high in found:
        assert float(exact[0]) - 1e-9 <= low <= high <= float(exact[-1]) + 1e-9
    assert found[0][0] > found[1][0] > found[2][0] and found[0][1] < found[1][1] < found[2][1]
    assert found[2][0] == pytest.approx(float(exact[0]), rel=1e-3)


def test_hessian_product_is_that_of_the_full_hessian() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = torch.randn(10, 3, dtype=torch.float64)
    parameters = list(network.parameters())
    sizes = [p.numel() for p in parameters]

    def loss_at(flat: Tensor) -> Tensor:
        named = dict(network.named_parameters())
        values = {n: part.view_as(p) for (n, p), part in zip(named.items(), flat.split(sizes), strict=True)}
        return torch.func.functional_call(network, values, (x,)).square().mean()

    flat = torch.cat([p.detach().reshape(-1) for p in parameters])
    exact = torch.autograd.functional.hessian(loss_at, flat)
    product = games.hessian_product(network(x).square().mean(), parameters)
    for i in range(len(flat)):
        assert torch.allclose(product(torch.eye(len(flat), dtype=torch.float64)[i]), exact[i], atol=1e-12)
