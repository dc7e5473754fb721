"""What a sharded training refuses before it starts; what it computes is held by tests/laws/test_law_equality.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from dgm_models.codecs import Standardized
from dgm_models.method import build
from dgm_models.objective import Objective, Turn
from dgm_models.protocols import Batch, DataSpec, Model
from dgm_models.training.optim import Optims
from dgm_models.training.runtime import Runtime
from dgm_models.training.shard import shard
from dgm_models.training.source import ArraySource
from dgm_models.training.trainer import Train, Trainer
from tests.laws import cases

DATA = DataSpec("vector", (2,))
SMALL = {"name": "mlp", "width": 8, "depth": 1}


def trainer(name: str = "vae/vae", runtime: Runtime | None = None, **train) -> Trainer:
    method = build(name, DATA, network=SMALL, latent_dim=2)
    return cases.trainer(method, Train(**{"steps": 4, "batch_size": 8} | train), {}, runtime=runtime)


def test_shard_of_a_game_is_refused_with_the_key_and_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"cluster\.shard: GeneratorCritic has 2 players .* set it to false"):
        trainer("gan/wgan_gp", Runtime(shard=True))


def test_shard_of_weights_that_come_from_data_is_refused() -> None:
    class FromData(Objective):
        def turns(self) -> list[Turn]:
            return []

        def initialize(self, model: Model, batch: Batch) -> None:
            pass

    with pytest.raises(ValueError, match=r"cluster\.shard: FromData computes initial weights from data"):
        Trainer(
            Model(DATA, Standardized(DATA)), FromData(), ArraySource(torch.zeros(8, 2), DATA), Train(), Optims(), 0,
            Runtime(shard=True),
        )  # fmt: skip


def test_shard_of_a_scalar_parameter_is_refused_by_name() -> None:
    model = nn.Module()
    model.scale = nn.Parameter(torch.zeros(()))
    with pytest.raises(ValueError, match=r"cluster\.shard: parameter scale is a scalar"):
        shard(model, Runtime())


def test_shard_of_a_single_worker_is_the_training() -> None:
    found = []
    for runtime in (Runtime(), Runtime(shard=True)):
        found.append(trainer(runtime=runtime))
        found[-1].run()
    assert cases.differences(*map(cases.state_of, found)) == []


def test_snapshot_is_a_copy_that_later_steps_do_not_change(tmp_path: Path) -> None:
    running, twin = trainer(average=0.9), trainer(average=0.9)
    for each in (running, twin):
        each.step()
    snapshot = running.snapshot()
    at_save = cases.state_of(running)
    running.run()
    assert cases.differences(at_save, cases.state_of(running))
    snapshot.write(tmp_path / "late")
    twin.load(tmp_path / "late")
    assert cases.differences(at_save, cases.state_of(twin)) == []


def test_snapshot_of_another_rank_holds_and_writes_nothing(tmp_path: Path) -> None:
    other = trainer(runtime=Runtime(rank=1, world=2))
    snapshot = other.snapshot()
    assert not snapshot.tensors and not snapshot.state
    snapshot.write(tmp_path / "none")
    assert list(tmp_path.iterdir()) == []


def test_final_state_is_the_final_weights() -> None:
    running = trainer(average=0.9)
    running.run()
    state = running.final_state()
    expected = running.average.module.state_dict()
    assert cases.differences(state, dict(expected)) == []
    next(iter(state.values())).fill_(0)  # a copy
    assert cases.differences(state, dict(expected))
