"""Learning rates, decay groups and clipping."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from dgm_models.construct import ConfigError, construct
from dgm_models.method import build, fit, read_optims
from dgm_models.protocols import DataSpec
from dgm_models.training.optim import Optim

DATA = DataSpec("vector", (2,))


def test_optim_warms_up_linearly_to_the_peak() -> None:
    assert [Optim(warmup=4).factor(step, 10) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(("schedule", "half"), [("cosine", 0.5), ("linear", 0.5), ("constant", 1.0)])
def test_optim_schedules_fall_after_the_warm_up(schedule: str, half: float) -> None:
    optim = Optim(schedule=schedule, warmup=10)
    factors = [optim.factor(step, 110) for step in range(110)]
    assert factors[9] == 1.0
    assert factors[10] == 1.0
    assert factors[60] == pytest.approx(half, abs=1e-12)  # float64
    assert all(a >= b for a, b in pairwise(factors[10:]))
    assert optim.factor(110, 110) == (1.0 if schedule == "constant" else pytest.approx(0.0, abs=1e-12))
    assert optim.factor(500, 110) == optim.factor(110, 110)


def test_optim_decays_matrices_and_no_vectors() -> None:
    module = nn.Sequential(nn.Conv1d(2, 3, 4), nn.BatchNorm1d(3), nn.Linear(3, 2))
    groups = Optim(name="adamw", weight_decay=0.3).build(module).param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert {p.ndim >= 2: decays[id(p)] for p in module.parameters()} == {True: 0.3, False: 0.0}
    assert len(decays) == len(list(module.parameters()))


def test_optim_clip_bounds_the_norm_of_the_whole_player() -> None:
    def moved(clip: float) -> float:
        method = build("vae/vae", DATA, network={"name": "mlp", "width": 8, "depth": 1}, latent_dim=2)
        before = torch.cat([p.detach().flatten() for p in method.model.parameters()])
        x = 10 * torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
        fit(method, x, steps=1, batch_size=16, optim={"name": "sgd", "lr": 1.0, "clip": clip})
        return float((torch.cat([p.detach().flatten() for p in method.model.parameters()]) - before).norm())

    assert moved(0.0) > 5.0
    assert moved(0.5) == pytest.approx(0.5, rel=1e-4)  # clip_grads_with_norm_ divides by norm + 1e-6


def test_optims_of_a_player_start_from_the_common_settings() -> None:
    optims = read_optims({"lr": 0.5, "clip": 2.0, "critic": {"lr": 0.25}}, "optim")
    assert (optims.of("critic").lr, optims.of("critic").clip) == (0.25, 2.0)
    assert optims.of("generator") == Optim(lr=0.5, clip=2.0)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"lr": "1e-3"}, "optim.lr: '1e-3' is not a number (YAML reads 1e-3 as text"),
        ({"lr": 0.0}, "optim.lr: 0.0 is not a number above 0"),
        ({"lr": math.inf}, "optim.lr: inf is not"),
        ({"betas": [0.9, 1.5]}, "optim.betas[1]: 1.5 is not a number at least 0 and at most 1"),
        ({"betas": [0.9]}, "optim.betas: [0.9] has 1 items, expected 2"),
        ({"schedule": "cosin"}, "optim.schedule: 'cosin' is not known; did you mean \"cosine\"?"),
        ({"critic": {"lrr": 1.0}}, 'optim.critic.lrr: unknown key; did you mean "lr"?'),
    ],
)
def test_optim_settings_that_cannot_be_used_name_their_path(section: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_optims(section, "optim")
    assert message in str(error.value)


def test_optim_builds_what_its_name_says() -> None:
    kinds = {
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "rmsprop": torch.optim.RMSprop,
        "sgd": torch.optim.SGD,
    }
    for name, kind in kinds.items():
        optimizer = construct(Optim, {"name": name, "lr": 0.5}, "optim").build(nn.Linear(2, 2))
        assert type(optimizer) is kind
        assert {group["lr"] for group in optimizer.param_groups} == {0.5}
