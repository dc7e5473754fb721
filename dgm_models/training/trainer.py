"""The trainer: takes the turns of any objective. It knows no family."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dgm_models import noise
from dgm_models.construct import Fraction, NonNegative, Positive
from dgm_models.nn.tricks import couples
from dgm_models.objective import Loss, Objective, Turn
from dgm_models.protocols import Batch, Model
from dgm_models.training import checkpoint
from dgm_models.training.average import Average
from dgm_models.training.blocks import recompute
from dgm_models.training.optim import Optims
from dgm_models.training.reduce import Reduction
from dgm_models.training.runtime import Precision, Runtime, use
from dgm_models.training.shard import ShardedReduction, local, parts, run, shard, whole
from dgm_models.training.source import Source

WATCHED = 512  # rows that an objective's `watch` sees at most, on every rank


@dataclass(frozen=True)
class Train:
    """How long and in what portions a training runs. All of it is part of the run's identity.

    Args:
        steps: trainer steps; a step takes every turn once.
        batch_size: examples of one global batch.
        accumulate: micro-batches that a worker makes of its share.
        average: decay of the averaged weights that are evaluated, 0 for none.
        report_every: steps between reported metrics.
        checkpoint_every: steps between resumable checkpoints.
        validate_every: steps between validation losses, 0 for none (one-player methods).
        keep: "best" evaluates the weights of the lowest validation loss, "last" those of the last step.
        patience: validations without a new best after which training stops, 0 for never.
        precision: of the forward pass.
        compile: torch.compile of the losses.
        threads: CPU threads of a worker; part of the identity because it changes the last bits.
    """

    steps: Positive = 1000
    batch_size: Positive = 128
    accumulate: Positive = 1
    average: Fraction = 0.0
    report_every: Positive = 100
    checkpoint_every: Positive = 500
    validate_every: NonNegative = 0
    keep: Literal["last", "best"] = "last"
    patience: NonNegative = 0
    precision: Precision = "float32"
    compile: bool = False
    threads: Positive = 1

    def __post_init__(self) -> None:
        if self.keep == "best" and not self.validate_every:
            raise ValueError("keep: 'best' needs validate_every above 0")
        if self.keep == "best" and self.validate_every > self.steps:
            raise ValueError(f"validate_every: {self.validate_every} is never reached in {self.steps} steps")
        if self.patience and not self.validate_every:
            raise ValueError("patience: needs validate_every above 0")
        if self.accumulate > self.batch_size:
            raise ValueError(f"accumulate: {self.accumulate} micro-batches of {self.batch_size} examples")


Metrics = dict[str, float]


@dataclass(frozen=True)
class Snapshot:
    """A copy of a trainer's whole state on the CPU; the trainer may go on while it is written.

    Attributes:
        tensors, state: what the checkpoint holds; empty on every rank but the first.
    """

    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]

    def write(self, folder: Path) -> None:
        """Writes the checkpoint that `Trainer.load` reads; a rank that holds nothing writes nothing."""
        if self.state:
            checkpoint.write(folder, self.tensors, {"state": self.state})


class Trainer:
    """Everything that a killed training needs to go on, and the step that moves it.

    Args:
        model, objective: what a method's function builds.
        source: the training examples.
        train, optim: settings.
        seed: of all noise; initial weights are the caller's.
        runtime: device, rank, precision, and whether parameters are sharded and activations computed twice.
        valid: validation examples, needed when `train.validate_every` is set.
    Raises: ValueError when the settings cannot hold for this objective.
    """

    def __init__(
        self,
        model: Model,
        objective: Objective,
        source: Source,
        train: Train,
        optim: Optims,
        seed: int,
        runtime: Runtime | None = None,
        valid: Source | None = None,
    ) -> None:
        self.runtime = runtime or Runtime()
        self.model = model
        self.objective = objective.to(self.runtime.device)
        self.source, self.valid = source, valid
        self.train, self.optim, self.seed = train, optim, seed
        self.turns = tuple(objective.turns())
        self.players = model.players()
        self._check()
        optim.check(self.players)
        self.average = Average(model, train.average) if train.average else None
        self.best = Average(self.evaluated, 0.0) if train.keep == "best" else None
        self._place()
        self.parameters = {name: dict(player.named_parameters()) for name, player in self.players.items()}
        self.optimizers = {name: optim.of(name).build(player) for name, player in self.players.items()}
        self.step_number, self.position = 0, 0
        self.best_loss, self.since_best = float("inf"), 0
        self.history: list[tuple[int, Metrics]] = []  # everything reported, kept in the checkpoint
        self._reductions: dict[str, Reduction] = {}
        self._losses = [torch.compile(turn.loss) if train.compile else turn.loss for turn in self.turns]
        self._sums: dict[str, tuple[float, float]] = {}  # of every metric since the last report, and of how many

    def _check(self) -> None:
        train, world = self.train, self.runtime.world
        if (not self.objective.additive or couples(self.model)) and train.accumulate > 1:
            raise ValueError(
                f"train.accumulate: {type(self.objective).__name__} couples the examples of a batch; set it to 1"
            )
        if self.objective.double_backward and train.compile:
            raise ValueError(
                f"train.compile: {type(self.objective).__name__} differentiates a gradient, which torch.compile "
                "does not support; set it to false"
            )
        if train.batch_size < world * train.accumulate:
            raise ValueError(
                f"train.batch_size: {train.batch_size} is less than {world} workers x {train.accumulate} micro-batches"
            )
        if self.runtime.shard and len(self.players) > 1:
            raise ValueError(
                f"cluster.shard: {type(self.model).__name__} has {len(self.players)} players "
                f"({', '.join(self.players)}) and only models of one player are sharded; set it to false"
            )
        kind = type(self.objective)
        needs = {
            "differentiates the model in `prepare`": self.objective.whole,
            "computes initial weights from data": kind.initialize is not Objective.initialize,
            "watches copies of the model": kind.watch is not Objective.watch,
        }
        for what in (what for what, needed in needs.items() if needed and self.runtime.shard):
            raise ValueError(
                f"cluster.shard: {kind.__name__} {what}, which needs the whole model on every worker; set it to false"
            )
        for turn in self.turns:
            if turn.player not in self.players:
                raise ValueError(f"turn of {turn.player!r}, but the model has {', '.join(self.players)}")
        if train.validate_every:
            if len(self.turns) != 1:
                raise ValueError("train.validate_every: a game has no validation loss; set it to 0")
            if self.valid is None:
                raise ValueError("train.validate_every: needs a validation split")

    def _place(self) -> None:
        """Moves everything to the runtime's device, each rank its rows alone where parameters are sharded."""
        if self.runtime.checkpoint_activations:
            recompute(self.model)
        if self.runtime.sharded:  # the copies are divided alike, so that an average is row by row
            for module in (self.model, *(kept.module for kept in (self.average, self.best) if kept)):
                shard(module, self.runtime)
        for part in filter(None, (self.model, self.average, self.best)):
            part.to(self.runtime.device)

    # ---- the step

    @property
    def evaluated(self) -> nn.Module:
        """The weights that follow training most closely and are evaluated: averaged where there is an average."""
        return self.average.module if self.average else self.model

    @property
    def done(self) -> bool:
        stopped = self.train.patience and self.since_best >= self.train.patience
        return self.step_number >= self.train.steps or bool(stopped)

    def step(self) -> None:
        """Takes every turn once."""
        with use(self.runtime):
            if self.step_number == 0 and self.position == 0:
                self._initialize()
            self.model.train()
            shared: Batch | Sequence[Batch] | None = None
            for index, turn in enumerate(self.turns):
                if self.step_number % turn.every:
                    continue
                for update in range(turn.updates):
                    if turn.fresh or shared is None:
                        drawn = self._draw()
                        shared = shared if turn.fresh else drawn
                    batch = drawn if turn.fresh else shared
                    assert batch is not None
                    self._update(index, turn, _nth(batch, update, turn), update)
            if self.average:
                self.average.update(self.model)
            with torch.no_grad():
                self.objective.advance(self.model, self.step_number)
            self.step_number += 1
            if self.train.validate_every and self.step_number % self.train.validate_every == 0:
                self._validate()

    def _fetch(self, source: Source, start: int, stop: int, *path: int | str) -> Batch:
        batch = source.batch(start, stop).to(self.runtime.device).fold("seed", self.seed, *path)
        x, log_det = self.model.codec.encode(batch.x, batch.key)
        cond = self.model.conditions(batch.x, batch.cond, batch.key) if self.model.condition else batch.cond
        return replace(batch, x=x, log_det=log_det, cond=cond)

    def _draw(self) -> Batch | Sequence[Batch]:
        """The next global batch: this rank's share of it, encoded and prepared."""
        first, last = self.runtime.share(self.train.batch_size)
        batch = self._fetch(self.source, self.position + first, self.position + last, "train")
        self.position += self.train.batch_size
        self.runtime.seed(noise.digest(self.seed, "prepare", self.position, self.runtime.rank))
        with torch.no_grad():
            prepared: Batch | Sequence[Batch] = run(self.model, self.objective.prepare, self.model, batch)
            return prepared

    def _initialize(self) -> None:
        if type(self.objective).initialize is Objective.initialize:
            return  # no weight depends on data, and the whole batch may not fit in one worker
        batch = self._fetch(self.source, 0, self.train.batch_size, "initialize")
        self.runtime.seed(noise.digest(self.seed, "initialize"))
        with torch.no_grad():
            self.objective.initialize(self.model, batch)
        if self.average:  # it was copied before the weights were there
            self.average.module.load_state_dict(self.model.state_dict())

    def _update(self, index: int, turn: Turn, batch: Batch, update: int) -> None:
        """One optimizer update of one player: the gradients' sum over micro-batches and ranks over the global count."""
        optimizer, settings = self.optimizers[turn.player], self.optim.of(turn.player)
        where = (self.seed, self.step_number, index, update)
        batch = batch.fold("update", self.step_number, index, update)
        names: list[str] = []
        sums, count = (torch.zeros((), device=self.runtime.device) for _ in range(2))
        with _only(self.parameters, turn.player) as parameters:
            _forget(parameters)  # an update that was interrupted leaves gradients behind
            reduction = self._reduction(turn.player, parameters)
            micros = list(batch.split(self.train.accumulate))
            for part, micro in enumerate(micros):
                # dropout and the like: the same after a resume, different on every rank
                self.runtime.seed(noise.digest("update", *where, part, self.runtime.rank))
                with self.runtime.autocast():
                    loss: Loss = run(self.model, self._losses[index], self.model, micro)
                reduction.backward(loss.total, last=part == len(micros) - 1)
                count += self.objective.count(micro)
                names = ["loss", *loss.metrics]
                sums = sums + torch.stack([value.detach().float() for value in (loss.total, *loss.metrics.values())])
            reached = reduction.finish([count, sums])
            with torch.no_grad():
                gradients = [local(p.grad) for p in reached if p.grad is not None]
                torch._foreach_div_(gradients, count)
                norm = self._norm(gradients)
                # the one place where the host waits for the device
                number, length, *totals = torch.cat([torch.stack([count, norm.float()]), sums]).tolist()
                if not math.isfinite(length):
                    raise FloatingPointError(
                        f"step {self.step_number}: the gradient of {turn.player!r} is not finite (loss "
                        f"{totals[0]:g} over {number:g} examples); lower optim.lr, or set optim.clip or optim.warmup"
                    )
                if settings.clip:
                    torch._foreach_mul_(gradients, (settings.clip / (norm + 1e-6)).clamp(max=1.0))
            factor = settings.factor(self.step_number, self.train.steps)
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * factor
            optimizer.step()
            _forget(parameters)
        prefix = f"{turn.name or turn.player}/" if len(self.players) > 1 else ""
        for name, total in zip(names, totals, strict=True):
            self._record(prefix + name, total, number)
        self._record(f"{prefix}gradient_norm", length, 1.0)

    def _reduction(self, player: str, parameters: Mapping[str, nn.Parameter]) -> Reduction:
        if player not in self._reductions:
            kind = ShardedReduction if self.runtime.sharded else Reduction
            self._reductions[player] = kind(self.runtime, player, parameters)
        reduction = self._reductions[player]
        reduction.begin()
        return reduction

    def _norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The Euclidean norm of the whole gradient, of which this rank may hold some rows."""
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.runtime.sharded:
            square = norm.square()
            self.runtime.sum([square])
            norm = square.sqrt()
        return norm

    def _record(self, name: str, total: float, count: float) -> None:
        before, of = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (before + total, of + count)

    def metrics(self) -> Metrics:
        """Means since the last call: nats per example for losses; identical on every rank."""
        means = {name: total / count for name, (total, count) in self._sums.items()}
        self._sums = {}
        return means

    def _watch(self, last: bool) -> None:
        """Adds to this report's metrics what the objective says of the players at this point.

        Every rank sees the same rows and does the same work, as if it were alone: what is found by optimising on a
        share of the rows would depend on the number of ranks. The position and every module stay as they are.
        """
        if type(self.objective).watch is Objective.watch:
            return
        first, end = self.runtime.share(min(2 * self.train.batch_size, max(WATCHED, self.runtime.world)))
        batch = self._fetch(self.source, self.position + first, self.position + end, "watch")
        batch = batch.map(self.runtime.gather)
        model, objective = copy.deepcopy((self.model, self.objective))
        devices = [self.runtime.device] if self.runtime.device.type == "cuda" else []
        with use(replace(self.runtime, rank=0, world=1)), torch.random.fork_rng(devices=devices):
            self.runtime.seed(noise.digest(self.seed, "watch", self.step_number))
            seen = objective.watch(model, batch, last)
        values = {name: value.detach().float().to(self.runtime.device) for name, value in seen.items()}
        self.runtime.sum(list(values.values()))  # equal but for last bits on accelerators: reports are identical
        for name, value in values.items():
            self._record(name, float(value), self.runtime.world)

    # ---- validation

    @torch.no_grad()
    def _validate(self) -> None:
        """The mean validation loss of the evaluated weights; the noise is the same at every validation."""
        assert self.valid is not None
        model = self.evaluated
        was_training = model.training
        model.eval()
        kept = [(buffer, buffer.clone()) for buffer in self.objective.buffers()]  # chains move on in training alone
        totals = torch.zeros(2, device=self.runtime.device)
        for start in range(0, len(self.valid), self.train.batch_size):
            rows = min(self.train.batch_size, len(self.valid) - start)
            first, last = self.runtime.share(rows)
            if last > first:
                batch = self._fetch(self.valid, start + first, start + last, "valid")
                self.runtime.seed(noise.digest(self.seed, "valid", start, self.runtime.rank))
                prepared = run(model, self.objective.prepare, model, batch)
                for part in [prepared] if isinstance(prepared, Batch) else prepared:
                    with self.runtime.autocast():
                        loss = run(model, self.turns[0].loss, model, part)
                    totals += torch.stack([loss.total.float(), torch.as_tensor(self.objective.count(part)).to(totals)])
        for buffer, before in kept:
            buffer.copy_(before)
        self.runtime.sum([totals])
        model.train(was_training)
        total, count = totals.tolist()
        value = total / count
        self._record("valid/loss", total, count)
        self.since_best += 1
        if value < self.best_loss:
            self.best_loss, self.since_best = value, 0
            if self.best:
                self.best.update(model)

    # ---- what is kept

    def final(self) -> nn.Module:
        """The weights that this training hands on."""
        return self.best.module if self.best and self.best_loss < float("inf") else self.evaluated

    def _modules(self) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = {"model": self.model, "objective": self.objective}
        if self.average:
            found["average"] = self.average
        if self.best:
            found["best"] = self.best
        return found

    def final_state(self) -> dict[str, Tensor]:
        """The state of `final()`, whole and on the CPU. Every rank calls it when parameters are sharded."""
        return whole(self.final().state_dict())

    def snapshot(self) -> Snapshot:
        """The whole state: what `load` needs to go on bit for bit. Every rank calls it when parameters are sharded."""
        chief = self.runtime.chief
        tensors = {name: whole(module.state_dict(), keep=chief) for name, module in self._modules().items()}
        documents = {}
        for player, optimizer in self.optimizers.items():
            state, documents[player] = checkpoint.flatten_optimizer(optimizer)
            tensors[f"optimizer-{player}"] = whole(state, keep=chief)
        tensors["metrics"] = {name: torch.tensor(sums, dtype=torch.float64) for name, sums in self._sums.items()}
        if not chief:
            return Snapshot({}, {})
        return Snapshot(
            tensors,
            {
                "step": self.step_number,
                "position": self.position,
                "best_loss": None if self.best_loss == float("inf") else self.best_loss,
                "since_best": self.since_best,
                "history": list(self.history),
                "optimizers": documents,
            },
        )

    def save(self, folder: Path) -> None:
        """Writes the whole state. Every rank calls it when parameters are sharded; the first one writes."""
        self.snapshot().write(folder)

    def load(self, folder: Path) -> None:
        """Goes back to what `save` wrote, by any number of workers, sharded or not; every rank calls it.

        Raises: checkpoint.Damaged when the folder is not intact.
        """
        checkpoint.verify(folder)
        for name, module in self._modules().items():
            module.load_state_dict(parts(checkpoint.read_tensors(folder, name), module.state_dict()))
        state = checkpoint.read_document(folder, "state")
        for player, optimizer in self.optimizers.items():
            tensors = checkpoint.read_tensors(folder, f"optimizer-{player}")
            order = [p for group in optimizer.param_groups for p in group["params"]]
            like = {name: order[int(name.split(".")[0])] for name in tensors}
            checkpoint.restore_optimizer(optimizer, parts(tensors, like), state["optimizers"][player])
        self.step_number, self.position = state["step"], state["position"]
        self.best_loss = float("inf") if state["best_loss"] is None else state["best_loss"]
        self.since_best = state["since_best"]
        self.history = [(step, values) for step, values in state["history"]]
        metrics = checkpoint.read_tensors(folder, "metrics")
        self._sums = {name: (float(sums[0]), float(sums[1])) for name, sums in metrics.items()}

    def run(
        self,
        report: Callable[[int, Metrics], None] | None = None,
        save: Callable[[Trainer], None] | None = None,
        after_step: Callable[[int], None] | None = None,
    ) -> None:
        """Steps to the end; `report` and `save` are called at their intervals and at the last step.

        Args:
            report: gets the step and the metrics since the last report.
            save: gets the trainer, to keep a snapshot.
            after_step: gets every step's number once it is reported; every rank calls it alike.
        """
        with torch.random.fork_rng(), _threads(self.train.threads):
            while not self.done:
                self.step()
                last = self.done
                if last or self.step_number % self.train.report_every == 0:
                    self._watch(last)
                    self.history.append((self.step_number, self.metrics()))
                    if report:
                        report(*self.history[-1])
                if after_step:
                    after_step(self.step_number)
                if save and (last or self.step_number % self.train.checkpoint_every == 0):
                    save(self)


def _nth(batch: Batch | Sequence[Batch], update: int, turn: Turn) -> Batch:
    if isinstance(batch, Batch):
        return batch
    if len(batch) != turn.updates:
        raise ValueError(f"prepare gave {len(batch)} batches for the {turn.updates} updates of {turn.player!r}")
    return batch[update]


def _forget(parameters: Mapping[str, nn.Parameter]) -> None:
    for p in parameters.values():
        p.grad = None


@contextmanager
def _only(players: Mapping[str, Mapping[str, nn.Parameter]], active: str) -> Iterator[dict[str, nn.Parameter]]:
    """The active player's parameters ask for gradients, nobody else's do."""
    idle = [p for name, player in players.items() if name != active for p in player.values() if p.requires_grad]
    for p in idle:
        p.requires_grad_(False)
    try:
        yield {name: p for name, p in players[active].items() if p.requires_grad}
    finally:
        for p in idle:
            p.requires_grad_(True)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
