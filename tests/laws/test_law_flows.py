"""Laws of flows: one map in two directions, and its determinant. In float64, with weights far from the identity."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dgm_models.method import encoded
from dgm_models.nn.flow import Flow
from tests.laws import cases
from tests.laws.cases import CASES, Case

FLOWS = [case for case in CASES if case.row.family == "flows"]
PLANES = [case for case in FLOWS if case.sort == "vector:real"]  # two coordinates

# rounding of 2e-16, enlarged by the slopes of a few layers
EXACT = 1e-9
# an inverse by iteration stops at steps of 2e-12 (1 + |x|): a contraction by 0.9 leaves ten times as much, every layer
ITERATED = {"flows/i_resnet": 1e-8, "flows/mint_net": 1e-8}


def moved(case: Case, size: float = 0.3) -> Flow:
    """The model with weights moved at random: a flow begins as the identity, which would hold to every law."""
    model = cases.made(case).model
    assert isinstance(model, Flow)
    rng = torch.Generator().manual_seed(1)
    model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p += size * torch.randn(p.shape, generator=rng, dtype=p.dtype)
    return model


def given(case: Case, n: int) -> Tensor | None:
    return torch.arange(n) % case.spec.classes if case.asked else None


def examples(model: Flow, n: int) -> Tensor:
    return encoded(model, cases.rows(model.data, n)[:n], labels=cases.labels(model.data, n)).x.double()


def near(a: Tensor, b: Tensor, case: Case, exact: float = EXACT) -> bool:
    return float((a - b).abs().max()) < max(ITERATED.get(case.method, 0.0), exact)


@pytest.mark.parametrize("case", FLOWS, ids=str)
def test_flow_inverse_undoes_forward(case: Case) -> None:
    model, cond = moved(case), given(case, 6)
    x = examples(model, 6)
    z = model.encode(x, cond)
    assert z.shape == (6, model.data.dims) and z.dtype == torch.float64
    assert float((z - x.flatten(1)).abs().max()) > 0.1  # it is no identity
    assert near(model.decode(z, cond), x, case)


@pytest.mark.parametrize("case", FLOWS, ids=str)
def test_flow_forward_undoes_inverse(case: Case) -> None:
    model, cond = moved(case), given(case, 6)
    z = torch.randn(6, model.data.dims, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = model.decode(z, cond)
    assert x.shape == (6, *model.data.shape)
    assert near(model.encode(x, cond), z, case)


@pytest.mark.parametrize("case", FLOWS, ids=str)
def test_flow_log_determinant_is_that_of_its_jacobian(case: Case) -> None:
    model, cond = moved(case), given(case, 2)
    x, context = examples(model, 2), None if cond is None else model.context(cond).detach()  # type: ignore[union-attr]
    log_det = model.transform(x, context)[1].detach()
    for i in range(2):
        own = None if context is None else context[i : i + 1]

        def latents(flat: Tensor, own: Tensor | None = own) -> Tensor:
            z: Tensor = model.transform(flat.reshape(1, *model.data.shape), own)[0]
            return z.flatten()

        jacobian = torch.autograd.functional.jacobian(latents, x[i].flatten())
        sign, expected = torch.linalg.slogdet(jacobian)
        assert float(sign) != 0 and abs(float(expected)) > 1e-3
        assert float(log_det[i]) == pytest.approx(float(expected), abs=EXACT)


@pytest.mark.parametrize("case", FLOWS, ids=str)
def test_flow_density_is_the_base_times_the_determinant(case: Case) -> None:
    model, cond = moved(case), given(case, 4)
    x = examples(model, 4)
    z, log_det = model.transform(x, model.context(cond))
    base = {
        "normal": torch.distributions.Normal(0.0, 1.0).log_prob,
        "logistic": lambda z: torch.log(torch.sigmoid(z) * torch.sigmoid(-z)),
    }[model.base]
    expected = base(z).flatten(1).sum(1) + log_det
    assert torch.allclose(model.log_prob(x, cond), expected, atol=EXACT)


@pytest.mark.parametrize("case", PLANES, ids=str)
def test_flow_in_the_plane_integrates_to_one(case: Case) -> None:
    model, side = moved(case, 0.1), 400  # a density that so many cells resolve
    drawn = model.sample(4096, torch.Generator().manual_seed(0), given(case, 4096))
    low, high = drawn.amin(0), drawn.amax(0)
    reach = 0.5 * (high - low)  # twice the width of 4096 draws: what lies outside is far below the tolerance
    ends = zip((low - reach).tolist(), (high + reach).tolist(), strict=True)
    axes = [torch.linspace(a, b, side, dtype=torch.float64) for a, b in ends]
    cell = math.prod(float(axis[1] - axis[0]) for axis in axes)
    points = torch.cartesian_prod(*axes)
    cond = torch.full((len(points),), 1) if case.asked else None
    with torch.no_grad():
        mass = float(model.log_prob(points, cond).exp().sum()) * cell
    assert mass == pytest.approx(
        1.0, abs=1e-3
    )  # bent where activations and splines have their knots: an error of the cell's area


@pytest.mark.parametrize("case", FLOWS, ids=str)
def test_flow_samples_have_the_latents_of_the_base(case: Case) -> None:
    """With the laws above, which hold for every x, this makes the samples those of the density."""
    model, n = moved(case), 1024
    cond = given(case, n)
    z = model.encode(model.sample(n, torch.Generator().manual_seed(0), cond), cond).flatten()
    if model.base == "logistic":
        z = z.sigmoid().clamp(1e-12, 1 - 1e-12)  # uniform
    else:
        z = torch.special.ndtr(z)
    steps = (torch.arange(len(z), dtype=z.dtype) + 0.5) / len(z)
    distance = float((z.sort().values - steps).abs().max()) * math.sqrt(len(z))
    assert distance < 2.0  # Kolmogorov's statistic: beyond 2 by chance once in 1500


@pytest.mark.parametrize("case", FLOWS, ids=str)
def test_flow_temperature_multiplies_the_latents(case: Case) -> None:
    model, found = moved(case), {}
    cond = given(case, 8)
    for temperature in (1.0, 0.5, 1e-6):
        model.sampling = type(model.sampling)(temperature)
        found[temperature] = model.sample(8, torch.Generator().manual_seed(0), cond)
    assert near(model.encode(found[0.5], cond), 0.5 * model.encode(found[1.0], cond), case)
    centre = model.decode(torch.zeros(8, model.data.dims, dtype=torch.float64), cond)
    assert near(found[1e-6], centre, case, exact=1e-3)  # slopes far below 1000 times a spread of 1e-6


@pytest.mark.parametrize("case", FLOWS, ids=str)
def test_flow_counts_its_evaluations_for_every_sample(case: Case) -> None:
    model = moved(case)
    counts = []
    for n in (3, 3, 6):
        model.sample(n, torch.Generator().manual_seed(0), given(case, n))
        counts.append(model.evaluations)
    assert counts[0] >= 1
    if case.method not in ITERATED:  # an iteration stops when the slowest of its examples is done
        assert counts[0] == counts[1] == counts[2]


@pytest.mark.parametrize("case", [case for case in FLOWS if case.asked], ids=str)
def test_flow_follows_its_condition(case: Case) -> None:
    model, n = moved(case), 4
    x = examples(model, n)
    one, two = (model.log_prob(x, torch.full((n,), label)) for label in (0, 1))
    assert float((one - two).detach().abs().min()) > 1e-3
    z = torch.zeros(1, model.data.dims, dtype=torch.float64)
    # every coordinate is conditional, the first of an autoregressive order as well
    apart = model.decode(z, torch.tensor([0])) - model.decode(z, torch.tensor([1]))
    assert float(apart.abs().min()) > 1e-6
