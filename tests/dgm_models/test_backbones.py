"""Backbones of noisy data: they begin at 0, learn with every parameter, and see of an example what it is asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dgm_models.conditions import Condition
from dgm_models.construct import ConfigError, convert
from dgm_models.method import Method, build, encoded
from dgm_models.nn.backbones import Backbone, Denoiser
from dgm_models.protocols import DataSpec
from tests.laws import cases

NETWORKS: dict[str, dict[str, Any]] = {
    "mlp": {"name": "mlp", "width": 16, "depth": 2},
    "unet": {"name": "unet", "channels": 8, "multipliers": [1, 2], "blocks": 1, "attention": [8], "head_dim": 4},
    "unet_scale_shift": {"name": "unet", "channels": 8, "multipliers": [1, 2], "blocks": 1, "scale_shift": True},
    "dit": {"name": "dit", "width": 12, "depth": 2, "heads": 2},
    "dit_learned": {"name": "dit", "width": 12, "depth": 1, "heads": 2, "patch": 4, "places": "learned"},
}
CONDITIONS = [None, {"name": "label"}, {"name": "caption"}, {"name": "masked"}]
DATA = DataSpec("image", (2, 8, 8), 5, classes=3, class_names=("small dot", "dot", "large square"))


def built(network: str, cond: dict[str, Any] | None, data: DataSpec = DATA) -> Method:
    return build("diffusion/ddpm", data, network=NETWORKS[network], cond=cond, drop=0.3)


def asked(method: Method, n: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """x_t, how noisy it is, and conditions."""
    batch = encoded(method.model, cases.rows(method.data, n), labels=torch.arange(n) % method.data.classes)
    return batch.x, torch.linspace(1, 999, n), method.model.given(batch)


def moved(network: torch.nn.Module) -> torch.nn.Module:
    """With weights at random where they begin at 0."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


@pytest.mark.parametrize("cond", CONDITIONS, ids=lambda cond: cond["name"] if cond else "nothing")
@pytest.mark.parametrize("network", NETWORKS)
def test_backbone_begins_at_zero_and_every_parameter_gets_a_gradient(network: str, cond: dict[str, Any] | None) -> None:
    method = built(network, cond)
    x, c, given = asked(method, 3)
    found = method.model.network(x, c, given)
    assert found.shape == (3, 1, *DATA.shape) and not found.any()
    seen = dict.fromkeys(dict(method.model.named_parameters()), False)

    def note(name: str, parameter: torch.nn.Parameter) -> None:
        seen[name] = seen[name] or bool(parameter.grad.any())

    for name, parameter in method.model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: note(name, p))
    # what begins at 0 hides what lies before it: the last layer, the last ones of the blocks, then all
    cases.trainer(method, cases.Train(steps=4, batch_size=12), {"lr": 0.02}).run()
    # a key's bias is added to all of a query's products alike, which the softmax does not see: no matrix may be left
    assert [name for name, known in seen.items() if not known and not name.endswith("bias")] == []


@pytest.mark.parametrize("cond", CONDITIONS, ids=lambda cond: cond["name"] if cond else "nothing")
@pytest.mark.parametrize("network", NETWORKS)
def test_backbone_sees_each_example_alone_and_no_condition_that_is_left_out(
    network: str, cond: dict[str, Any] | None
) -> None:
    method = built(network, cond)
    net = moved(method.model.network).double().eval()
    x, c, given = asked(method, 6)
    x, c = x.double(), c.double()
    keep = None if cond is None else torch.tensor([True, False] * 3)
    found = net(x, c, given, keep)
    some = net(x[2:4], c[2:4], None if given is None else given[2:4], None if keep is None else keep[2:4])
    assert torch.allclose(found[2:4], some, rtol=0, atol=1e-12)  # float64: sums over other rows would be of order 1
    assert not torch.allclose(found, net(x, c.flip(0), given, keep), rtol=0, atol=1e-6)  # how noisy it is matters
    if given is not None and keep is not None:
        apart = (net(x, c, given.roll(1, 0), keep) - found).abs().flatten(1).amax(1)
        assert (apart[~keep] == 0).all() and (apart[keep] > 1e-6).all()


@pytest.mark.parametrize("network", [name for name in NETWORKS if name != "mlp"])
def test_backbone_reads_tokens_in_their_order(network: str) -> None:
    method = built(network, {"name": "caption"})
    net = moved(method.model.network).double().eval()
    x, c, _ = asked(method, 2)
    words = torch.tensor([[1, 2], [2, 1]])
    table = net.embedding.table(words)
    assert torch.equal(table.mean(1)[0], table.mean(1)[1])  # their mean does not tell the order
    one, other = net(x[:1].double().expand(2, -1, -1, -1), c[:1].double().expand(2), words)
    assert (one - other).abs().max() > 1e-6


@pytest.mark.parametrize("network", NETWORKS)
def test_backbone_runs_in_bfloat16(network: str) -> None:
    method = built(network, {"name": "caption"})
    net = moved(method.model.network)
    x, c, given = asked(method, 4)
    exact = net(x, c, given)
    with torch.autocast("cpu", torch.bfloat16):
        rough = net(x, c, given)
        loss = method.objective.loss(
            method.model, encoded(method.model, cases.rows(DATA, 4), labels=torch.arange(4) % 3)
        )
    loss.total.backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in net.parameters())
    assert (rough - exact).abs().max() < 0.1 * exact.abs().max()  # eight bits a number, some ten layers


@pytest.mark.parametrize("network", ["unet", "dit"])
def test_backbone_is_one_graph_to_a_compiler(network: str) -> None:
    method = built(network, {"name": "caption"})
    net = moved(method.model.network)
    x, c, given = asked(method, 2)
    traced = torch.compile(net, backend="eager", fullgraph=True)  # raises where a graph would break
    assert torch.equal(traced(x, c, given), net(x, c, given))


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 7, 5), (1, 4, 4), (2, 8, 12)])
def test_unet_takes_odd_and_small_images(shape: tuple[int, int, int]) -> None:
    data = DataSpec("image", shape, 256)
    net = Denoiser(
        convert({"name": "unet", "channels": 4, "multipliers": [1, 1, 2, 2], "blocks": 1}, Backbone, "n"), data
    )
    assert moved(net)(torch.randn(2, *shape), torch.ones(2)).shape == (2, 1, *shape)


def test_unet_is_that_of_the_paper_in_its_number_of_parameters() -> None:
    # Ho et al. 2020, appendix B: 35.7 million on CIFAR-10
    paper = {
        "name": "unet",
        "channels": 128,
        "multipliers": [1, 2, 2, 2],
        "blocks": 2,
        "attention": [16],
        "head_dim": 512,
    }
    with torch.device("meta"):
        net = Denoiser(convert(paper, Backbone, "n"), DataSpec("image", (3, 32, 32), 256))
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(35.7e6, rel=0.002)


def test_dit_is_that_of_the_paper_in_its_number_of_parameters() -> None:
    # Peebles and Xie 2023, table 1: DiT-S has 33 million; 1000 classes and the learned variance of 4 channels
    paper = {"name": "dit", "width": 384, "depth": 12, "heads": 6, "patch": 2}
    data = DataSpec("image", (4, 32, 32), None, classes=1000)
    label = convert({"name": "label"}, Condition, "c")
    with torch.device("meta"):
        net = Denoiser(convert(paper, Backbone, "n"), data, 2, label, optional=True)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(33e6, rel=0.02)


def test_dit_tells_every_place_another_thing() -> None:
    net = convert(NETWORKS["dit"], Backbone, "n").build((1, 8, 6), (1, 8, 6))
    assert net.places.shape == (12, 12)
    assert torch.cdist(net.places, net.places).add(torch.eye(12)).min() > 0.1


@pytest.mark.parametrize("network", ["unet", "dit"])
def test_backbones_of_images_refuse_vectors(network: str) -> None:
    with pytest.raises(ConfigError, match=rf"{network} takes images \[C, H, W\], not \(2,\); use mlp"):
        built(network, None, DataSpec("vector", (2,)))


def test_backbones_name_what_does_not_fit() -> None:
    wrong = [
        ({"name": "unet", "channels": 4, "attention": [16]}, r"attention: 16 is the height of no stage.* 8, 4, 2"),
        ({"name": "unet", "multipliers": []}, "multipliers: empty"),
        ({"name": "unet", "channels": 9, "head_dim": 4}, "heads: 4 do not divide width 18"),
        ({"name": "dit", "patch": 3}, "patch: 3 does not divide 8 x 8; use one of 1, 2, 4, 8"),
        ({"name": "dit", "heads": 5}, "heads: 5 do not divide width 128"),
    ]
    for network, message in wrong:
        with pytest.raises(ConfigError, match=message):
            build("diffusion/ddpm", replace(DATA), network=network)
