"""MADE: what each output may depend on, and that it learns a distribution that can be counted."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from dgm_models.method import build, fit
from dgm_models.nn.masked import MaskedAutoregression
from dgm_models.nn.values import ONE_HOT_LEVELS
from dgm_models.protocols import DataSpec
from tests.laws import cases


def model(levels: int = 2, dims: int = 6, **params: object) -> MaskedAutoregression:
    data = DataSpec("vector", (dims,), levels)
    defaults = {"width": 24, "depth": 2, "masks": 3, "random_order": True, "direct": True}
    return build("autoregressive/made", data, **{**defaults, **params}).model


CONFIGURATIONS = [
    {"levels": 2}, {"levels": 5}, {"levels": 40}, {"levels": 2, "depth": 1, "direct": False},
    {"levels": 3, "random_order": False}, {"levels": 2, "dims": 1}, {"levels": 2, "dims": 2, "depth": 3},
    {"levels": 3, "mirrored": True}, {"levels": 2, "mirrored": True, "random_order": False, "dims": 1},
]  # fmt: skip


def name(configuration: dict) -> str:
    return " ".join(f"{key}={value}" for key, value in configuration.items())


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=name)
def test_made_has_no_gradient_from_later_variables(configuration: dict) -> None:
    made = model(**configuration)
    dims = made.data.dims
    entered = made.entered(torch.randint(made.data.levels, (1, dims))).reshape(1, dims, -1)
    for mask in range(made.num_masks):
        place = made.network.order[mask]
        jacobian = torch.autograd.functional.jacobian(lambda v, mask=mask: made.network(v.flatten(1), mask)[0], entered)
        sizes = jacobian[:, :, 0].abs().sum((1, 3))  # [D outputs, D inputs]
        earlier = place[:, None] > place[None]
        assert bool((sizes[~earlier] == 0).all())  # masked products are exactly zero
        assert dims == 1 or bool((sizes[earlier] > 0).any())


def test_made_with_direct_connections_sees_every_earlier_variable() -> None:
    made = model(levels=2, masks=1, direct=True)
    jacobian = torch.autograd.functional.jacobian(lambda v: made.network(v, 0)[0, :, 0], torch.zeros(1, 6))[:, 0]
    place = made.network.order[0]
    assert torch.equal(jacobian != 0, place[:, None] > place[None])


@pytest.mark.parametrize("random_order", [False, True])
def test_made_mirrored_pair_keeps_what_the_other_masks(random_order: bool) -> None:
    made = model(levels=3, mirrored=True, masks=4, random_order=random_order)
    for pair in (0, 2):
        one, other = made.network.masks(pair), made.network.masks(pair + 1)
        itself = torch.eye(6).repeat_interleave(3, 0).repeat_interleave(3, 1)  # no value is seen by its own output
        shared = made.network.hidden[pair, 0] == made.network.hidden[pair, 1][:, None]
        expected = [torch.ones(24, 18), 1 + shared.float(), torch.ones(18, 24), 1 - itself]
        for a, b, total in zip(one, other, expected, strict=True):
            assert torch.equal(a + b, total)
    assert not torch.equal(made.network.hidden[0], made.network.hidden[2])
    assert made.network.order[0].equal(made.network.order[2]) is not random_order


@pytest.mark.parametrize("configuration", CONFIGURATIONS[:3], ids=name)
def test_made_conditionals_keep_every_bit_when_later_values_change(configuration: dict) -> None:
    """The statement without gradients. NaN cannot be the probe: a mask multiplies, and 0 times NaN is NaN."""
    made = model(**configuration)
    x = torch.randint(made.data.levels, (4, made.data.dims), generator=torch.Generator().manual_seed(0))
    for mask in range(made.num_masks):
        place = made.network.order[mask]
        before = made.outputs(x, None, mask)
        for d in range(made.data.dims):
            changed = x.clone()
            changed[:, d] = (changed[:, d] + 1) % made.data.levels
            after = made.outputs(changed, None, mask)
            assert torch.equal(after[:, place <= place[d]], before[:, place <= place[d]])
            assert place[d] == made.data.dims - 1 or not torch.equal(after, before)


def test_made_twin_whose_output_sees_itself_is_caught() -> None:
    made = model(levels=2, masks=1, random_order=False)
    made.network.last.strict = False
    made.network.keep_masks()
    jacobian = torch.autograd.functional.jacobian(lambda v: made.network(v, 0)[0, :, 0], torch.zeros(1, 6))[:, 0]
    assert bool(jacobian.diagonal().any()) and not bool(jacobian.triu(1).any())
    total = float(made.log_prob(cases.every_state(made.data)).detach().double().exp().sum())
    assert abs(total - 1) > 1e-4  # a hundred tolerances of the law of the sum


def test_made_follows_the_mask_set_that_it_loads() -> None:
    one, other = (model(levels=2, masks=1, random_order=True, mask_seed=seed) for seed in (0, 1))
    x = cases.every_state(one.data)
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.log_prob(x), one.log_prob(x))


@pytest.mark.parametrize("levels", [2, 3])
def test_made_ensemble_averages_probabilities(levels: int) -> None:
    made = model(levels=levels, dims=4)
    x = cases.every_state(made.data)
    with torch.no_grad():
        each = torch.stack([made.log_prob_of(x, None, mask).double().exp() for mask in range(3)])
        assert torch.allclose(made.log_prob(x).double().exp(), each.mean(0), rtol=1e-5)  # float32
        assert float((each[0] - each[1]).abs().max()) > 1e-3  # the masks do differ


def test_made_learns_the_counts_of_four_bits() -> None:
    rng = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 40, (16,), generator=rng)
    counts[torch.tensor([3, 8, 13])] = 0  # some states never occur
    data = DataSpec("vector", (4,), 2)
    states = cases.every_state(data).to(torch.uint8)
    x = states.repeat_interleave(counts, 0)
    method = build("autoregressive/made", data, width=48, depth=1)
    fit(method, x, steps=800, batch_size=len(x), optim={"lr": 0.02, "schedule": "cosine"}, report_every=800)
    shares = counts.double() / counts.sum()
    with torch.no_grad():
        log_p = method.model.log_prob(states.long()).double()
    entropy = -float(torch.special.xlogy(shares, shares).sum())
    divergence = float((torch.special.xlogy(shares, shares) - shares * log_p).sum())
    assert float(log_p.exp().sum()) == pytest.approx(1.0, abs=1e-6)  # float32 log-probabilities
    # full batches: no noise; states that never occur have a probability that falls only as fast as logits grow
    assert 0 <= divergence < 3e-3
    assert method.history[-1][1]["loss"] > entropy - 1e-5  # no distribution can be charged less
    independent = [float(states[:, d].double() @ shares) for d in range(4)]
    baseline = sum(-p * math.log(p) - (1 - p) * math.log(1 - p) for p in independent) - entropy
    assert baseline > 20 * divergence  # the bits are dependent


@pytest.mark.parametrize("levels", [2, 3])
def test_made_begins_at_base_rates(levels: int) -> None:
    x = torch.randint(levels, (40, 2, 5), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    x[:, 0, 0] = 1  # a value that never changes
    method = build("autoregressive/made", DataSpec("image", (1, 2, 5), levels), width=8, base_rates=True)
    with torch.no_grad():
        for p in method.model.network.parameters():
            p.zero_()
    fit(method, x[:, None], steps=1, batch_size=40, optim={"lr": 1e-12}, report_every=1)
    counts = torch.stack([(x == level).sum(0).flatten() for level in range(levels)], 1) + 0.5
    states = torch.arange(levels)[:, None].expand(levels, 10).reshape(levels, 1, 2, 5)
    with torch.no_grad():
        found = method.model.log_prob(states)
    assert torch.allclose(found, (counts / counts.sum(1, keepdim=True)).log().sum(0), atol=1e-5)


def test_made_reads_levels_as_one_hot_up_to_its_limit() -> None:
    assert model(levels=ONE_HOT_LEVELS, masks=1).network.inputs == ONE_HOT_LEVELS
    assert model(levels=ONE_HOT_LEVELS + 1, masks=1).network.inputs == 1
    assert model(levels=2, masks=1).network.outputs == 1
    bits = torch.tensor([[0, 1, 0, 1, 1, 0]])
    assert torch.equal(model(masks=3, random_order=False).entered(bits), bits.float())
    assert torch.equal(model(masks=3, random_order=True).entered(bits), 2 * bits.float() - 1)


def test_made_walks_its_masks_in_training() -> None:
    method = build("autoregressive/made", DataSpec("vector", (3,), 2), width=8, masks=3)
    seen = []
    fit(
        method, torch.randint(2, (8, 3)).to(torch.uint8), steps=5, batch_size=4, report_every=1,
        report=lambda step, metrics: seen.append(int(method.model.mask)),
    )  # fmt: skip
    assert seen == [1, 2, 0, 1, 2]


@pytest.mark.parametrize("levels", [2, 5, 40])
@pytest.mark.parametrize("depth", [1, 3])
@torch.no_grad()
def test_made_cached_logits_equal_uncached_in_every_mask_set(levels: int, depth: int) -> None:
    made = model(levels=levels, dims=7, depth=depth).double()
    x = torch.randint(levels, (6, 7), generator=torch.Generator().manual_seed(0))
    seen = set()
    for mask in range(made.num_masks):
        with made.following(made.network.degrees(mask)):
            whole, state = made.conditionals(x, None), made.start(6, None)
            seen.add(tuple(made.places[:, 0].tolist()))
            for place, at in enumerate(made.places):
                # float64: the sums are the same numbers added in another order
                torch.testing.assert_close(made.step(state, place), whole[:, place], rtol=1e-12, atol=1e-12)
                made.admit(state, place, x[:, at])
    assert len(seen) == made.num_masks and tuple(made.places[:, 0].tolist()) in seen


def sharp(factor: float = 2.0, **params: object) -> MaskedAutoregression:
    made = model(**params).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(factor)
    return made


def shares(drawn: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    return (drawn[:, None] == states).all(2).double().mean(0)


@torch.no_grad()
def test_made_ensemble_of_one_order_completes_exactly() -> None:
    """A mask set is drawn by what it gives to the known values; sets drawn with equal chances would be wrong."""
    made, n = sharp(8.0, dims=5, width=8, depth=1, random_order=False, direct=False), 20_000
    one = torch.tensor([[0, 1, 0, 0, 0]])
    known = torch.tensor([True, True, True, False, False]).expand(n, -1)
    drawn = made.complete(one.expand(n, -1), known, torch.Generator().manual_seed(0))
    assert made.evaluations == 2 + made.num_masks
    states = cases.every_state(made.data)
    states = states[(states == one)[:, :3].all(1)]
    expected = made.log_prob(states).double().softmax(0)
    equal_chances = torch.stack([made.log_prob_of(states, None, m).softmax(0) for m in range(3)]).double().mean(0)
    error = 5 * (expected * (1 - expected) / n).sqrt()  # five standard errors
    assert bool(((shares(drawn, states) - expected).abs() < error).all())
    assert bool(((equal_chances - expected).abs() > 2 * error).any())
    with pytest.raises(ValueError, match=r"known: .* comes after one that"):
        made.complete(one, ~known[:1], torch.Generator())


@torch.no_grad()
def test_made_mirrored_pair_completes_from_either_end() -> None:
    made, n = sharp(dims=4, masks=2, mirrored=True, random_order=False), 20_000
    states = cases.every_state(made.data)
    for end, mask in ((slice(0, 2), 0), (slice(2, 4), 1)):
        known = torch.zeros(n, 4, dtype=torch.bool)
        known[:, end] = True
        one = torch.tensor([[1, 0, 0, 1]])
        drawn = made.complete(one.expand(n, -1), known, torch.Generator().manual_seed(0))
        possible = states[(states[:, end] == one[:, end]).all(1)]
        # of the set in which the known come first
        expected = made.log_prob_of(possible, None, mask).double().softmax(0)
        error = 5 * (expected * (1 - expected) / n).sqrt()
        assert bool(((shares(drawn, possible) - expected).abs() < error).all())
    with pytest.raises(ValueError, match=r"known: .* comes after one that"):
        made.complete(one, torch.tensor([[False, True, False, False]]), torch.Generator())


def test_made_of_random_orders_completes_whatever_is_known() -> None:
    """Six bits: three fair ones, each with a noisy copy. Given the copies, the originals follow."""
    rng = torch.Generator().manual_seed(0)
    bits = torch.rand(4000, 3, generator=rng) < 0.5
    x = torch.cat([bits, bits ^ (torch.rand(4000, 3, generator=rng) < 0.1)], 1).to(torch.uint8)
    method = build(
        "autoregressive/made", DataSpec("vector", (6,), 2), width=32, masks=100, random_order=True, direct=True
    )
    fit(method, x, steps=600, batch_size=200, optim={"lr": 0.02, "schedule": "cosine"}, report_every=600)
    given, rng = x[:500].long(), torch.Generator().manual_seed(0)
    for pattern in ([False] * 3 + [True] * 3, [False, True, False, True, False, True]):
        known, agreed = torch.tensor(pattern).expand(500, -1), []
        for _ in range(8):  # eight orders
            drawn = method.model.complete(given, known, rng)
            assert torch.equal(drawn[known], given[known])
            agreed.append((drawn[:, :3] == drawn[:, 3:]).double().mean(0))
        # 0.9 in truth; blind to what is known it would be 0.5. Trained weights are within some hundredths
        torch.testing.assert_close(torch.stack(agreed).mean(0), torch.full((3,), 0.9).double(), rtol=0, atol=0.06)


@torch.no_grad()
def test_made_with_the_known_first_keeps_them_first() -> None:
    made = model(dims=6, masks=4)
    known = torch.tensor([False, True, False, False, True, True])
    places = {tuple(made._beginning_with(known, torch.Generator().manual_seed(s)).order.tolist()) for s in range(20)}
    assert len(places) > 5  # drawn anew
    for order in map(torch.tensor, places):
        assert sorted(order.tolist()) == list(range(6)) and int(order[known].max()) == 2


@torch.no_grad()
def test_made_samples_do_not_depend_on_the_mask_in_training_use() -> None:
    made = sharp(dims=5)
    drawn = []
    for mask in range(2):
        made.choose(mask)
        drawn.append(made.sample(50, torch.Generator().manual_seed(0)))
        assert int(made.mask) == mask and made.followed is None
    assert torch.equal(*drawn) and made.evaluations == 5
    made.sampling = replace(made.sampling, temperature=1e-6)
    assert len(made.sample(200, torch.Generator().manual_seed(0)).unique(dim=0)) <= made.num_masks  # one mode a set
