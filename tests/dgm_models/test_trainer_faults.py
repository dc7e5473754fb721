"""What the trainer says when a training cannot go on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from dgm_models.method import build, fit
from dgm_models.objective import Loss, Objective, Turn
from dgm_models.protocols import Batch, DataSpec
from dgm_models.training.trainer import Train
from tests.laws import cases

DATA = DataSpec("vector", (2,))


def rows(n: int = 32) -> torch.Tensor:
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(0))


class Poisoned(Objective):
    """The generator's loss is not finite from step 2 on."""

    def __init__(self, inner: Objective, value: float) -> None:
        super().__init__()
        self.inner, self.value, self.steps = inner, value, 0

    def turns(self) -> Sequence[Turn]:
        critic, generator = self.inner.turns()

        def loss(model: object, batch: Batch) -> Loss:
            found = generator.loss(model, batch)
            return Loss(found.total * self.value) if self.steps >= 2 else found

        return critic, Turn("generator", loss)

    def advance(self, model: object, step: int) -> None:
        self.steps = step + 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradient_that_is_not_finite_names_player_and_step(value: float) -> None:
    method = build("gan/non_saturating", DATA, network={"name": "mlp", "width": 8, "depth": 1})
    method.objective = Poisoned(method.objective, value)
    trainer = cases.trainer(method, Train(steps=5, batch_size=8), {})
    with pytest.raises(FloatingPointError, match=r"step 2: the gradient of 'generator' is not finite .*optim\.lr"):
        trainer.run()
    assert trainer.step_number == 2
    assert all(bool(p.isfinite().all()) for p in method.model.parameters())  # the weights were not touched


def test_interrupted_turn_gives_the_other_players_their_gradients_back() -> None:
    method = build("gan/non_saturating", DATA, network={"name": "mlp", "width": 8, "depth": 1})
    method.objective = Poisoned(method.objective, float("nan"))
    with pytest.raises(FloatingPointError):
        fit(method, rows(), steps=5, batch_size=8)
    assert all(p.requires_grad for p in method.model.parameters())


def test_gradients_from_before_the_training_do_not_enter_it() -> None:
    def weights(stale: bool) -> dict[str, torch.Tensor]:
        method = build("vae/vae", DATA, network={"name": "mlp", "width": 8, "depth": 1}, latent_dim=2)
        for p in method.model.parameters():
            p.grad = torch.full_like(p, 100.0) if stale else None
        fit(method, rows(), steps=1, batch_size=8, optim={"name": "sgd"})
        return cases.parameters(method)

    assert cases.differences(weights(False), weights(True)) == []


def test_training_leaves_the_global_generator_and_threads_alone() -> None:
    torch.manual_seed(0)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    method = build("vae/vae", DATA, network={"name": "mlp", "width": 8, "depth": 1}, latent_dim=2)
    fit(method, rows(), steps=2, batch_size=8, threads=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_training_does_not_depend_on_the_global_generator() -> None:
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        method = build("gan/wgan_gp", DATA, network={"name": "mlp", "width": 8, "depth": 1})
        found.append(cases.parameters(fit(method, rows(), steps=2, batch_size=8)))
    assert cases.differences(*found) == []


def test_training_follows_its_seed() -> None:
    found = []
    for seed in (0, 1):
        method = build("vae/vae", DATA, network={"name": "mlp", "width": 8, "depth": 1}, latent_dim=2)
        found.append(cases.parameters(fit(method, rows(8), steps=1, batch_size=8, seed=seed)))
    assert cases.differences(*found) != []


def test_load_of_a_training_without_its_average_is_refused(tmp_path: Path) -> None:
    def trainer(average: float):
        method = build("vae/vae", DATA, network={"name": "mlp", "width": 8, "depth": 1}, latent_dim=2)
        return cases.trainer(method, Train(steps=1, batch_size=8, average=average), {})

    trainer(0.0).save(tmp_path / "run")
    with pytest.raises((OSError, ValueError)):
        trainer(0.9).load(tmp_path / "run")
