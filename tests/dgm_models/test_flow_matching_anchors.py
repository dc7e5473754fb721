"""Flow matching: the assignment is optimal, pairs stay within a label, and transported pairs make a straighter flow."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from dgm_models.diffusion.flow_matching import Transported
from dgm_models.method import Method, build, encoded, fit, resampled
from dgm_models.ops.transport import assignment, squared_distances
from dgm_models.protocols import DataSpec

EIGHT = DataSpec("vector", (2,), classes=8)


def eight(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points around eight places of a circle of radius 2, and their labels."""
    rng = torch.Generator().manual_seed(seed)
    label = torch.randint(8, (n,), generator=rng)
    angle = label * (math.pi / 4)
    centre = 2 * torch.stack([angle.cos(), angle.sin()], 1)
    return centre + 0.1 * torch.randn(n, 2, generator=rng), label


def made(pairing: str, **params) -> Method:
    return build("diffusion/flow_matching", EIGHT, pairing=pairing, network={"name": "mlp", "width": 64}, **params)


def prepared(method: Method, x: Tensor, labels: Tensor | None = None):
    batch = encoded(method.model, x, labels=labels)
    method.model.train()
    return batch, method.objective.prepare(method.model, batch)


@pytest.mark.parametrize("whole", [False, True])
def test_assignment_is_the_best_of_all_permutations(whole: bool) -> None:
    rng, n = torch.Generator().manual_seed(0), 6
    permutations = torch.tensor(list(itertools.permutations(range(n))))
    for _ in range(40):
        cost = torch.rand(n, n, generator=rng, dtype=torch.float64)
        cost = (3 * cost).floor() if whole else cost - 0.5  # with ties; of both signs
        found = assignment(cost)
        assert sorted(found.tolist()) == list(range(n))
        best = float(cost[torch.arange(n), permutations].sum(1).min())
        assert float(cost[torch.arange(n), found].sum()) == pytest.approx(best, abs=1e-12)


def test_assignment_on_a_line_keeps_the_order() -> None:
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 1, generator=rng), torch.randn(200, 1, generator=rng)
    found = assignment(squared_distances(x, y))
    assert torch.equal(y[found][x[:, 0].argsort()], y.sort(0).values)


def test_transport_pairs_are_those_of_least_cost_with_the_same_noise() -> None:
    method = made("transport")
    batch, after = prepared(method, eight(64)[0])
    eps, paired = batch.normal("noise", (2,)), after.extra["noise"]
    assert sorted(map(tuple, eps.tolist())) == sorted(map(tuple, paired.tolist()))
    cost = squared_distances(batch.x, eps)
    assert float((batch.x - paired).square().sum()) == pytest.approx(
        float(cost[torch.arange(64), assignment(cost)].sum()), rel=1e-5
    )
    assert float((batch.x - paired).square().sum()) < 0.7 * float((batch.x - eps).square().sum())
    x, noise = method.objective.pair(method.model, after)
    assert torch.equal(x, batch.x) and torch.equal(noise, paired)


def test_transport_of_data_with_labels_leaves_each_label_its_own_noise() -> None:
    x, label = eight(96)
    batch, after = prepared(made("transport", cond={"name": "label"}), x, label)
    eps, paired = batch.normal("noise", (2,)), after.extra["noise"]
    for i in range(8):
        mine = label == i
        assert sorted(map(tuple, eps[mine].tolist())) == sorted(map(tuple, paired[mine].tolist()))
        cost = squared_distances(batch.x[mine], eps[mine])
        best = float(cost[torch.arange(len(cost)), assignment(cost)].sum())
        assert float((batch.x[mine] - paired[mine]).square().sum()) == pytest.approx(best, rel=1e-5)
    _, mixed = prepared(made("transport"), x, label)  # labels that the model was not built for
    assert not torch.equal(mixed.extra["noise"], paired)


def test_transport_with_a_condition_of_every_example_s_own_is_refused() -> None:
    with pytest.raises(ValueError, match="pairing: transport makes pairs among data of one condition, and with edges"):
        build(
            "diffusion/flow_matching", DataSpec("image", (1, 4, 4), 5), pairing="transport", cond={"name": "edges"},
            network={"name": "mlp", "width": 8},
        )  # fmt: skip


def test_transport_makes_a_straighter_flow() -> None:
    """Two steps of Heun are nearer to 32 of them: by a factor of 5, measured over two seeds."""
    x, _ = eight(4000)
    apart = {}
    for pairing in ("independent", "transport"):
        method = made(pairing)
        assert isinstance(method.objective, Transported) == (pairing == "transport")
        fit(method, x, steps=300, batch_size=64, average=0.98, optim={"lr": 1e-2, "schedule": "cosine"})
        two, many = (
            resampled(method, {"steps": steps}).model.sample(1000, torch.Generator().manual_seed(0))
            for steps in (2, 32)
        )
        apart[pairing] = float((two - many).square().sum(1).mean().sqrt())
        centres = 2 * torch.stack(
            [torch.tensor([math.cos(i * math.pi / 4), math.sin(i * math.pi / 4)]) for i in range(8)]
        )
        near = (torch.cdist(many.float(), centres).min(1).values < 0.5).float().mean()
        assert float(near) > 0.4  # a straight flow to nowhere would not count; of noise it is 0.14
    assert apart["transport"] < 0.5 * apart["independent"]
