"""The fake run: memory is arithmetic, sharding divides it, and every registered method can be planned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dgm_models.codecs import continuous
from dgm_models.method import Method
from dgm_models.objective import Loss, Objective, Turn
from dgm_models.protocols import Batch, DataSpec, Model
from pipelines.params import Run, parse_run
from pipelines.plan import dry
from pipelines.plan.cost import traffic
from pipelines.plan.dry import Dry, run_dry
from pipelines.plan.ledger import Ledger
from tests.laws.cases import FIRST, Case, made, small

WIDTH = 512
NUMBERS = WIDTH * WIDTH  # of the toy's one matrix
UNDIVIDED = (
    "vae/gaussian_mixture", "vae/ppca", "flows/i_resnet", "flows/glow", "diffusion/flow_matching",
    "energy/exponential_family",
)  # fmt: skip


def run_of(method: dict[str, Any], batch_size: int = 64, **train: Any) -> Run:
    settings = {"batch_size": batch_size, "average": 0.9, **train}
    return parse_run("toy", {"dataset": "toy", "method": method, "train": settings}, "runs.toy", ["toy"])


class Matrix(Model):
    def __init__(self, data: DataSpec) -> None:
        super().__init__(data, continuous(data))
        self.weight = nn.Parameter(torch.zeros(WIDTH, WIDTH))


class Energy(Objective):
    def __init__(self, forwards: int = 1) -> None:
        super().__init__()
        self.forwards = forwards

    def turns(self) -> tuple[Turn, ...]:
        return (Turn("model", self.loss),)

    def loss(self, model: Matrix, batch: Batch) -> Loss:
        x = batch.x
        for _ in range(self.forwards):
            x = (x @ model.weight).exp()  # keeps its result for the backward pass; the product keeps its input
        return Loss(x.sum())


def toy(monkeypatch: pytest.MonkeyPatch, batch_size: int, forwards: int = 1) -> Dry:
    data = DataSpec("vector", (WIDTH,))
    monkeypatch.setattr(dry, "build_method", lambda run, spec: Method("toy", spec, {}, Matrix(spec), Energy(forwards)))
    return run_dry(run_of({"name": "vae/vae"}, batch_size), data)


def test_plan_memory_of_one_matrix_is_its_size_once_for_every_role(monkeypatch: pytest.MonkeyPatch) -> None:
    found = toy(monkeypatch, batch_size=1)
    size = 4 * NUMBERS
    assert found.peak["parameters"] == size
    assert found.peak["gradients"] == size
    assert found.peak["optimizer"] == 2 * size + 4  # Adam's two moments and its step
    assert found.peak["averages"] == size + 8  # and the number of its updates
    assert found.parameters == {"model": NUMBERS}
    assert found.weight_bytes == size
    assert found.state_bytes == 4 * size + 4 + 8


def test_plan_memory_of_activations_is_what_the_backward_pass_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 4096  # a [rows, WIDTH] tensor is larger than all that belongs to the matrix
    three, five = (toy(monkeypatch, rows, forwards).peak["activations"] for forwards in (3, 5))
    assert five - three == 2 * rows * WIDTH * 4


def test_plan_flops_of_one_matrix_are_those_of_three_products(monkeypatch: pytest.MonkeyPatch) -> None:
    found = toy(monkeypatch, batch_size=8, forwards=2)
    # forward twice, the weight's gradient twice, and the input's gradient of the second product
    assert found.flops == 5 * 2 * 8 * NUMBERS


@pytest.fixture(scope="module")
def divisible() -> tuple[Run, DataSpec]:
    """Every parameter's first axis is a multiple of 64."""
    run = run_of({"name": "vae/vae", "latent_dim": 32}, batch_size=128)
    run.arguments["network"] = {"name": "mlp", "width": 128, "depth": 1}
    return run, DataSpec("vector", (64,), 2)


def test_plan_sharding_over_64_divides_what_belongs_to_parameters(divisible: tuple[Run, DataSpec]) -> None:
    run, spec = divisible
    whole, sharded = run_dry(run, spec, 64), run_dry(run, spec, 64, shard=True)
    numbers = whole.parameters["model"]
    tensors = 8  # two layers with weight and bias in the encoder and in the decoder
    assert whole.peak["parameters"] == 4 * numbers
    assert sharded.peak["parameters"] == 4 * numbers // 64
    assert sharded.peak["averages"] == 4 * numbers // 64 + 8
    assert sharded.parameters == whole.parameters  # the whole model is counted
    assert sharded.state_bytes == whole.state_bytes == 16 * numbers + 4 * tensors + 8
    gathered = sum(size for name, size in sharded.steps[0][1].collectives if name == "all_gather")
    assert gathered >= 4 * numbers


def test_plan_sharding_holds_no_tensor_that_no_rank_holds() -> None:
    # a width that no other test has: DTensor asks for the shape of a whole result once, on a whole fake tensor
    run = run_of({"name": "vae/vae", "latent_dim": 8}, batch_size=64)
    run.arguments["network"] = {"name": "mlp", "width": 448, "depth": 4}
    found = run_dry(run, DataSpec("vector", (64,), 2), 64, shard=True, foreach=True)
    # a block of half of the parameters is gathered: its bucket, itself, and its gradients
    assert sum(found.peak.values()) < 2 * 4 * found.parameters["model"]
    assert found.peak["communication"] > found.peak["temporary"]


def test_plan_traffic_of_replicas_is_the_ring_s(divisible: tuple[Run, DataSpec]) -> None:
    run, spec = divisible
    found = run_dry(run, spec, 64)
    sent = found.steps[0][1]
    gradients = 4 * found.parameters["model"]
    assert {name for name, _ in sent.collectives} == {"all_reduce"}
    total = sum(size * times for (_, size), times in sent.collectives.items())
    assert gradients <= total <= gradients + 4 * 64  # and some scalars
    assert traffic(sent, 64) == pytest.approx(2 * 63 / 64 * total)
    assert run_dry(run, spec, 1).steps[0][1].collectives == {}


def test_plan_micro_batches_need_less_memory() -> None:
    spec = DataSpec("vector", (64,), 2)
    one, four = (run_dry(run_of({"name": "vae/vae"}, 4096, accumulate=k), spec).peak for k in (1, 4))
    assert four["activations"] <= one["activations"] / 3.9  # some of them are one number
    assert four["parameters"] == one["parameters"]


def test_plan_recomputed_activations_need_less_memory_and_more_flops() -> None:
    run = run_of({"name": "vae/vae"}, 4096)
    run.arguments["network"] = {"name": "mlp", "width": 256, "depth": 4}
    kept, again = (run_dry(run, DataSpec("vector", (64,), 2), checkpoint_activations=on) for on in (False, True))
    assert again.peak["activations"] < kept.peak["activations"]
    assert again.flops > kept.flops


def test_plan_turns_that_are_not_always_taken_count_by_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sometimes(Energy):
        def turns(self) -> tuple[Turn, ...]:
            return (Turn("model", self.loss), Turn("model", self.loss, every=4))

    monkeypatch.setattr(dry, "build_method", lambda run, spec: Method("toy", spec, {}, Matrix(spec), Sometimes()))
    found = run_dry(run_of({"name": "vae/vae"}, 8), DataSpec("vector", (WIDTH,)))
    assert sorted(share for share, _ in found.steps) == [0.25, 0.75]
    assert found.flops == 1.25 * 2 * 2 * 8 * NUMBERS


def test_plan_leaves_no_process_group_and_no_patch_behind() -> None:
    resize, move = torch.UntypedStorage.resize_, nn.Module.to
    run_dry(run_of({"name": "vae/vae"}), DataSpec("vector", (4,)), 8)
    assert not torch.distributed.is_initialized()
    assert (torch.UntypedStorage.resize_, nn.Module.to) == (resize, move)


def test_ledger_follows_births_deaths_and_resizes() -> None:
    ledger = Ledger()
    with FakeTensorMode(), ledger.following_resizes(), ledger:
        first = torch.zeros(1000)
        ledger.name("parameters", first)
        second = first + 1  # 8000 bytes
        del first
        third = second.view(10, 100) + 1  # a view is no storage: 8000 again, which is no new peak
        del second
        third.untyped_storage().resize_(0)
        ledger.name("buffers", torch.zeros(2500))  # alone: 10000
    assert ledger.peak()["buffers"] == 10000
    assert sum(ledger.peak().values()) == 10000
    before = ledger.peak(stop=3)
    assert (before["parameters"], before["temporary"]) == (4000, 4000)


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_plan_works_for_every_registered_method_on_any_number_of_workers(case: Case) -> None:
    section = {"name": case.method, **small(case.method)}
    run = run_of(section, batch_size=2048, accumulate=1)
    found = {world: run_dry(run, case.spec, world) for world in (1, 64, 1024)}
    for world, one in found.items():
        assert min(one.peak.values()) >= 0
        assert one.peak["parameters"] >= 4 * sum(one.parameters.values())
        # the work is divided; what is computed from summed statistics, from weights or from the whole batch is not
        assert one.flops * world >= found[1].flops * (1 - 1e-6)
        if case.method not in UNDIVIDED:
            assert one.flops * world == pytest.approx(found[1].flops)
        sent = sum(traffic(counts, world) for _, counts in one.steps)
        assert (sent > 0) == (world > 1)
    objective = made(case).objective
    whole = objective.whole or type(objective).initialize is not Objective.initialize
    if len(found[1].parameters) == 1 and not whole:
        assert run_dry(run, case.spec, 64, shard=True).peak["parameters"] < found[64].peak["parameters"]
    else:
        with pytest.raises(ValueError, match=r"cluster\.shard"):
            run_dry(run, case.spec, 64, shard=True)


def test_plan_bfloat16_halves_activations_of_products() -> None:
    spec = DataSpec("vector", (64,), 2)
    run = run_of({"name": "vae/vae"}, 4096)
    low = replace(run, train=replace(run.train, precision="bfloat16"))
    assert run_dry(low, spec).peak["activations"] < run_dry(run, spec).peak["activations"]
    assert any(is_low for _, _, is_low in run_dry(low, spec).steps[0][1].operations)
