"""A training step without numbers: the trainer itself, on fake tensors, as rank 0 of a group of any size."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from dgm_models.method import Method
from dgm_models.objective import Loss, Turn
from dgm_models.protocols import Batch, DataSpec
from dgm_models.training import shard as shard_module
from dgm_models.training.runtime import Runtime
from dgm_models.training.trainer import Trainer
from pipelines.params import Run, build_method
from pipelines.plan.ledger import Counts, Ledger

NEVER = 2**40  # a step that no run reaches


@dataclass(frozen=True)
class Dry:
    """What a run does in one worker of `world`.

    Attributes:
        peak: kind -> bytes at the peak of the first steps, which is that of the run.
        construction: bytes at the peak before the first step; the model is built whole, in the host's memory.
        parameters: player -> number of parameters, whole.
        state_bytes: of a checkpoint, whole: model, objective, averages, optimizers.
        weight_bytes: of the artifact.
        steps: (share of all steps, what such a step executes); more than one where a turn is not taken at every step.
        validation: what one batch of a validation executes.
        draws: batches drawn in a step, on average.
    """

    peak: dict[str, int]
    construction: int
    parameters: dict[str, int]
    state_bytes: int
    weight_bytes: int
    steps: tuple[tuple[float, Counts], ...]
    validation: Counts
    draws: float

    @property
    def flops(self) -> float:
        """FLOPs of one worker's step, on average."""
        return sum(share * counts.flops for share, counts in self.steps)


class _Rows:
    """A dataset whose examples have a shape and no values."""

    def __init__(self, spec: DataSpec, rows: int) -> None:
        self.spec, self.rows = spec, rows

    def __len__(self) -> int:
        return self.rows

    def batch(self, start: int, stop: int) -> Batch:
        levels = self.spec.levels
        dtype = torch.float32 if levels is None else torch.uint8 if levels <= 256 else torch.int32
        cond = torch.zeros(stop - start, dtype=torch.int64) if self.spec.classes else None
        x = torch.zeros(stop - start, *self.spec.shape, dtype=dtype)
        return Batch(x, torch.arange(start, stop), torch.arange(start, stop), cond)


class _Valid(_Rows):
    """A validation split of one batch; what follows its reading is counted apart."""

    def __init__(self, spec: DataSpec, rows: int, ledger: Ledger, counts: Counts) -> None:
        super().__init__(spec, rows)
        self.ledger, self.counts = ledger, counts

    def batch(self, start: int, stop: int) -> Batch:
        self.ledger.counts = self.counts
        return super().batch(start, stop)


def run_dry(
    run: Run,
    spec: DataSpec,
    world: int = 1,
    *,
    shard: bool = False,
    checkpoint_activations: bool = False,
    foreach: bool = False,
) -> Dry:
    """Executes the trainer's steps of a run on fake tensors.

    Args:
        run: what is trained; torch.compile is left out.
        spec: what an example is.
        world: workers; the largest share of the batch is taken.
        shard, checkpoint_activations: as in params `cluster`.
        foreach: the optimizer works on all tensors at once, as it does on a GPU, which takes more memory.
    Raises: ValueError when the settings cannot hold.
    """
    share = -(-run.train.batch_size // world)
    train = replace(
        run.train, batch_size=share * world, compile=False, steps=NEVER,
        validate_every=NEVER if run.train.validate_every else 0,
    )  # fmt: skip
    ledger, validation = Ledger(), Counts()
    with torch.random.fork_rng(devices=[]), _group(world), _on_fakes(ledger):
        method = build_method(run, spec)
        _watch(method, ledger)
        runtime = Runtime(
            torch.device("cpu"), 0, world, train.precision, shard=shard, checkpoint_activations=checkpoint_activations
        )
        valid = _Valid(spec, train.batch_size, ledger, validation) if train.validate_every else None
        trainer = Trainer(
            method.model, method.objective, _Rows(spec, NEVER), train, run.optim, run.seed, runtime, valid
        )
        for optimizer in trainer.optimizers.values():
            for group in optimizer.param_groups:
                group["foreach"] = foreach
            optimizer.register_step_pre_hook(lambda own, *_: ledger.name("gradients", _gradients(own), over=False))
        for parameter in method.model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: ledger.name("gradients", p.grad))
        built = len(ledger.events)
        trainer.step()  # the first initialises, and makes the optimizers' states
        steps, draws = [], 0.0
        for first, part in _kinds_of_step(trainer.turns):
            ledger.counts = Counts()
            before, trainer.step_number = trainer.position, first
            trainer.step()
            steps.append((part, ledger.counts))
            draws += part * (trainer.position - before) / train.batch_size
        if valid:
            ledger.counts, trainer.step_number = Counts(), NEVER - 1
            trainer.step()
        _name_state(trainer, ledger)
        players = {name: sum(p.numel() for p in player.parameters()) for name, player in trainer.players.items()}
        state, weights = _state_bytes(trainer), _size(trainer.model.state_dict())
    construction = sum(ledger.peak(0, built).values())
    return Dry(ledger.peak(built), construction, players, state, weights, tuple(steps), validation, draws)


def _kinds_of_step(turns: tuple[Turn, ...]) -> Iterator[tuple[int, float]]:
    """(the first step at which a set of turns is taken, the share of the steps that take it)."""
    period = math.lcm(*(turn.every for turn in turns))
    taken = [tuple(step % turn.every == 0 for turn in turns) for step in range(period)]
    for which, count in Counter(taken).items():
        yield taken.index(which), count / period


@contextmanager
def _group(world: int) -> Iterator[None]:
    """A process group of `world` ranks in which this process is rank 0 and no message is sent."""
    if world == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _on_fakes(ledger: Ledger) -> Iterator[None]:
    """Tensors have shapes, types and lives, and no values."""

    def stay(module: nn.Module, *_: Any, **__: Any) -> nn.Module:
        return module  # there is one device; torch cannot move fake parameters that were initialised

    def copied(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
        if id(tensor) not in memo:  # torch's own copies the mode with the tensor
            clone = tensor.detach().clone()
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(clone, tensor.requires_grad) if is_parameter else clone
        found: Tensor = memo[id(tensor)]
        return found

    def mesh(*arguments: Any) -> DeviceMesh:
        with _disable_current_modes():  # the numbers of the ranks are needed
            return init_device_mesh(*arguments)

    def gathered(runtime: Runtime, tensor: Tensor) -> Tensor:
        return torch.cat([tensor] * runtime.world)  # every rank's share is of the size of this one's

    propagate = ShardingPropagator._propagate_tensor_meta_non_cached

    def unseen(*arguments: Any) -> Any:
        with ledger.paused():  # torch asks for the shape of a whole result, which no rank holds
            return propagate(*arguments)

    with (
        patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", unseen),
        patch.object(nn.Module, "to", stay),
        patch.object(Runtime, "gather", gathered),
        patch.object(torch.UntypedStorage, "data_ptr", lambda storage: storage._cdata),  # fakes have no address
        patch.object(shard_module, "init_device_mesh", mesh),
        patch.object(FakeTensor, "__deepcopy__", copied, create=True),
        FakeTensorMode(),
        ledger.following_resizes(),
        ledger,
    ):
        yield


def _watch(method: Method, ledger: Ledger) -> None:
    """Tells the ledger of batches and of forward passes, through the objective's own contract."""
    objective = method.objective
    turns, prepare = tuple(objective.turns()), objective.prepare

    def watched(turn: Turn) -> Turn:
        def loss(model: Any, batch: Batch) -> Loss:
            with ledger.forward():
                return turn.loss(model, batch)

        return replace(turn, loss=loss)

    def named(tensor: Tensor) -> Tensor:
        ledger.name("batch", tensor)
        return tensor

    def prepared(model: Any, batch: Batch) -> Any:
        found = prepare(model, batch)
        for part in (batch, *([found] if isinstance(found, Batch) else found)):
            part.map(named)
        return found

    replaced = tuple(map(watched, turns))
    objective.turns = lambda: replaced  # type: ignore[method-assign]
    objective.prepare = prepared  # type: ignore[method-assign]


def _gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def _averages(trainer: Trainer) -> list[nn.Module]:
    return [average for average in (trainer.average, trainer.best) if average is not None]


def _states(trainer: Trainer) -> list[Any]:
    return [optimizer.state_dict()["state"] for optimizer in trainer.optimizers.values()]


def _name_state(trainer: Trainer, ledger: Ledger) -> None:
    modules = (trainer.model, trainer.objective)
    ledger.name("buffers", [list(module.buffers()) for module in modules])
    ledger.name("parameters", [list(module.parameters()) for module in modules])
    ledger.name("optimizer", _states(trainer))
    ledger.name("averages", [average.state_dict() for average in _averages(trainer)])


def _state_bytes(trainer: Trainer) -> int:
    modules = (trainer.model, trainer.objective, *_averages(trainer))
    return sum(_size(module.state_dict()) for module in modules) + _size(_states(trainer))


def _size(values: Any) -> int:
    """Bytes of the whole tensors, however they are sharded."""
    return sum(t.numel() * t.element_size() for t in tree_leaves(values) if isinstance(t, Tensor))
