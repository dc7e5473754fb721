"""MADE: what each output may depend on, and that it learns a distribution that can be counted."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dgm_models.autoregressive.made import ONE_HOT_LEVELS, Made
from dgm_models.method import build, fit
from dgm_models.protocols import DataSpec
from tests.laws import cases


def model(levels: int = 2, dims: int = 6, **params: object) -> Made:
    data = DataSpec("vector", (dims,), levels)
    defaults = {"width": 24, "depth": 2, "masks": 3, "random_order": True, "direct": True}
    return build("autoregressive/made", data, **{**defaults, **params}).model


def inputs(made: Made, x: Tensor) -> Tensor:
    """The network's float inputs [B, D, inputs]."""
    if made.network.inputs > 1:
        return torch.nn.functional.one_hot(x, made.levels).float()
    return (x * (2.0 / (made.levels - 1)) - 1.0)[..., None]


CONFIGURATIONS = [
    {"levels": 2}, {"levels": 5}, {"levels": 40}, {"levels": 2, "depth": 1, "direct": False},
    {"levels": 3, "random_order": False}, {"levels": 2, "dims": 1}, {"levels": 2, "dims": 2, "depth": 3},
]  # fmt: skip


def name(configuration: dict) -> str:
    return " ".join(f"{key}={value}" for key, value in configuration.items())


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=name)
def test_made_has_no_gradient_from_later_variables(configuration: dict) -> None:
    made = model(**configuration)
    dims = made.data.dims
    entered = inputs(made, torch.randint(made.levels, (1, dims)))
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


@pytest.mark.parametrize("configuration", CONFIGURATIONS[:3], ids=name)
def test_made_conditionals_keep_every_bit_when_later_values_change(configuration: dict) -> None:
    """The statement without gradients. NaN cannot be the probe: a mask multiplies, and 0 times NaN is NaN."""
    made = model(**configuration)
    x = torch.randint(made.levels, (4, made.data.dims), generator=torch.Generator().manual_seed(0))
    for mask in range(made.num_masks):
        place = made.network.order[mask]
        before = made.logits(x, mask)
        for d in range(made.data.dims):
            changed = x.clone()
            changed[:, d] = (changed[:, d] + 1) % made.levels
            after = made.logits(changed, mask)
            assert torch.equal(after[:, place <= place[d]], before[:, place <= place[d]])
            assert place[d] == made.data.dims - 1 or not torch.equal(after, before)


def test_made_twin_whose_output_sees_itself_is_caught() -> None:
    made = model(levels=2, masks=1, random_order=False)
    made.network.last.strict = False
    jacobian = torch.autograd.functional.jacobian(lambda v: made.network(v, 0)[0, :, 0], torch.zeros(1, 6))[:, 0]
    assert bool(jacobian.diagonal().any()) and not bool(jacobian.triu(1).any())
    total = float(made.log_prob(cases.every_state(made.data)).detach().double().exp().sum())
    assert abs(total - 1) > 1e-4  # a hundred tolerances of the law of the sum


@pytest.mark.parametrize("levels", [2, 3])
def test_made_ensemble_averages_probabilities(levels: int) -> None:
    made = model(levels=levels, dims=4)
    x = cases.every_state(made.data)
    with torch.no_grad():
        each = torch.stack([made.log_prob_of(x, mask).double().exp() for mask in range(3)])
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
    fit(method, x, steps=500, batch_size=len(x), optim={"lr": 0.02, "schedule": "cosine"}, report_every=500)
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


def test_made_reads_levels_as_one_hot_up_to_its_limit() -> None:
    assert model(levels=ONE_HOT_LEVELS, masks=1).network.inputs == ONE_HOT_LEVELS
    assert model(levels=ONE_HOT_LEVELS + 1, masks=1).network.inputs == 1
    assert model(levels=2, masks=1).network.outputs == 1


def test_made_walks_its_masks_in_training() -> None:
    method = build("autoregressive/made", DataSpec("vector", (3,), 2), width=8, masks=3)
    seen = []
    fit(
        method, torch.randint(2, (8, 3)).to(torch.uint8), steps=5, batch_size=4, report_every=1,
        report=lambda step, metrics: seen.append(int(method.model.mask)),
    )  # fmt: skip
    assert seen == [1, 2, 0, 1, 2]


@pytest.mark.parametrize("levels", [2, 5, 40])
@pytest.mark.parametrize("depth", [1, 2])
def test_made_cached_logits_equal_uncached(levels: int, depth: int) -> None:
    """Dimension by dimension, with the first layer's sums kept, the logits are those of the whole network."""
    data = DataSpec(kind="vector", shape=(7,), levels=levels)
    params = {"width": 20, "depth": depth, "masks": 2, "random_order": True, "direct": True}
    model = build("autoregressive/made", data, **params).model.double()
    network = model.network
    x = torch.randint(levels, (6, 7), generator=torch.Generator().manual_seed(0))
    for mask in range(2):
        whole = network(model.entered(x).double(), mask)  # [6, 7, outputs]
        entered, sums = torch.zeros(6, 7 * network.inputs).double(), network.start(6, mask)
        for d in network.order[mask].argsort().tolist():
            # float64: the sums are the same numbers added in another order
            torch.testing.assert_close(network.step(sums, d, entered, mask), whole[:, d], rtol=1e-12, atol=1e-12)
            new = model.entered(x[:, d : d + 1]).double()
            entered[:, d * network.inputs : (d + 1) * network.inputs] = new
            network.admit(sums, new, d, mask)
