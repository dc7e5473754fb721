"""What the laws are held against: every registered method, small, on every kind of data that its row declares."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgm_models import registry
from dgm_models.method import Method, build, read_optims
from dgm_models.objective import Loss
from dgm_models.protocols import DataSpec
from dgm_models.training import checkpoint
from dgm_models.training.runtime import Runtime
from dgm_models.training.source import ArraySource
from dgm_models.training.trainer import Train, Trainer

ROOT = Path(__file__).parents[2]
ROWS = {row.name: row for row in (*registry.METHODS.values(), *registry.TOOLS)}

# one small data set for each sort of data that a row may name
SPECS = {
    "image:discrete": DataSpec("image", (1, 4, 4), 5, classes=3),
    "image:real": DataSpec("image", (1, 4, 4), None, classes=3),
    "vector:discrete": DataSpec("vector", (6,), 2, classes=3),
    "vector:real": DataSpec("vector", (2,), None, classes=3, location=0.5, scale=2.0),
    "tokens:discrete": DataSpec("tokens", (5,), 7, classes=3),
    "codes:discrete": DataSpec("codes", (2, 2), 4, classes=3),
    "codes:real": DataSpec("codes", (2, 2), None, classes=3),
    "audio:discrete": DataSpec("audio", (1, 8), 16, classes=3),
    "audio:real": DataSpec("audio", (1, 8), None, classes=3),
}

# what makes a method small; each is passed where the method's function takes a parameter of that name
SMALL: dict[str, Any] = {
    "network": {"name": "mlp", "width": 16, "depth": 1},
    "width": 16,
    "latent_dim": 3,
    "feature_dim": 4,
    "watch": {"gap_steps": 1, "curvature_steps": 1},
    "importance": 3,
    "inner_steps": 2,
    "inner_lr": 0.9,
    "components": 3,
    "masks": 2,
    "random_order": True,
    "direct": True,
    "blocks": 1,
    "halvings": 1,
    "bottom_halvings": 0,
    "vector_codes": 2,
    "codebook_size": 5,
    "code_dim": 2,
    "layers": 2,
    "channels": 2,
    "groups": 2,
    "steps": 2,
    "heads": 2,
    "skip_width": 8,
    "first_kernel": 3,
    "sampler": {"name": "ddim", "steps": 3},
    "learned_variance": True,
    "moves": 2,
    "buffer": 8,
    "hidden": 4,
    "chain": {"name": "langevin", "steps": 3},
    "flow": {"name": "flows/real_nvp", "channels": 4, "blocks": 1, "layers": 2},
    "pairing": "transport",  # pairs are made of the whole batch: what the laws of one batch are about
    "dropout": 0.0,  # torch draws it for a whole micro-batch: other micro-batches, other draws
}
# and what single methods need in its place: losses of second derivatives refuse a network without them
SMOOTH = {"network": {**SMALL["network"], "activation": "silu"}}
SMALL_FOR: dict[str, dict[str, Any]] = {"energy/score_matching": SMOOTH, "energy/sliced_score_matching": SMOOTH}


@dataclass(frozen=True)
class Case:
    """A method on one sort of data, with a label as condition or without one."""

    method: str
    sort: str
    asked: bool = False

    @property
    def row(self) -> registry.Row:
        return ROWS[self.method]

    @property
    def spec(self) -> DataSpec:
        return SPECS[self.sort]

    def __str__(self) -> str:
        return f"{self.method}-{self.sort}" + ("-label" if self.asked else "")


def takes(name: str, parameter: str) -> bool:
    """Whether the method's function has the parameter."""
    return parameter in inspect.signature(registry.builder(name)).parameters


PLAIN = [Case(name, sort) for name, row in ROWS.items() for sort in row.data]
CASES = PLAIN + [Case(name, row.data[0], True) for name, row in ROWS.items() if takes(name, "cond")]
FIRST = [Case(name, row.data[0]) for name, row in ROWS.items()]


def with_capability(*names: str, sorts: str = "") -> list[Case]:
    """The unconditional cases whose row names one of the capabilities, on sorts of data that end in `sorts`."""
    return [case for case in PLAIN if set(names) & set(case.row.capabilities) and case.sort.endswith(sorts)]


def small(name: str) -> dict[str, Any]:
    """The params that make a method small."""
    told = SMALL | SMALL_FOR.get(name, {})
    return {key: value for key, value in told.items() if takes(name, key)}


def made(case: Case, spec: DataSpec | None = None, seed: int = 0) -> Method:
    asked = {"cond": {"name": "label"}} if case.asked else {}
    return build(case.method, spec or case.spec, seed=seed, **small(case.method), **asked)


def rows(spec: DataSpec, n: int, seed: int = 0) -> Tensor:
    """Stored examples [n, *shape]."""
    rng = torch.Generator().manual_seed(seed)
    if spec.levels is None:
        return torch.randn(n, *spec.shape, generator=rng) * spec.scale + spec.location
    x = torch.randint(spec.levels, (n, *spec.shape), generator=rng)
    return x.to(torch.uint8 if spec.levels <= 256 else torch.int32)


def labels(spec: DataSpec, n: int) -> Tensor | None:
    return torch.arange(n) % spec.classes if spec.classes else None


def source(spec: DataSpec, n: int = 24, seed: int | None = 0) -> ArraySource:
    return ArraySource(rows(spec, n), spec, labels(spec, n), seed=seed)


def every_state(spec: DataSpec) -> Tensor:
    """Every possible example, [levels^D, *shape], as int64."""
    assert spec.levels is not None
    grid = torch.cartesian_prod(*[torch.arange(spec.levels)] * spec.dims)
    return grid.reshape(-1, *spec.shape)


def trainer(
    method: Method,
    settings: Train,
    optim: dict[str, Any],
    runtime: Runtime | None = None,
    kind: type[Trainer] = Trainer,
) -> Trainer:
    return kind(
        method.model, method.objective, source(method.data), settings, read_optims(optim, "optim"),
        0, runtime, source(method.data, 12, seed=None) if settings.validate_every else None,
    )  # fmt: skip


def intercept(method: Method, after: Callable[[int, Any, Loss], Loss]) -> None:
    """Every loss of the objective goes through `after(turn's index, model, loss)`; before the trainer is made."""
    turns = method.objective.turns()

    def wrapped(index: int, loss: Callable[..., Loss]) -> Callable[..., Loss]:
        return lambda model, batch: after(index, model, loss(model, batch))

    replaced = tuple(replace(turn, loss=wrapped(index, turn.loss)) for index, turn in enumerate(turns))
    method.objective.turns = lambda: replaced  # type: ignore[method-assign]


def state_of(trainer: Trainer) -> dict[str, Any]:
    """All that a training has become, read from the objects and not through `Trainer.save`."""
    found: dict[str, Any] = {
        "step": trainer.step_number,
        "position": trainer.position,
        "best_loss": trainer.best_loss,
        "since_best": trainer.since_best,
        "history": list(trainer.history),
    }
    modules = {"model": trainer.model, "objective": trainer.objective, "average": trainer.average, "best": trainer.best}
    for name, module in modules.items():
        if module is not None:
            found |= {f"{name}.{key}": value.clone() for key, value in module.state_dict().items()}
    for player, optimizer in trainer.optimizers.items():
        tensors, document = checkpoint.flatten_optimizer(optimizer)
        found |= {f"optimizer.{player}.{key}": value.clone() for key, value in tensors.items()}
        found[f"optimizer.{player}"] = document
    return found


def differences(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    """The names of what differs in any bit."""

    def same(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)

    return [name for name in {**one, **two} if name not in one or name not in two or not same(one[name], two[name])]


def parameters(method: Method) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in method.model.state_dict().items()}


def distance(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """The largest absolute difference over all tensors."""
    assert one.keys() == two.keys()
    return max(float((one[name].double() - two[name].double()).abs().max()) for name in one)
