"""Parts that read a whole batch: against naive twins, twice differentiable, and what a permutation does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dgm_models.nn.tricks import MinibatchDiscrimination, MinibatchStd, VirtualBatch, couples


def discrimination(in_dim: int = 4, kernels: int = 3, dim: int = 2) -> MinibatchDiscrimination:
    torch.manual_seed(0)
    part = MinibatchDiscrimination(in_dim, kernels, dim).double()
    nn.init.normal_(part.weight)  # distances of order one
    return part


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_minibatch_discrimination_is_the_paper_s_sum() -> None:
    part, f = discrimination(), drawn(5, 4)
    tensor = part.weight.detach().reshape(4, 3, 2)  # T: in_dim x kernels x dim
    out = part(f).detach()
    assert out.shape == (5, part.out_dim) == (5, 7)
    assert torch.equal(out[:, :4], f)
    for i in range(5):
        for b in range(3):
            rows = [torch.stack([f[n] @ tensor[:, b, c] for c in range(2)]) for n in range(5)]
            expected = sum(torch.exp(-(rows[i] - rows[j]).abs().sum()) for j in range(5))
            assert float(out[i, 4 + b]) == pytest.approx(float(expected), rel=1e-12)  # float64


def test_minibatch_discrimination_follows_a_permutation() -> None:
    part, f = discrimination(), drawn(6, 4)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.allclose(part(f[order]), part(f)[order], rtol=1e-12)


def test_minibatch_discrimination_sees_a_collapse() -> None:
    part = discrimination()
    same = part(drawn(1, 4).expand(6, 4))
    assert torch.equal(same[:, 4:], torch.full((6, 3), 6.0, dtype=torch.float64))  # every distance is 0
    assert bool((part(drawn(6, 4))[:, 4:] < 6).all())


def test_minibatch_discrimination_is_twice_differentiable() -> None:
    part, f = discrimination(), drawn(3, 4).requires_grad_()

    def function(f: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(part, {"weight": weight}, (f,))

    assert torch.autograd.gradcheck(function, (f, part.weight))
    assert torch.autograd.gradgradcheck(function, (f, part.weight))  # a gradient penalty needs it


def naive_std(x: Tensor, group: int) -> Tensor:
    """One number an example."""
    groups = max(1, len(x) // group)
    found = torch.zeros(len(x), dtype=x.dtype)
    for g in range(groups):
        members = [i for i in range(len(x)) if i % groups == g]
        found[members] = (x[members].var(0, correction=0) + 1e-8).sqrt().mean()
    return found


@pytest.mark.parametrize("rows", [1, 3, 4, 7, 8, 9, 12])
@pytest.mark.parametrize("shape", [(5,), (2, 3, 3)], ids=["vector", "image"])
def test_minibatch_std_is_that_of_the_groups(shape: tuple[int, ...], rows: int) -> None:
    x = drawn(rows, *shape)
    out = MinibatchStd(4)(x)
    assert out.shape == (rows, shape[0] + 1, *shape[1:])
    assert torch.equal(out[:, :-1], x)
    expected = naive_std(x, 4).reshape(-1, *[1] * (len(shape) - 1)).expand(rows, *shape[1:])
    assert torch.allclose(out[:, -1], expected, rtol=1e-10)  # float64; the groups' means are products with a matrix


def test_minibatch_std_groups_as_the_paper_s_code_does() -> None:
    x = drawn(12, 2, 3, 3)
    grouped = x.reshape(4, 3, 2, 3, 3)  # the example's group is its place modulo the number of groups
    expected = (grouped.var(0, correction=0) + 1e-8).sqrt().mean((1, 2, 3)).repeat(4)
    assert torch.allclose(MinibatchStd(4)(x)[:, 2, 0, 0], expected, rtol=1e-10)


def test_minibatch_std_follows_a_permutation_within_a_group() -> None:
    x = drawn(8, 3)
    order = torch.tensor([4, 1, 0, 3, 6, 5, 2, 7])  # even rows are one group, odd rows the other
    assert torch.allclose(MinibatchStd(4)(x[order]), MinibatchStd(4)(x)[order], rtol=1e-10)
    across = torch.tensor([1, 0, 2, 3, 4, 5, 6, 7])
    assert not torch.allclose(MinibatchStd(4)(x[across]), MinibatchStd(4)(x)[across])


def test_minibatch_std_is_twice_differentiable_and_finite_for_equal_examples() -> None:
    part = MinibatchStd(2)
    assert torch.autograd.gradcheck(part, (drawn(4, 3).requires_grad_(),))
    assert torch.autograd.gradgradcheck(part, (drawn(4, 3).requires_grad_(),))
    same = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    part(same).sum().backward()
    assert same.grad is not None and bool(same.grad.isfinite().all())


def test_minibatch_parts_are_restored_from_their_state() -> None:
    one, two = discrimination(), MinibatchDiscrimination(4, 3, 2).double()
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(drawn(5, 4)), two(drawn(5, 4)))
    assert MinibatchStd().state_dict() == {}


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (nn.BatchNorm1d(2), True),
        (nn.BatchNorm2d(2), True),
        (MinibatchStd(), True),
        (MinibatchDiscrimination(2, 2, 2), True),
        (nn.GroupNorm(1, 2), False),
        (nn.Linear(2, 2), False),
        (VirtualBatch(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), (2,), 4), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_couples_looks_into_every_module(part: nn.Module, expected: bool) -> None:
    assert couples(nn.Sequential(nn.Identity(), nn.ModuleList([nn.Sequential(part)]))) is expected
