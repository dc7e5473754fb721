"""Virtual batch normalisation: moments of the reference and one example, and what that example alone decides."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dgm_models.nn.networks import Dcgan
from dgm_models.nn.tricks import MinibatchStd, VirtualBatch, VirtualBatchNorm
from dgm_models.training import checkpoint

ROWS = 5


def layer(kind: type[nn.Module], channels: int = 3) -> VirtualBatchNorm:
    norm = kind(channels).double()
    nn.init.normal_(norm.weight, 1.0, 0.2)
    nn.init.normal_(norm.bias)
    return VirtualBatchNorm(norm, ROWS)


@pytest.mark.parametrize(("kind", "places"), [(nn.BatchNorm1d, ()), (nn.BatchNorm2d, (2, 4))])
def test_virtual_batch_norm_is_batch_norm_of_the_reference_and_one_example(kind: type, places: tuple) -> None:
    torch.manual_seed(0)
    part = layer(kind)
    h = torch.randn(ROWS + 4, 3, *places, dtype=torch.float64)
    h[ROWS:] += 2.0
    out = part(h)
    twin = kind(3).double()
    twin.load_state_dict({**twin.state_dict(), "weight": part.weight, "bias": part.bias})
    assert torch.allclose(out[:ROWS], twin(h[:ROWS]), rtol=1e-10)  # float64
    for i in range(ROWS, ROWS + 4):
        both = twin(torch.cat([h[:ROWS], h[i : i + 1]]))
        assert torch.allclose(out[i], both[-1], rtol=1e-10)


def dcgan(seed: int = 0) -> VirtualBatch:
    torch.manual_seed(seed)
    return VirtualBatch(Dcgan(channels=2, stages=2).up(3, (1, 8, 8)), (3,), ROWS).double()


def test_virtual_batch_makes_an_output_depend_on_its_own_input() -> None:
    network, z = dcgan(), torch.randn(4, 3, dtype=torch.float64)
    z_grad = z.clone().requires_grad_()
    network(z_grad)[0].sum().backward()
    assert float(z_grad.grad[0].abs().sum()) > 0
    assert torch.equal(z_grad.grad[1:], torch.zeros(3, 3, dtype=torch.float64))
    order = torch.tensor([2, 0, 3, 1])
    assert torch.allclose(network(z[order]), network(z)[order], rtol=1e-9)
    assert torch.allclose(network(z[:1]), network(z)[:1], rtol=1e-9)  # nor on how many there are
    assert torch.equal(network.train()(z), network.eval()(z))


def test_virtual_batch_replaces_every_batch_norm_and_keeps_its_weights() -> None:
    torch.manual_seed(0)
    plain = Dcgan(channels=2, stages=2).up(3, (1, 8, 8))
    norms = [part for part in plain.modules() if isinstance(part, nn.BatchNorm2d)]
    network = VirtualBatch(plain, (3,), ROWS)
    virtual = [part for part in network.modules() if isinstance(part, VirtualBatchNorm)]
    assert len(virtual) == len(norms) == 2
    assert all(new.weight is old.weight and new.bias is old.bias for new, old in zip(virtual, norms, strict=True))
    assert not any(isinstance(part, nn.BatchNorm2d) for part in network.modules())


def test_virtual_batch_is_differentiable_through_the_reference() -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1)).double()
    network = VirtualBatch(body, (2,), 3).double()
    names = [name for name, _ in network.named_parameters()]

    def function(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(network, dict(zip(names, weights, strict=True)), (x,))

    x = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, *network.parameters()))
    assert torch.autograd.gradgradcheck(function, (x, *network.parameters()))


def test_virtual_batch_takes_its_reference_from_the_data() -> None:
    network, z = dcgan(), torch.randn(3, 3, dtype=torch.float64)
    before = network(z)
    network.fill(z)
    assert torch.equal(network.reference, z[[0, 1, 2, 0, 1]])  # fewer rows than the reference has
    assert not torch.allclose(network(z), before)
    network.fill(torch.arange(24.0, dtype=torch.float64).reshape(8, 3))
    assert torch.equal(network.reference, torch.arange(15.0, dtype=torch.float64).reshape(5, 3))


def test_virtual_batch_is_kept_by_a_checkpoint(tmp_path: Path) -> None:
    network, z = dcgan(), torch.randn(4, 3, dtype=torch.float64)
    network.fill(torch.randn(ROWS, 3, dtype=torch.float64))
    checkpoint.write(tmp_path / "kept", {"generator": network.state_dict()}, {})
    again = dcgan(seed=1)
    assert not torch.equal(again(z), network(z))
    again.load_state_dict(checkpoint.read_tensors(tmp_path / "kept", "generator"))
    assert torch.equal(again(z), network(z))


def test_virtual_batch_of_a_network_without_batch_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="no batch normalisation to replace"):
        VirtualBatch(nn.Sequential(nn.Linear(2, 2)), (2,), ROWS)


def test_virtual_batch_beside_minibatch_statistics_is_refused() -> None:
    with pytest.raises(ValueError, match="minibatch statistics"):
        VirtualBatch(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), MinibatchStd()), (2,), ROWS)
