"""What the benchmarks against other libraries share: the project's side, a peer's side, turns, ratios, the frame."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from dgm_models.objective import Objective
from dgm_models.protocols import Batch, Model
from dgm_models.training.optim import Optim, Optims
from dgm_models.training.runtime import keep_freed_memory
from dgm_models.training.source import ArraySource, Source
from dgm_models.training.trainer import Train, Trainer

Clock = Callable[[], float]

# ---- the sides


class Ours(Trainer):
    """The trainer as it is, which adds up the seconds that went into drawing batches.

    Args:
        x: the dataset, as stored.
        clock: of those seconds.
    """

    def __init__(
        self, model: Model, objective: Objective, x: Tensor, batch: int, optim: Optim, clock: Clock = time.process_time
    ) -> None:
        train = Train(steps=10**9, batch_size=batch)
        super().__init__(model, objective, ArraySource(x, model.data), train, Optims(optim), 0)
        self.clock, self.drawing = clock, 0.0

    def _fetch(self, source: Source, start: int, stop: int, *path: int | str) -> Batch:
        begun = self.clock()
        batch = super()._fetch(source, start, stop, *path)
        self.drawing += self.clock() - begun
        return batch


class Training:
    """A peer's training on batches in memory, which it walks again and again: its loss, the gradient, torch's Adam."""

    def __init__(self, module: nn.Module, loss: Callable[[Tensor], Tensor], ready: Sequence[Tensor], optim: Optim):
        self.loss, self.ready, self.position = loss, ready, 0
        self.optimizer = torch.optim.Adam(module.parameters(), lr=optim.lr, betas=optim.betas, eps=optim.eps)

    def step(self) -> None:
        loss = self.loss(self.ready[self.position % len(self.ready)])
        self.position += 1
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# ---- the measurement


def seconds(run: Callable[[int], object], times: int, clock: Clock = time.process_time) -> float:
    """Of one of so many, which `run` makes."""
    begun = clock()
    run(times)
    return (clock() - begun) / times


def again(action: Callable[[], object]) -> Callable[[int], None]:
    """Calls it so many times."""

    def run(times: int) -> None:
        for _ in range(times):
            action()

    return run


def in_turns(
    runs: Mapping[str, Callable[[int], object]],
    times: Mapping[str, int],
    turns: int,
    trainer: Ours | None = None,
    clock: Clock = time.process_time,
) -> dict[str, list[float]]:
    """The seconds of one in every turn. The sides alternate; "ours" is the trainer's, of it "drawing" the batches."""
    found: dict[str, list[float]] = {name: [] for name in (*runs, "drawing")}
    for turn in range(turns):
        for name in list(runs) if turn % 2 == 0 else list(runs)[::-1]:
            if trainer:
                trainer.drawing = 0.0
            found[name].append(seconds(runs[name], times[name], clock))
            if name == "ours":
                found["drawing"].append(trainer.drawing / times[name] if trainer else 0.0)
    return found


def timed(
    what: str, actions: Mapping[str, Callable[[], object]], trainer: Ours | None, turns: int, length: float
) -> None:
    """Measures our action and every peer's, each for `length` seconds a turn, and prints times and ratios.

    Args:
        trainer: whose step our action is, or None: then there is no drawing of a batch.
    """
    runs = {name: again(action) for name, action in actions.items()}
    for run in runs.values():
        seconds(run, 3)
    times = {name: max(1, round(length / seconds(run, 3))) for name, run in runs.items()}
    found = in_turns(runs, times, turns, trainer)
    print(f"  {what}: " + ", ".join(f"{name} {median(found[name]):.3f} ms" for name in actions))
    for name in actions:
        if name != "ours":
            whole, alike = ratios(found, name)
            drawn = f"; without the drawing {told(alike)}" if trainer else ""
            print(f"    ours / {name}: {told(whole)}{drawn}", flush=True)


def median(found: list[float]) -> float:
    """In milliseconds."""
    return statistics.median(found) * 1e3


def ratios(found: Mapping[str, list[float]], peer: str) -> tuple[list[float], list[float]]:
    """Ours / the peer in every turn: with the drawing of the batches and without it."""
    whole = [a / b for a, b in zip(found["ours"], found[peer], strict=True)]
    alike = [(a - d) / b for a, d, b in zip(found["ours"], found["drawing"], found[peer], strict=True)]
    return whole, alike


def told(ratios: list[float], turns: str = "") -> str:
    return f"{statistics.median(ratios):.3f} ({turns}{min(ratios):.3f} to {max(ratios):.3f})"


# ---- the frame of a script


def asked(description: str, turns: int = 7, length: float = 1.0) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=turns, help="measurements of each side")
    parser.add_argument("--seconds", type=float, default=length, help="of one measurement")
    parser.add_argument("--case", default="", help="only the cases whose name contains this")
    return parser.parse_args()


@contextmanager
def frame(modules: Mapping[str, str], manual: str) -> Iterator[list[str]]:
    """The peers that are installed, around whose measurement it prints versions and the machine's load.

    Args:
        modules: peer -> what is imported of it.
        manual: how to install them.
    Raises: SystemExit where one is missing, after the measurement of the others.
    """
    there = [peer for peer, module in modules.items() if find_spec(module) is not None]
    if missing := [peer for peer in modules if peer not in there]:
        print(f"not installed, and not measured: {', '.join(missing)}; how to install them:\n\n{manual}")
    if not there:
        raise SystemExit(1)
    torch.set_num_threads(1)
    kept = keep_freed_memory()  # as the project's workers do; it holds for the whole process, so for all sides
    print(
        f"torch {torch.__version__}, {', '.join(f'{peer} {version(peer)}' for peer in there)}; "
        f"freed memory is kept: {kept}; load average before: {os.getloadavg()[0]:.2f}"
    )
    yield there
    print(f"load average after: {os.getloadavg()[0]:.2f} (the benchmark itself is 1)")
    if missing:
        raise SystemExit(1)


def measured(cases: Sequence[Any], there: Sequence[str], case: str) -> list[Any]:
    """The cases whose name contains this and whose peer is there."""
    return [each for each in cases if case in str(each) and each.peer in there]
