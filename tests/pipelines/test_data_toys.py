"""Toy data: the density is normalised, it is that of the rows, and its entropy is right."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import make_moons  # type: ignore[import-untyped, unused-ignore]

from pipelines.data.datasets.checkerboard import Checkerboard
from pipelines.data.datasets.eight_gaussians import EightGaussians
from pipelines.data.datasets.moons import Moons
from pipelines.data.datasets.pinwheel import Pinwheel
from pipelines.data.raw import Array
from pipelines.data.toy import Toy, grid_integrals

N = 200_000
TOYS = [
    EightGaussians(N),
    EightGaussians(N, noise=0.9),
    Checkerboard(N),
    Moons(N),
    Moons(N, noise=0.05),
    Pinwheel(N),
    Pinwheel(N, noise=0.2, radial=0.25, rate=0.5, arms=3),
]
SKEWED = [(EightGaussians(N), {"noise": 0.205}), (Moons(N), {"noise": 0.103}), (Pinwheel(N), {"rate": 0.26})]


@pytest.fixture(scope="module")
def rows() -> dict[Toy, Array]:
    return {toy: toy.read(seed=0).x for toy in TOYS}


def errors_of_entropy(toy: Toy, x: Array) -> float:
    """How many standard errors mean(-log p) lies from the entropy; a constant log p has no error at all."""
    nll = -toy.log_density(x)
    return float(abs(nll.mean() - toy.entropy()) / (nll.std() / math.sqrt(len(x)) + 1e-9))


def chi_square(toy: Toy, x: Array, cells: int = 24, fine: int = 8) -> float:
    """How many standard deviations the chi-square of a histogram against the density lies above its mean.

    The expected count of a cell is the density's integral over it, from fine x fine midpoints.
    """
    left, right, bottom, top = toy.box()
    side = cells * fine
    grid_x = left + (right - left) * (np.arange(side) + 0.5) / side
    grid_y = bottom + (top - bottom) * (np.arange(side) + 0.5) / side
    points = np.stack(np.meshgrid(grid_x, grid_y, indexing="ij"), axis=-1).reshape(-1, 2)
    density = np.exp(toy.log_density(points)).reshape(cells, fine, cells, fine)
    expected = len(x) * density.sum((1, 3)) * (right - left) * (top - bottom) / side**2
    found = np.histogram2d(x[:, 0], x[:, 1], cells, [[left, right], [bottom, top]])[0]
    rare = expected < 20
    e = np.append(expected[~rare], expected[rare].sum() + 1e-9)
    f = np.append(found[~rare], found[rare].sum())
    degrees = len(e) - 1
    return float((((f - e) ** 2 / np.maximum(e, 1)).sum() - degrees) / math.sqrt(2 * degrees))


@pytest.mark.parametrize("toy", TOYS, ids=str)
def test_density_integrates_to_one(toy: Toy) -> None:
    mass, _ = grid_integrals(toy, step=0.02)
    assert mass == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("toy", TOYS, ids=str)
def test_entropy_is_the_mean_surprise_of_the_rows(toy: Toy, rows: dict[Toy, Array]) -> None:
    assert errors_of_entropy(toy, rows[toy]) < 4  # seeded: 4 standard errors would be chance once in 16,000


@pytest.mark.parametrize("toy", TOYS, ids=str)
def test_density_is_that_of_the_rows(toy: Toy, rows: dict[Toy, Array]) -> None:
    assert chi_square(toy, rows[toy]) < 5


@pytest.mark.parametrize(("toy", "change"), SKEWED, ids=str)
def test_density_of_slightly_different_settings_is_noticed(
    toy: Toy, change: dict[str, float], rows: dict[Toy, Array]
) -> None:
    other = replace(toy, **change)  # type: ignore[arg-type]  # the planted bug: the two tests above must be able to fail
    assert chi_square(other, rows[toy]) > 10
    assert errors_of_entropy(other, rows[toy]) > 4 or "rate" in change  # the swirl does not change the entropy


def test_entropy_of_distant_gaussians_is_known_in_closed_form() -> None:
    toy = EightGaussians(1, noise=0.05)  # 30 standard deviations apart: log 8 + log(2 pi e noise^2)
    assert toy.entropy() == pytest.approx(math.log(8) + math.log(2 * math.pi * math.e * 0.05**2), abs=1e-9)


def test_entropy_of_a_checkerboard_is_log_8() -> None:
    toy = Checkerboard(1)
    assert toy.entropy() == pytest.approx(grid_integrals(toy, 0.25)[1]) == math.log(8)


def test_entropy_of_a_pinwheel_does_not_depend_on_its_swirl() -> None:
    toy = Pinwheel(1, rate=0.3)
    assert grid_integrals(toy, 0.01)[1] == pytest.approx(toy.entropy(), abs=1e-4)  # in the swirled plane


@pytest.mark.parametrize("toy", [Moons(1, noise=0.07), EightGaussians(1, noise=0.5)], ids=str)
def test_entropy_does_not_depend_on_the_grid(toy: Toy) -> None:
    assert toy.entropy() == pytest.approx(grid_integrals(toy, 0.02)[1], abs=1e-6)


def test_checkerboard_has_no_row_outside_its_squares(rows: dict[Toy, Array]) -> None:
    assert np.isfinite(Checkerboard().log_density(rows[Checkerboard(N)])).all()
    assert Checkerboard().log_density(np.array([[2.5, 0.5], [0.5, 1.5], [0.5, 0.5]])).tolist() == [
        -math.inf, -math.inf, -math.log(8),
    ]  # fmt: skip


def test_moons_lie_on_the_arcs_of_scikit_learn() -> None:
    arcs, labels = make_moons(1000, noise=None)
    raw = Moons(2000, noise=0.02).read(0)
    for label in (0, 1):
        gap = np.linalg.norm(raw.x[raw.labels == label][:, None] - arcs[labels == label], axis=2).min(1)
        assert gap.mean() < 0.0175  # 0.02 sqrt(2 / pi) = 0.0160 across the arc, 4 standard errors of 0.0004


@pytest.mark.parametrize(
    ("toy", "quiet", "count"),
    [
        (EightGaussians(4000), EightGaussians(4000, noise=0.02), 8),
        (Moons(4000), Moons(4000, noise=0.02), 2),
        (Pinwheel(4000), Pinwheel(4000, noise=0.02), 5),
    ],
    ids=["eight gaussians", "moons", "pinwheel"],
)
def test_label_tells_the_component(toy: Toy, quiet: Toy, count: int) -> None:
    raw, own = toy.read(seed=3), quiet.read(seed=3)  # the same draws with little noise lie at their component
    assert raw.labels is not None and raw.classes == count
    assert own.labels is not None and np.array_equal(raw.labels, own.labels)
    centres = np.array([own.x[own.labels == label].mean(0) for label in range(count)])
    nearest = ((raw.x[:, None] - centres) ** 2).sum(2).argmin(1)
    assert (nearest == raw.labels).mean() > 0.7  # the arcs of the moons overlap as seen from their middles
    assert np.bincount(raw.labels).min() > 0.8 * 4000 / count


def test_rows_begin_alike_for_every_length_and_differ_for_every_seed() -> None:
    short, long = Moons(10).read(1), Moons(1000).read(1)
    assert np.array_equal(short.x, long.x[:10])
    assert not np.isin(Moons(1000).read(2).x, long.x).any()


def test_log_density_takes_numpy_and_torch() -> None:
    x = np.random.default_rng(0).normal(size=(5, 2))
    out = Moons().log_density(torch.from_numpy(x))
    assert isinstance(out, torch.Tensor)
    assert out.tolist() == Moons().log_density(x).tolist()


def test_log_density_is_finite_far_away() -> None:
    for toy in (EightGaussians(), Moons(), Pinwheel()):
        assert np.isfinite(toy.log_density(np.array([[900.0, 0.0], [-30.0, 80.0]]))).all()


@pytest.mark.parametrize(
    "bad",
    [
        lambda: Moons(0),
        lambda: Moons(noise=0.0),
        lambda: Moons(noise=math.nan),
        lambda: EightGaussians(noise=-1.0),
        lambda: Pinwheel(radial=0.0),
        lambda: Pinwheel(rate=-0.1),
        lambda: Pinwheel(arms=0),
    ],
)
def test_impossible_settings_are_refused(bad: object) -> None:
    assert callable(bad)
    with pytest.raises(ValueError, match=r"(rows|noise|radial|rate|arms): .*expected"):
        bad()
