"""Laws of sum over count: micro-batches equal one batch, and two ranks equal one.

Stochastic gradient descent is linear in the gradient, so that rounding stays rounding; Adam divides by the
gradient's own size and would turn a rounding of 1e-9 into a step of `lr`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dgm_models.codecs import continuous
from dgm_models.method import Method
from dgm_models.objective import Loss, Objective, Turn
from dgm_models.protocols import Batch, DataSpec, Model
from dgm_models.training import reduce, shard
from dgm_models.training.optim import Optim, Optims
from dgm_models.training.runtime import Runtime
from dgm_models.training.source import ArraySource
from dgm_models.training.trainer import Train, Trainer
from tests.laws import cases
from tests.laws.cases import CASES, Case

STEPS, ROWS = 2, 7  # 7 rows are 3 + 2 + 2 micro-batches and 3 + 4 over two ranks: a mean of means is no mean
# sums of some 10 float32 terms in another order, over 2 steps: some units in the last place of numbers up to 4
TOLERANCE = 5e-6


def run(case: Case, runtime: Runtime | None = None, accumulate: int = 1, method: Method | None = None) -> Trainer:
    method = method or cases.made(case)
    settings = Train(steps=STEPS, batch_size=ROWS, accumulate=accumulate, average=0.5, report_every=STEPS)
    trainer = cases.trainer(method, settings, {"name": "sgd", "lr": 0.02, "clip": 10.0}, runtime=runtime)
    trainer.run()
    return trainer


def reported(trainer: Trainer) -> dict[str, float]:
    return trainer.history[-1][1]


def slug(case: Case) -> str:
    return str(case).replace("/", "_").replace(":", "_")


def tensors(state: dict) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def assert_one_training(one: dict, two: dict) -> None:
    assert cases.distance(tensors(one), tensors(two)) < TOLERANCE


# ---- micro-batches


ADDITIVE = [case for case in CASES if cases.made(case).objective.additive]
COUPLED = [case for case in CASES if case not in ADDITIVE]


@pytest.mark.parametrize("case", ADDITIVE, ids=str)
def test_micro_batches_equal_one_batch(case: Case) -> None:
    whole, parts = run(case), run(case, accumulate=3)
    assert_one_training(cases.state_of(whole), cases.state_of(parts))
    assert reported(parts) == pytest.approx(reported(whole), rel=1e-4, abs=1e-4)  # sums of losses up to 100 in float32


@pytest.mark.parametrize("case", COUPLED, ids=str)
def test_micro_batches_of_a_coupled_objective_are_refused(case: Case) -> None:
    with pytest.raises(ValueError, match=r"train\.accumulate: .* couples the examples of a batch"):
        run(case, accumulate=3)


@pytest.mark.parametrize("case", ADDITIVE, ids=str)
def test_micro_batches_twin_with_a_mean_of_means_is_caught(case: Case) -> None:
    def means(method: Method) -> Method:
        turns = method.objective.turns()

        def mean(loss):  # the mean over the micro-batch, counted as if it were one element
            return lambda model, batch: Loss(loss(model, batch).total / len(batch))

        method.objective.turns = lambda: [Turn(t.player, mean(t.loss), t.updates, t.every, t.fresh) for t in turns]
        method.objective.count = lambda batch: 1
        return method

    whole, parts = (run(case, accumulate=k, method=means(cases.made(case))) for k in (1, 3))
    difference = cases.distance(tensors(cases.state_of(whole)), tensors(cases.state_of(parts)))
    assert difference > 4 * TOLERANCE  # the mistake stands clear of the tolerance


# ---- ranks


def together(world: int, folder: Path) -> Path:
    """Runs `two_ranks.py` in `world` processes; what each of them reached is left in the folder."""
    script = Path(__file__).with_name("two_ranks.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    started = []
    for rank in range(world):  # errors go to files: a pipe that nobody reads would fill up and block
        with Path(folder, f"errors-{rank}").open("w") as errors:
            command = [sys.executable, str(script), str(rank), str(world), str(folder)]
            started.append(subprocess.Popen(command, env=environment, cwd=cases.ROOT, stderr=errors))
    try:
        codes = [process.wait(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert codes == [0] * world, "\n".join(Path(folder, f"errors-{rank}").read_text() for rank in range(world))
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What one process reaches in the long runs, and the folder with its checkpoints."""
    folder = tmp_path_factory.mktemp("alone")
    return long_runs(Runtime(), folder) | {"folder": folder}


@pytest.fixture(scope="module")
def pair(alone: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes, started once, after the one whose checkpoints they go on from."""
    folder = tmp_path_factory.mktemp("pair")
    Path(folder, "given").symlink_to(alone["folder"])
    return together(2, folder)


@pytest.fixture(scope="module")
def trio(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three processes, after the two whose checkpoints they go on from."""
    folder = tmp_path_factory.mktemp("trio")
    Path(folder, "given").symlink_to(pair)
    return together(3, folder)


def left(folder: Path, name: str) -> list[dict]:
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob(f"{name}-[0-9]"))]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_ranks_equal_one(case: Case, pair: Path) -> None:
    first, second = left(pair, slug(case))
    one = run(case)
    apart = cases.differences(first, second)
    if case.row.synchronised:
        assert apart == []  # the ranks hold the same bits, metrics included
        assert_one_training(cases.state_of(one), {k: v for k, v in first.items() if k != "metrics"})
        assert first["metrics"] == pytest.approx(reported(one), rel=1e-4, abs=1e-4)  # as for micro-batches
    else:  # gradients are reduced all the same; an exemption that is no longer needed is to be struck from the row
        learned = {f"model.{name}" for name, _ in one.model.named_parameters()}
        assert not learned & set(apart)
        assert cases.distance(tensors(cases.state_of(one)), tensors(first)) > TOLERANCE


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_ranks_that_saw_one_rank_s_rows_would_differ(case: Case) -> None:
    class Half(Runtime):
        """Takes its share of the rows and adds nothing of the other rank's."""

        def share(self, rows: int) -> tuple[int, int]:
            return 0, rows // 2

    half, one = run(case, Half()), run(case)
    assert cases.distance(tensors(cases.state_of(half)), tensors(cases.state_of(one))) > 4 * TOLERANCE


class Two(Model):
    """Two parameters of one player; the loss uses those whose numbers are in `own`."""

    def __init__(self, data: DataSpec) -> None:
        super().__init__(data, continuous(data))
        self.weights = nn.ParameterList([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))])


class Partial(Objective):
    def __init__(self, own: Sequence[int]) -> None:
        super().__init__()
        self.own = own

    def turns(self) -> Sequence[Turn]:
        return (Turn("model", self.loss),)

    def loss(self, model: Two, batch: Batch) -> Loss:
        return Loss(torch.stack([(model.weights[i] * batch.x).sum() for i in self.own]).sum())


class Coupled(Partial):
    """The variance within the batch: it couples the examples, and each rank sees its own share of them."""

    additive = False

    def loss(self, model: Two, batch: Batch) -> Loss:
        moved = batch.x @ model.weights[0]
        return Loss((moved - moved.mean()).square().sum() + sum(w.sum() for w in model.weights))


def coupled(runtime: Runtime | None = None) -> Tensor:
    """The weights after a step under a loss that is not synchronised."""
    data = DataSpec("vector", (2,))
    source = ArraySource(torch.arange(16.0).reshape(8, 2), data)
    settings = Train(steps=1, batch_size=8)
    trainer = Trainer(Two(data), Coupled((0,)), source, settings, Optims(Optim(name="sgd", lr=0.01)), 0, runtime)
    trainer.run()
    return trainer.model.weights[0].detach()


def disagreement(runtime: Runtime, own: Sequence[int], limit: int = 2**20) -> str:
    """The message of a step in which this rank's loss reaches the parameters in `own`, or "" when it went through."""
    data = DataSpec("vector", (2,))
    trainer = Trainer(
        Two(data), Partial(own), ArraySource(torch.ones(8, 2), data), Train(steps=1, batch_size=4), Optims(Optim()), 0,
        runtime,
    )  # fmt: skip
    before, reduce.BUCKET_BYTES = reduce.BUCKET_BYTES, limit
    try:
        trainer.run()
    except RuntimeError as error:
        return str(error)
    finally:
        reduce.BUCKET_BYTES = before
    return ""


def test_two_ranks_twin_whose_loss_couples_the_examples_is_caught(pair: Path) -> None:
    first, second = left(pair, "facts")
    assert torch.equal(first["coupled"], second["coupled"])
    assert float((first["coupled"] - coupled()).abs().max()) > 1000 * TOLERANCE


def test_two_ranks_gather_rows_of_different_number(pair: Path) -> None:
    for facts in left(pair, "facts"):
        assert torch.equal(facts["gathered"], torch.tensor([10.0, 11.0, 12.0]))


@pytest.mark.parametrize(
    ("how", "names"),
    [
        ("exchanged", ("weights.0", "weights.1")),
        ("unequal", ("weights.1",)),
        ("unequal in small buckets", ("weights.1",)),
    ],
)
def test_two_ranks_with_other_gradients_are_refused_by_name(how: str, names: tuple[str, ...], pair: Path) -> None:
    for facts in left(pair, "facts"):
        assert facts["disagree"] == ""
        assert "the ranks disagree which parameters of 'model' have gradients" in facts[how]
        assert all(name in facts[how] for name in names)


# ---- long runs: every number of ranks, both precisions, sharded or not, and on from each other's checkpoints

LONG, HALF = 20, 10
# trajectories part as roundings grow: measured after 20 steps, a few 1e-7 in float32 and 1e-15 in float64
FAR = {torch.float32: 1e-6, torch.float64: 1e-10}
LONG_CASES = [
    Case("vae/vae", "vector:real"), Case("gan/wgan_gp", "vector:real"), Case("autoregressive/made", "vector:discrete")
]  # fmt: skip
SHARDED = [case for case in LONG_CASES if case.method != "gan/wgan_gp"]  # models of one player


def long_trainer(case: Case, runtime: Runtime, dtype: torch.dtype = torch.float32) -> Trainer:
    """Everything that a sharded training must carry: an average, the best weights, micro-batches, clipping."""
    method = cases.made(case)
    single = len(method.model.players()) == 1
    settings = Train(
        steps=LONG, batch_size=12, accumulate=2, average=0.9, report_every=HALF,
        validate_every=4 if single else 0, keep="best" if single else "last",
    )  # fmt: skip
    # with this eps a step depends on the gradient's size: a mean in place of a sum, or one rank's share, would show
    optim = Optims(Optim(lr=0.02, eps=0.1, clip=1.0))
    method.model.to(dtype)
    sources = []
    for n in (24, 12):
        rows = cases.rows(case.spec, n)
        rows = rows.to(dtype) if rows.is_floating_point() else rows
        sources.append(ArraySource(rows, case.spec, seed=0 if n == 24 else None))
    if case.method == "autoregressive/made":  # it enters whole levels as float32
        method.model.network.register_forward_pre_hook(lambda module, given: (given[0].to(dtype), *given[1:]))
    return Trainer(
        method.model, method.objective, sources[0], settings, optim, 0, runtime, sources[1] if single else None
    )


def long_runs(runtime: Runtime, folder: Path) -> dict[str, dict[str, Tensor]]:
    """The weights after 20 steps of every kind of run, by name; checkpoints of the middle are left in the folder.

    The folder may hold `given`: the folder of another number of ranks, whose checkpoints are gone on from.
    """
    found = {}
    sharded = replace(runtime, shard=True)
    for case in LONG_CASES:
        for dtype in FAR:
            trainer = long_trainer(case, runtime, dtype)
            trainer.run()
            found[f"{slug(case)} {dtype}"] = whole_state(trainer)
    for case in SHARDED:
        for name, here in {"sharded": sharded, "unsharded": runtime}.items():
            trainer = long_trainer(case, here)
            assert all(isinstance(p, DTensor) == here.sharded for p in trainer.model.parameters())
            while trainer.step_number < HALF:
                trainer.step()
            trainer.save(folder / f"{slug(case)} {name}")
            trainer.run()
            found[f"{slug(case)} {name}"] = whole_state(trainer)
            for saved in ("sharded", "unsharded") if (folder / "given").exists() else ():
                trainer = long_trainer(case, here)
                trainer.load(folder / "given" / f"{slug(case)} {saved}")
                trainer.run()
                found[f"{slug(case)} {name} from {saved}"] = whole_state(trainer)
    return found


def whole_state(trainer: Trainer) -> dict[str, Tensor]:
    """Weights, averages and what is handed on, as `Trainer` gathers them; on every rank."""
    found = {f"final.{name}": value for name, value in trainer.final_state().items()}
    for name, module in trainer._modules().items():
        found |= {f"{name}.{key}": value for key, value in shard.whole(module.state_dict()).items()}
    return found


@pytest.mark.parametrize("dtype", FAR, ids=str)
@pytest.mark.parametrize("case", LONG_CASES, ids=str)
def test_one_two_and_three_ranks_agree_after_twenty_steps(
    case: Case, dtype: torch.dtype, alone: dict, pair: Path, trio: Path
) -> None:
    name = f"{slug(case)} {dtype}"
    for group in (pair, trio):
        for reached in left(group, "long"):
            assert {value.dtype for value in reached[name].values() if value.is_floating_point()} == {dtype}
            assert cases.distance(alone[name], reached[name]) < FAR[dtype]


@pytest.mark.parametrize("case", SHARDED, ids=str)
def test_sharded_ranks_equal_whole_ones(case: Case, alone: dict, pair: Path, trio: Path) -> None:
    one = alone[f"{slug(case)} unsharded"]
    for group in (pair, trio):
        for reached in left(group, "long"):
            two = reached[f"{slug(case)} sharded"]
            assert cases.distance(one, two) < FAR[torch.float32]
            assert cases.distance(reached[f"{slug(case)} unsharded"], two) < FAR[torch.float32]


@pytest.mark.parametrize("saved", ["sharded", "unsharded"])
@pytest.mark.parametrize("how", ["sharded", "unsharded"])
@pytest.mark.parametrize("case", SHARDED, ids=str)
def test_other_numbers_of_ranks_go_on_from_a_checkpoint(
    case: Case, how: str, saved: str, alone: dict, pair: Path, trio: Path
) -> None:
    whole = alone[f"{slug(case)} unsharded"]
    for group in (pair, trio):  # two go on from one, three from two
        for reached in left(group, "long"):
            assert cases.distance(whole, reached[f"{slug(case)} {how} from {saved}"]) < FAR[torch.float32]
    trainer = long_trainer(case, Runtime())
    trainer.load(pair / f"{slug(case)} {saved}")  # one goes on from two
    assert trainer.step_number == HALF
    trainer.run()
    assert cases.distance(whole, whole_state(trainer)) < FAR[torch.float32]
