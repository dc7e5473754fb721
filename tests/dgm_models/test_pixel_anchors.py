"""Pixel models: what each output sees, that the cached sampler draws from the density, and the logistic mixture."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dgm_models.construct import ConfigError
from dgm_models.method import build, fit
from dgm_models.nn.masked_convolution import MaskedConv2d, Raster, View
from dgm_models.ops.likelihoods import Logistic, LogisticMixture
from dgm_models.protocols import DataSpec
from tests.laws import cases

KERNELS = {"first_kernel": 3, "kernel": 3}
MODELS: dict[str, tuple[str, dict]] = {
    "pixel_cnn": ("pixel_cnn", KERNELS),
    "gated_pixel_cnn": ("gated_pixel_cnn", KERNELS),
    "pixel_cnn_pp": ("pixel_cnn_pp", {"components": 2, "dropout": 0.0}),
    "row_lstm": ("pixel_rnn", {"form": "row_lstm", **KERNELS}),
    "diagonal_bilstm": ("pixel_rnn", {"form": "diagonal_bilstm", **KERNELS}),
}
GREY, COLOUR = DataSpec("image", (1, 3, 4), 2, classes=3), DataSpec("image", (2, 2, 3), 2, classes=3)
CODES = DataSpec("codes", (3, 4), 5, classes=3)


def model(name: str, data: DataSpec, blocks: int = 2, width: int = 6, factor: float = 3.0, **params: object) -> Raster:
    """In float64, its weights enlarged: far from uniform, and far from linear."""
    method, own = MODELS[name]
    found = build(f"autoregressive/{method}", data, width=width, blocks=blocks, **{**own, **params}).model.double()
    with torch.no_grad():
        for p in found.parameters():
            p.mul_(factor)
    return found.eval()


def values(data: DataSpec, n: int) -> Tensor:
    return cases.rows(data, n).long()


# ---- probabilities


@pytest.mark.parametrize("data", [GREY, COLOUR], ids=["grey", "colour"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_pixel_model_sums_to_one_over_all_images_of_twelve_bits(name: str, data: DataSpec) -> None:
    log_p = model(name, data).log_prob(cases.every_state(data))
    assert log_p.dtype == torch.float64 and len(log_p) == 4096
    assert float(log_p.exp().sum()) == pytest.approx(1.0, abs=1e-11)  # float64, 4096 terms
    assert float(log_p.std()) > 0.5


@torch.no_grad()
def test_pixel_model_twin_that_sees_its_own_pixel_does_not_sum_to_one() -> None:
    twin = model("pixel_cnn", GREY)
    first = twin.first
    assert isinstance(first, MaskedConv2d) and first.mask is not None
    first.mask[:, :, -1, first.reach.left] = True  # type B in the first layer
    total = float(twin.log_prob(cases.every_state(GREY)).exp().sum())
    assert abs(total - 1) > 1e-3


def chi_squared(counts: Tensor, p: Tensor) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom; cells of fewer than 5 expected draws are one cell."""
    n = counts.sum()
    common = p * n >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([p[common] * n, (p[~common].sum() * n)[None]])
    return float(((observed - expected) ** 2 / expected.clamp_min(1e-9)).sum()), len(observed) - 1


def improbable(free: int) -> float:
    """What chi-squared exceeds with a probability of about 1e-6 (Wilson and Hilferty's approximation)."""
    return free * (1 - 2 / (9 * free) + 4.753 * math.sqrt(2 / (9 * free))) ** 3


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_pixel_model_draws_from_its_density(name: str) -> None:
    data = DataSpec("image", (2, 2, 1), 3)
    drawing, n = model(name, data, blocks=1, width=4, factor=2.0).float(), 100_000
    p = drawing.log_prob(cases.every_state(data)).double().exp()
    drawn = drawing.sample(n, torch.Generator().manual_seed(0)).flatten(1)
    counts = torch.bincount((drawn * torch.tensor([27, 9, 3, 1])).sum(1), minlength=81).double()
    statistic, free = chi_squared(counts, p)
    assert free >= 20
    assert statistic < improbable(free)
    assert chi_squared(counts, p.roll(1))[0] > improbable(free)
    assert drawing.evaluations == len(drawing.places)


# ---- the cached sampler


@pytest.mark.parametrize("asked", [None, "label", "edges"])
@pytest.mark.parametrize("data", [DataSpec("image", (3, 4, 3), 4, classes=3), CODES], ids=["colour", "codes"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_pixel_model_cached_outputs_equal_uncached(name: str, data: DataSpec, asked: str | None) -> None:
    if asked == "edges" and data.kind == "codes":
        pytest.skip("edges are of images")
    drawing = model(name, data, cond={"name": asked} if asked else None)
    x = values(data, 3)
    cond = drawing.conditions(x, torch.arange(3), torch.arange(3))
    whole = drawing.conditionals(x, cond)
    places = len(drawing.places)
    for known in (0, places // 2 + 1):  # from the beginning, and after values that no step has seen
        state = drawing.start(3, cond)
        for place in range(places):
            if place >= known:
                # float64: the same products, summed in another order
                torch.testing.assert_close(drawing.step(state, place), whole[:, place], rtol=1e-11, atol=1e-11)
            drawing.admit(state, place, x.flatten(1)[:, drawing.places[place]])
    if asked:
        assert not torch.equal(drawing.conditionals(x, cond.roll(1, 0)), whole)


# ---- what an output sees


def sensitivity(seen: Raster, read: Callable[[Tensor], Tensor], draws: int) -> Tensor:
    """[*read's shape, features, H, W]: the largest |d read(outputs) / d entered value| over random entered values."""
    rng = torch.Generator().manual_seed(0)
    found = []
    for _ in range(draws):
        entered = torch.randn(1, len(seen.entries), *seen.size[1:], generator=rng, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(lambda e: read(seen.run(e, None, View())[0]), entered)
        found.append(jacobian.squeeze(-4).abs())
    return torch.stack(found).amax(0)


@pytest.mark.parametrize("name", MODELS)
def test_pixel_model_has_no_gradient_from_places_that_come_later(name: str) -> None:
    data = DataSpec("image", (3, 3, 3), 3)
    seen = model(name, data, blocks=1)
    channels, height, width = seen.size
    jacobian = sensitivity(seen, lambda outputs: outputs, 2)[:, :, :, :-1]  # without the plane of ones
    jacobian = jacobian.unflatten(0, (seen.channels, -1)).amax(1)  # [places of a pixel, H, W, C, H, W]
    after = jacobian.permute(1, 2, 0, 4, 5, 3).reshape(len(seen.places), height * width * channels)
    place = torch.arange(len(seen.places))
    value = torch.arange(after.shape[1]) // seen.places.shape[1]  # the place of each value, in the order of drawing
    assert bool((after[place[:, None] <= value] == 0).all())
    earlier = place[:, None] > value
    assert bool(((after > 0) & earlier).any(0)[: -seen.places.shape[1]].all())  # every value is of use


@pytest.mark.parametrize("name", ["gated_pixel_cnn", "pixel_cnn_pp"])
@torch.no_grad()
def test_pixel_model_of_shifts_never_touches_later_pixels(name: str) -> None:
    """NaN is the probe: 0 times NaN is NaN, so it shows a read that a mask would hide."""
    seen = model(name, DataSpec("image", (1, 4, 4), 3))
    entered = seen.entered(values(seen.data, 2)[:, :, :])
    whole = seen.run(entered, None, View())
    for pixel in range(16):
        hidden = entered.flatten(2).clone()
        hidden[:, :, pixel:] = math.nan
        found = seen.run(hidden.reshape(entered.shape), None, View())
        assert torch.equal(found.flatten(2)[:, :, :pixel], whole.flatten(2)[:, :, :pixel])


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_pixel_model_never_touches_rows_below(name: str) -> None:
    seen = model(name, DataSpec("image", (1, 4, 4), 3))
    entered = seen.entered(values(seen.data, 2))
    whole = seen.run(entered, None, View())
    for row in range(1, 4):
        hidden = entered.clone()
        hidden[:, :, row:] = math.nan
        assert torch.equal(seen.run(hidden, None, View())[:, :, :row], whole[:, :, :row])


def before(up: int, right: int) -> bool:
    """Whether the pixel `up` rows above and `right` columns to the right comes before."""
    return up > 0 or (up == 0 and right < 0)


REACH = 3  # of a first kernel of 3 and two layers of 3: one pixel to each side in each
FIELDS: dict[str, Callable[[int, int], bool]] = {
    # to the right it sees no further than up: the blind spot
    "pixel_cnn": lambda up, right: before(up, right) and up <= REACH and -REACH <= right <= up,
    "gated_pixel_cnn": lambda up, right: before(up, right) and up <= REACH and abs(right) <= REACH,
    # the states of all rows above, a column more to each side for each; in every row the input's kernels to the left
    "row_lstm": lambda up, right: before(up, right) and -REACH - up <= right <= up,
    "diagonal_bilstm": before,
    "pixel_cnn_pp": before,
}


@pytest.mark.parametrize("name", FIELDS)
def test_pixel_model_receptive_field_is_exact(name: str) -> None:
    size, row, column = 9, 5, 4
    seen = model(name, DataSpec("image", (1, size, size), 2), width=8, factor=1.5)
    found = sensitivity(seen, lambda outputs: outputs[:, row, column], 6)[:, 0].amax(0) > 0
    expected = [[FIELDS[name](row - i, j - column) for j in range(size)] for i in range(size)]
    assert found.tolist() == expected


def test_pixel_model_blind_spot_is_there_and_is_closed_by_two_stacks() -> None:
    blind = [(up, right) for up in range(4) for right in range(4) if before(up, right) and right > up > 0]
    assert all(FIELDS["gated_pixel_cnn"](*at) and not FIELDS["pixel_cnn"](*at) for at in blind) and len(blind) == 3


# ---- the parts


def mixture(
    levels: int, components: int, channels: int, n: int = 5, spread: float = 2.0
) -> tuple[LogisticMixture, Tensor]:
    """A mixture, and params [n, num_params, 1] of n pixels."""
    part = LogisticMixture(levels, components, channels)
    rng = torch.Generator().manual_seed(0)
    return part, torch.randn(n, part.num_params, 1, generator=rng, dtype=torch.float64) * spread


def table(part: LogisticMixture, params: Tensor) -> Tensor:
    """[n, levels^V] log-probabilities."""
    x = torch.cartesian_prod(*[torch.arange(part.levels)] * part.channels).reshape(-1, part.channels)
    each = params.repeat_interleave(len(x), 0)
    return part.log_prob(each, x.repeat(len(params), 1)).reshape(len(params), -1)


@pytest.mark.parametrize(("levels", "components", "channels"), [(4, 3, 2), (3, 2, 3), (2, 1, 4), (17, 10, 1)])
def test_logistic_mixture_sums_to_one_over_all_pixels(levels: int, components: int, channels: int) -> None:
    part, params = mixture(levels, components, channels)
    log_p = table(part, params)
    # float64: the cells' edges meet exactly but for the rounding of levels over scales
    assert float((log_p.exp().sum(1) - 1).abs().max()) < 1e-12
    assert part.num_params == components * (1 + 2 * channels + channels * (channels - 1) // 2)


def test_logistic_mixture_of_one_component_and_channel_is_the_logistic() -> None:
    part, params = mixture(17, 1, 1)
    x = torch.arange(5)[:, None]
    logistic = Logistic(17).log_prob(params[:, 1:].float(), x)  # that works in float32
    assert torch.allclose(part.log_prob(params, x).float(), logistic, rtol=1e-5)


def test_logistic_mixture_couples_a_channel_to_those_before_it() -> None:
    part, params = mixture(4, 1, 2, n=1)
    log_p = table(part, params).reshape(4, 4)
    conditional = log_p.log_softmax(1)
    assert float((conditional[0] - conditional[3]).abs().max()) > 0.1
    params[:, -1] = 0  # the coefficient
    conditional = table(part, params).reshape(4, 4).log_softmax(1)
    assert torch.allclose(conditional, conditional[:1].expand(4, -1), atol=1e-12)  # float64


def test_logistic_mixture_draws_from_its_density() -> None:
    part, params = mixture(4, 3, 2, n=1, spread=1.0)
    drawn = part.sample(params.expand(100_000, -1, -1), torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn[:, 0] * 4 + drawn[:, 1], minlength=16).double()
    p = table(part, params)[0].exp()
    statistic, free = chi_squared(counts, p)
    assert statistic < improbable(free)
    assert chi_squared(counts, p.reshape(4, 4).T.reshape(-1))[0] > improbable(free)  # the channels exchanged


def test_logistic_mixture_is_finite_at_the_ends_of_its_clamps() -> None:
    part = LogisticMixture(256, 2, 3)
    params = (torch.tensor([-30.0, 0.0, 30.0])[:, None, None] * torch.ones(1, part.num_params, 1)).requires_grad_(True)
    x = torch.tensor([0, 128, 255]).expand(3, 3)
    log_p = part.log_prob(params, x)
    assert bool(log_p.isfinite().all())
    log_p.sum().backward()
    assert bool(params.grad.isfinite().all())
    assert part.mode(params.detach()).tolist()[0] == [0, 0, 0]


def test_masked_convolution_deals_features_out_to_channels() -> None:
    conv = MaskedConv2d(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2]), "A")
    assert conv.mask is not None and conv.mask[:, :, 0, 0].int().tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0]]
    conv = MaskedConv2d(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2]), "B")
    assert conv.mask is not None and conv.mask[:, :, 0, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert [name for name, _ in conv.named_parameters()] == ["weight", "bias"] and "mask" not in conv.state_dict()


@torch.no_grad()
def test_pixel_cnn_pp_drops_features_in_training_alone() -> None:
    dropping = model("pixel_cnn_pp", GREY, dropout=0.5)
    x = values(GREY, 4)
    assert torch.equal(dropping.log_prob(x), dropping.log_prob(x))
    dropping.train()
    assert not torch.equal(dropping.log_prob(x), dropping.log_prob(x))


def test_gated_pixel_cnn_learns_the_counts_of_four_bits() -> None:
    data = DataSpec("image", (1, 2, 2), 2)
    counts = torch.randint(1, 20, (16,), generator=torch.Generator().manual_seed(0))
    states = cases.every_state(data)
    x = states.repeat_interleave(counts, 0).to(torch.uint8)
    learned = build("autoregressive/gated_pixel_cnn", data, width=16, blocks=1, **KERNELS)
    fit(learned, x, steps=120, batch_size=len(x), optim={"lr": 0.02, "schedule": "cosine"}, report_every=120)
    shares = counts.double() / counts.sum()
    with torch.no_grad():
        divergence = float((shares * (shares.log() - learned.model.log_prob(states).double())).sum())
    assert -1e-6 < divergence < 5e-3  # full batches: no noise; 120 steps do not reach 0
    bits = states.flatten(1).double()
    ones = shares @ bits
    independent = (bits * ones.log() + (1 - bits) * (1 - ones).log()).sum(1)
    assert float((shares * (shares.log() - independent)).sum()) > 0.03  # the bits are dependent


# ---- what is refused


@pytest.mark.parametrize(
    ("name", "data", "params", "message"),
    [
        ("pixel_cnn", DataSpec("codes", (4,), 5), {}, r"method: data\.shape: \(4,\); codes drawn by pixels are a grid"),
        ("pixel_cnn", GREY, {"kernel": 4}, "method: kernel: 4 is even, .*; use 5"),
        ("gated_pixel_cnn", GREY, {"first_kernel": 6}, "method: first_kernel: 6 is even, .*; use 7"),
        ("gated_pixel_cnn", GREY, {"first_kernel": 1}, "method.first_kernel: 1 is not a whole number at least 3"),
        ("row_lstm", DataSpec("image", (3, 2, 2), 2), {"width": 2}, "method: width: 2 features for 3 channels"),
    ],
)
def test_pixel_model_refuses_what_it_cannot_be_built_for(name: str, data: DataSpec, params: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model(name, data, **params)
