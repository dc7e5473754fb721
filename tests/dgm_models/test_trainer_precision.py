"""The switches of the forward pass: bfloat16 and torch.compile."""

from __future__ import annotations

import os

import pytest
import torch

from dgm_models.method import build, fit
from dgm_models.protocols import DataSpec
from tests.laws import cases

DATA = DataSpec("vector", (6,), 2)


def trained(method: str = "vae/vae", **train):
    params = {"network": {"name": "mlp", "width": 16, "depth": 1}, "latent_dim": 3}
    built = build(method, DATA, **params)
    return fit(built, cases.rows(DATA, 32), **{"steps": 3, "batch_size": 16, "report_every": 1, **train})


@pytest.mark.parametrize("method", ["vae/vae", "gan/non_saturating", "gan/wgan_gp"])
def test_bfloat16_runs_near_float32_and_is_not_float32(method: str) -> None:
    full, half = trained(method), trained(method, precision="bfloat16")
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    name = next(name for name in full.history[0][1] if name.endswith("loss"))
    one, two = full.history[0][1][name], half.history[0][1][name]
    assert one != two
    # 8 bits of mantissa are 0.4% a product; losses here are sums of terms near 1 nat
    assert two == pytest.approx(one, rel=0.03, abs=0.03)
    distance = cases.distance(cases.parameters(full), cases.parameters(half))
    assert 0 < distance <= 2 * 3 * 1e-3 * 1.01  # Adam moves a weight by at most about lr in each of 3 steps, either way


def test_compiled_loss_is_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced by Dynamo and differentiated by AOTAutograd; without the C++ back end, whose first use costs 40 s."""
    compiled = []

    def compile(function, **options):
        compiled.append(function)
        return original(function, backend="aot_eager", **options)

    original = torch.compile
    monkeypatch.setattr(torch, "compile", compile)
    eager, traced = trained(), trained(compile=True)
    assert len(compiled) == 1
    assert [m["loss"] for _, m in traced.history] == pytest.approx([m["loss"] for _, m in eager.history], rel=1e-5)
    # the same float32 kernels in another order of sums; Adam moves by lr = 1e-3 a step, so 1e-5 is 1% of a step
    assert cases.distance(cases.parameters(eager), cases.parameters(traced)) < 1e-5


@pytest.mark.skipif("DGM_INDUCTOR" not in os.environ, reason="the C++ back end takes about 40 s: set DGM_INDUCTOR=1")
def test_compiled_loss_of_the_cpp_back_end_is_the_loss() -> None:
    eager, fused = trained(), trained(compile=True)
    assert [m["loss"] for _, m in fused.history] == pytest.approx([m["loss"] for _, m in eager.history], rel=1e-5)


def test_compiled_losses_with_a_double_backward_are_refused() -> None:
    with pytest.raises(ValueError, match=r"train\.compile: WganGp differentiates a gradient"):
        trained("gan/wgan_gp", compile=True)


def test_threads_setting_holds_during_the_training_alone() -> None:
    seen = []
    before = torch.get_num_threads()
    built = build("vae/vae", DATA, network={"name": "mlp", "width": 8, "depth": 1}, latent_dim=2)
    fit(
        built, cases.rows(DATA, 8), steps=1, batch_size=4, threads=2,
        report=lambda step, metrics: seen.append(torch.get_num_threads()),
    )  # fmt: skip
    assert seen == [2] and torch.get_num_threads() == before
