"""NADE: the shared prefix sums and their backward pass against the formula, and what it and FVSBN can learn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dgm_models.autoregressive.nade import PrefixNetworks
from dgm_models.method import build, fit
from dgm_models.protocols import DataSpec
from tests.laws import cases


def naive(x: Tensor, start: Tensor, incoming: Tensor, outgoing: Tensor) -> Tensor:
    """The logits [P, B, O] with the sums of all places [P, B, H] in memory, and autograd's backward pass."""
    parts = x @ incoming
    before = parts.cumsum(0) - parts
    return (start + before).sigmoid() @ outgoing.mT


def given(places: int, inputs: int = 1, outputs: int = 1, rows: int = 3, width: int = 4) -> list[Tensor]:
    """x, start, W and V in float64, all with gradients."""
    rng = torch.Generator().manual_seed(0)
    shapes = [(places, rows, inputs), (rows, width), (places, inputs, width), (places, outputs, width)]
    return [torch.randn(*shape, generator=rng, dtype=torch.float64).requires_grad_() for shape in shapes]


SIZES = [(1, 1, 1), (2, 1, 1), (7, 1, 1), (9, 1, 1), (10, 2, 3)]  # whole and partial blocks, bits and one-hot levels


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_prefix_networks_equal_their_naive_twin(sizes: tuple[int, int, int]) -> None:
    values, weight = given(*sizes), torch.randn(3, sizes[2], dtype=torch.float64)
    outputs = [function(*values) for function in (PrefixNetworks.apply, naive)]
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)  # float64, sums in another order
    for one, two in zip(*(torch.autograd.grad((out * weight).sum(), values) for out in outputs), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("sizes", SIZES[2:4], ids=str)
def test_prefix_networks_have_the_gradient_of_finite_differences(sizes: tuple[int, int, int]) -> None:
    assert torch.autograd.gradcheck(PrefixNetworks.apply, given(*sizes))


def test_prefix_networks_twin_that_counts_a_value_in_is_caught() -> None:
    x, start, incoming, outgoing = given(7)
    inclusive = (start + (x @ incoming).cumsum(0)).sigmoid() @ outgoing.mT
    assert float((inclusive - PrefixNetworks.apply(x, start, incoming, outgoing)).detach().abs().max()) > 0.1


def test_prefix_networks_keep_the_sums_of_blocks_alone() -> None:
    places, rows, width, kept = 64, 5, 8, []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        PrefixNetworks.apply(*given(places, rows=rows, width=width)).sum()
    sums = [tensor for tensor in kept if tensor.shape[-2:] == (rows, width)]
    assert [tuple(tensor.shape) for tensor in sums] == [(8, rows, width)]  # sqrt(64) of 64


@pytest.mark.parametrize("order", ["raster", "random"])
def test_nade_is_the_formula_of_the_paper(order: str) -> None:
    model = build("autoregressive/nade", DataSpec("vector", (6,), 2), width=5, order=order, order_seed=3).model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(generator=torch.Generator().manual_seed(1))
    x = torch.randint(2, (4, 6), generator=torch.Generator().manual_seed(2))
    at = model.places[:, 0].tolist()
    assert sorted(at) == list(range(6)) and (at == list(range(6))) == (order == "raster")
    expected = torch.zeros(4, dtype=torch.float64)
    for b in range(4):
        for i, d in enumerate(at):
            a = model.hidden_bias + sum(x[b, at[j]] * model.incoming[j, 0] for j in range(i))
            p = (model.bias[i] + model.outgoing[i, 0] @ a.sigmoid()).sigmoid()
            expected[b] += (p if x[b, d] else 1 - p).log()
    torch.testing.assert_close(model.log_prob(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", ["raster", "random"])
def test_fvsbn_is_a_logistic_regression_on_the_values_before(order: str) -> None:
    model = build("autoregressive/fvsbn", DataSpec("vector", (6,), 2), order=order, order_seed=3).model.double()
    x = torch.randint(2, (4, 6), generator=torch.Generator().manual_seed(2))
    ordered = x[:, model.places[:, 0]].double()
    logits = ordered @ model.linear.weight.tril(-1).T + model.linear.bias
    expected = torch.distributions.Bernoulli(logits=logits).log_prob(ordered).sum(1)
    torch.testing.assert_close(model.log_prob(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["fvsbn", "nade"])
def test_method_learns_a_distribution_of_regressions(name: str) -> None:
    """Rows in the shares of a random FVSBN: within what both can express, beyond independent bits."""
    data = DataSpec("vector", (5,), 2)
    truth = build("autoregressive/fvsbn", data).model
    with torch.no_grad():
        truth.linear.weight.mul_(8.0)
        states = cases.every_state(data)
        counts = (truth.log_prob(states).exp() * 4000).round().long()
    x = states.repeat_interleave(counts, 0).to(torch.uint8)
    shares = counts.double() / counts.sum()
    method = build(f"autoregressive/{name}", data, **({"width": 16} if name == "nade" else {}))
    fit(method, x, steps=150, batch_size=len(x), optim={"lr": 0.1, "schedule": "cosine"}, report_every=150)
    with torch.no_grad():
        log_p = method.model.log_prob(states).double()
    divergence = float((torch.special.xlogy(shares, shares) - shares * log_p).sum())
    ones = shares @ states.double()
    independent = -float((torch.special.xlogy(ones, ones) + torch.special.xlogy(1 - ones, 1 - ones)).sum())
    entropy = -float(torch.special.xlogy(shares, shares).sum())
    assert -1e-6 < divergence < 5e-3  # counts are rounded; full batches, a rate that falls to 0
    assert independent - entropy > 20 * divergence
