"""Which parts of a model are blocks, and that recomputing them changes memory alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from dgm_models.method import Method, build
from dgm_models.protocols import DataSpec
from dgm_models.training.blocks import blocks, recompute
from dgm_models.training.runtime import Runtime
from dgm_models.training.trainer import Train, Trainer
from tests.laws import cases

IMAGE = DataSpec("image", (1, 8, 8), 5)
MLP = {"name": "mlp", "width": 32, "depth": 3}
METHODS = {
    "vae/vae": {"network": MLP, "latent_dim": 3},
    "gan/wgan_gp": {"network": {"name": "conv", "channels": 4, "stages": 2}, "latent_dim": 3},  # a double backward
    "autoregressive/made": {"width": 32, "depth": 2, "direct": True},
}


class Layer(nn.Module):
    """A block of a larger network, with dropout."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16) if norm else nn.GELU(), nn.Linear(16, 8))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.inner(x).tanh())


class Tower(nn.Module):
    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.layers = nn.ModuleList(Layer(norm) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x


class Model(nn.Module):
    """Called by the names of its methods."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.network = Tower(norm)
        self.lists = nn.ModuleDict({"head": nn.Sequential(nn.Sequential(nn.Linear(8, 4), nn.ReLU()), nn.Linear(4, 1))})

    def loss(self, x: Tensor) -> Tensor:
        return self.lists["head"](self.network(x)).square().sum()


def test_blocks_are_layers_of_lists_and_sequences_of_single_layers() -> None:
    assert list(blocks(Model())) == [*(f"network.layers.{i}" for i in range(3)), "lists.head.0"]
    found = {name: list(blocks(build(name, IMAGE, **params).model)) for name, params in METHODS.items()}
    assert found == {
        "vae/vae": ["encoder", "decoder"],
        "gan/wgan_gp": ["generator.body", "critic.body"],
        "autoregressive/made": ["network"],
    }


def kept_bytes(model: Model, x: Tensor) -> int:
    """The bytes that one loss keeps for its backward pass, the inputs of the blocks included; leaves its gradients."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor
        return tensor

    def enter(block: nn.Module, given: tuple[Tensor, ...]) -> None:
        keep(given[0])

    hooks = [block.register_forward_pre_hook(enter) for block in blocks(model).values()]
    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total = model.loss(x)
    for hook in hooks:
        hook.remove()
    total.backward()
    return sum(tensor.nbytes for tensor in kept.values())


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_recomputed_blocks_give_the_same_bits_from_fewer_bytes() -> None:
    torch.manual_seed(1)
    plain, x = Model(), torch.randn(64, 8)
    again = copy.deepcopy(plain)
    recompute(again)
    before, after = kept_bytes(plain, x), kept_bytes(again, x)
    assert after < before / 2
    assert len(gradients(plain)) == len(list(plain.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(gradients(plain), gradients(again), strict=True))
    assert list(again.state_dict()) == list(plain.state_dict())


def test_recomputed_blocks_with_running_statistics_count_a_batch_once() -> None:
    torch.manual_seed(1)
    model = Model(norm=True)
    recompute(model)
    model.loss(torch.randn(64, 8)).backward()
    assert {int(layer.inner[1].num_batches_tracked) for layer in model.network.layers} == {1}


def trained(name: str, runtime: Runtime) -> Trainer:
    method: Method = build(name, IMAGE, **METHODS[name])
    trainer = cases.trainer(method, Train(steps=3, batch_size=8, average=0.5, report_every=3), {}, runtime=runtime)
    trainer.run()
    return trainer


@pytest.mark.parametrize("name", METHODS)
def test_recomputed_training_is_the_training(name: str) -> None:
    plain, again = trained(name, Runtime()), trained(name, Runtime(checkpoint_activations=True))
    assert cases.differences(cases.state_of(plain), cases.state_of(again)) == []
