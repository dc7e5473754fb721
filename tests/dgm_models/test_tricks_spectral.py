"""Spectral normalisation: the largest singular value, when it is iterated, and that copies and files keep it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dgm_models.nn.networks import Network
from dgm_models.nn.tricks import spectral
from dgm_models.training import checkpoint
from dgm_models.training.average import Average
from tests.laws.cases import differences

LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (3, 5)),
    "conv": (lambda: nn.Conv2d(2, 3, 4, 2, 1), (3, 2, 6, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(2, 3, 4, 2, 1), (3, 2, 4, 4)),
}


def made(kind: str, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """A normalised layer in float64, its weight before that, an input."""
    torch.manual_seed(seed)
    make, shape = LAYERS[kind]
    layer = make().double()
    before = layer.weight.detach().clone()
    return spectral(layer), before, torch.randn(shape, dtype=torch.float64)


def matrix(weight: Tensor, kind: str) -> Tensor:
    """[out channels, the rest]; a transposed convolution's weight has its inputs first."""
    return (weight.transpose(0, 1) if kind == "transposed" else weight).flatten(1)


@pytest.mark.parametrize("kind", LAYERS)
def test_spectral_norm_divides_by_the_largest_singular_value(kind: str) -> None:
    layer, before, x = made(kind)
    for _ in range(200):  # converges at the rate of the second singular value over the first, squared
        layer(x)
    layer.eval()
    sigma = torch.linalg.matrix_norm(matrix(before, kind), 2)
    assert torch.allclose(layer.weight, before / sigma, rtol=1e-8)
    assert float(torch.linalg.matrix_norm(matrix(layer.weight.detach(), kind), 2)) == pytest.approx(1.0, rel=1e-8)


@pytest.mark.parametrize("kind", LAYERS)
def test_spectral_norm_takes_one_power_iteration_a_forward_in_training_alone(kind: str) -> None:
    layer, before, x = made(kind)
    state = {name: value.clone() for name, value in layer.named_buffers()}
    (u,) = (value for name, value in state.items() if name.endswith("_u"))
    layer(x)
    now = dict(layer.named_buffers())
    (new_u,) = (value for name, value in now.items() if name.endswith("_u"))
    (new_v,) = (value for name, value in now.items() if name.endswith("_v"))
    w = matrix(before, kind)
    (v,) = (value for name, value in state.items() if name.endswith("_v"))
    expected_u = nn.functional.normalize(w @ v, dim=0)
    assert torch.allclose(new_u, expected_u) and not torch.equal(new_u, u)
    assert torch.allclose(new_v, nn.functional.normalize(w.T @ expected_u, dim=0))
    layer.eval()
    kept = {name: value.clone() for name, value in layer.named_buffers()}
    assert torch.equal(layer(x), layer(x))
    assert differences(kept, dict(layer.named_buffers())) == []


def test_spectral_norm_of_two_forwards_differentiates_both() -> None:
    layer, _, x = made("linear")
    (layer(x).square().sum() + layer(-x).square().sum()).backward()  # real and fake: u moves in between
    assert bool(layer.parametrizations.weight.original.grad.isfinite().all())


def network(seed: int = 0, name: str = "dcgan") -> nn.Module:
    torch.manual_seed(seed)
    kind = Network.choices()[name]
    sizes = {"channels": 4, "norm_down": "none"} if name != "mlp" else {"width": 8}
    return spectral(kind(**sizes).down((1, 8, 8), 1))


@pytest.mark.parametrize("name", ["mlp", "dcgan", "residual"])
def test_spectral_norm_reaches_every_layer_of_a_network(name: str) -> None:
    critic = network(name=name)
    layers = [part for part in critic.modules() if isinstance(part, (nn.Linear, nn.Conv2d))]
    names = [name for name, _ in critic.named_buffers()]
    assert sum(name.endswith("weight.0._u") for name in names) == len(layers) > 1


def test_spectral_norm_applied_twice_is_applied_once() -> None:
    critic = network()
    before = dict(critic.named_parameters()).keys()
    assert dict(spectral(critic).named_parameters()).keys() == before


def test_spectral_norm_is_kept_by_an_average() -> None:
    critic, x = network(), torch.randn(4, 1, 8, 8)
    average = Average(critic, 0.5)
    optimizer = torch.optim.SGD(critic.parameters(), 0.5)
    start = [p.detach().clone() for p in critic.parameters()]
    critic(x).sum().backward()
    optimizer.step()
    average.update(critic)
    for first, now, mean in zip(start, critic.parameters(), average.module.parameters(), strict=True):
        assert torch.allclose(mean, (first + now) / 2)
        assert mean is not now
    kept, theirs = (dict(part.named_buffers()) for part in (average.module, critic))
    assert differences(kept, theirs) == [] and kept
    still = average.module(x)
    critic(x)
    assert torch.equal(average.module(x), still)  # its own buffers, and no iteration in eval mode


def test_spectral_norm_is_kept_by_a_checkpoint(tmp_path: Path) -> None:
    critic, x = network(), torch.randn(4, 1, 8, 8)
    critic(x)
    checkpoint.write(tmp_path / "kept", {"critic": critic.state_dict()}, {})
    again = network(seed=1)
    again.load_state_dict(checkpoint.read_tensors(tmp_path / "kept", "critic"))
    assert differences(critic.state_dict(), again.state_dict()) == []
    assert torch.equal(critic(x), again(x))


def test_spectral_norm_without_a_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="no Linear or convolution"):
        spectral(nn.Sequential(nn.ReLU()))
