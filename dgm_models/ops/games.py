"""Watchers of a game: how far its players are from an equilibrium.

A game is told by the turns of its objective: whose loss is whose. Nothing here changes the model or the objective that
it is given; every measurement takes copies.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dgm_models.construct import NonNegative
from dgm_models.objective import Objective
from dgm_models.protocols import Batch

# what counts as zero: a gradient's norm up to the first, a curvature up to the second as a share of the greatest
GRADIENT, CURVATURE = 1e-2, 1e-3
RATE = 1e-2  # of the first step of a best response

Verdict = Literal["nash", "undecided", "saddle", "moving"]


@dataclass(frozen=True)
class Watch:
    """What a game measures of itself: the duality gap at every report, the Nash conditions at the last one.

    The watched rows are at most two batches, half of them for every gradient step: a report costs about as much as
    `gap_steps` trainer steps with one update of each player. The last one costs `curvature_steps` Hessian-vector
    products of every player on all watched rows besides, each about two gradients, and memory for `curvature_steps`
    float64 vectors of a player's size.

    Args:
        gap_steps: gradient steps of each player against the other's frozen weights, 0 for no duality gap.
        curvature_steps: Lanczos steps for each player, 0 for no test of the Nash conditions.
    """

    gap_steps: NonNegative = 10
    curvature_steps: NonNegative = 20


class Conditions(NamedTuple):
    """One player's place: what the differential Nash conditions ask of it.

    Attributes:
        gradient: norm of its loss's gradient in its own parameters, nats an example per unit of parameter.
        least, greatest: extreme curvatures of its loss in its own parameters. `least` is from above: the true one is
            at most that, and equal once there are as many Lanczos steps as distinct eigenvalues.
    """

    gradient: float
    least: float
    greatest: float


def watch(model: Any, objective: Objective, batch: Batch, last: bool, settings: Watch) -> dict[str, Tensor]:
    """What `Objective.watch` of a game returns.

    Args:
        model, objective: the game at this point of its training; neither is changed.
        batch: [B, *event] in model space.
        last: whether training ends here.
    Returns: scalars in nats an example, none of them where `settings` says 0. `duality_gap`, and each player's part in
        it as `<player>/gain`; at the end `nash/<player>/gradient`, `nash/<player>/least_curvature` and
        `nash/<player>/greatest_curvature`.
    """
    found: dict[str, Tensor] = {}
    if settings.gap_steps:
        gains = duality_gap(model, objective, batch, settings.gap_steps)
        found |= {f"{player}/gain": gain for player, gain in gains.items()}
        found["duality_gap"] = torch.stack(list(gains.values())).sum()
    if last and settings.curvature_steps:
        for player, place in nash_conditions(model, objective, batch, settings.curvature_steps).items():
            found[f"nash/{player}/gradient"] = torch.tensor(place.gradient)
            found[f"nash/{player}/least_curvature"] = torch.tensor(place.least)
            found[f"nash/{player}/greatest_curvature"] = torch.tensor(place.greatest)
    return found


def duality_gap(model: Any, objective: Objective, batch: Batch, steps: int) -> dict[str, Tensor]:
    """What each player could gain alone: L_p(now) - L_p(a best response to the others' frozen weights).

    In a zero-sum game, V(D, G) with the critic's loss -V and the generator's V up to what the other player owns, the
    sum over players is the duality gap V(D_worst, G) - V(D, G_worst); in any game it is zero at a Nash equilibrium and
    nowhere below. The best responses are found on one half of the batch and judged on the other, each with `steps`
    gradient steps from where the player stands. So the estimate is of the gap within reach of these steps, from below;
    where the gap is smaller than the noise of half a batch, it may be negative.

    Args:
        model, objective: the game; neither is changed.
        batch: [B, *event] in model space.
        steps: of each player.
    Returns: player -> scalar, nats an example, lower is nearer to an equilibrium.

    Source: Grnarova et al. 2019, arXiv:1811.05512. Differs: descent with a step length that
    adapts; each player's own loss, so that games that are not zero-sum have one.
    """
    find, judge = _halves(batch)
    gains = {}
    for player in model.players():
        now, best = (_loss(*best_response(model, objective, player, find, n), player, judge) for n in (0, steps))
        gains[player] = (now - best).detach()
    return gains


def best_response(model: Any, objective: Objective, player: str, batch: Batch, steps: int) -> tuple[Any, Objective]:
    """Copies of the game in which one player has descended its loss on the batch, the others have not moved.

    A step that does not lower the loss is taken back and the next is a quarter as long; otherwise the next is half
    as long again. So no learning rate has to fit the game, and the loss on the batch does not rise.
    """
    model, objective = copy.deepcopy((model, objective))
    parameters = _parameters(model, player)
    loss = _loss(model, objective, player, batch)
    gradients = _gradients(loss, parameters)
    rate = RATE
    for _ in range(steps):
        before = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            torch._foreach_sub_(parameters, gradients, alpha=rate)
        trial = _loss(model, objective, player, batch)
        if bool(trial < loss):
            loss, gradients, rate = trial, _gradients(trial, parameters), 1.5 * rate
        else:
            with torch.no_grad():
                torch._foreach_copy_(parameters, before)
            rate /= 4
    return model, objective


def nash_conditions(model: Any, objective: Objective, batch: Batch, steps: int) -> dict[str, Conditions]:
    """Each player's gradient and extreme curvatures of its own loss in its own parameters.

    A differential Nash equilibrium has gradients of zero and positive definite Hessians of every player's loss; for a
    critic that maximises V = -loss the greatest eigenvalue of V's Hessian is then below zero.

    The gradient's squared norm is the inner product of the gradients on two halves of the batch (zero where that is
    negative): the norm on one batch is above zero even where the expected gradient is zero.

    Args:
        model, objective: the game; neither is changed.
        batch: [B, *event] in model space.
        steps: of Lanczos' method.
    Returns: player -> `Conditions`; `verdict` reads them.

    Source: Ratliff, Burden, Sastry 2016, arXiv:1411.2168; Berard et al. 2020, arXiv:1906.04848, for
    Lanczos' method on GANs.
    """
    found = {}
    for player in model.players():
        products = []
        for half in _halves(batch):
            game, rules = copy.deepcopy((model, objective))
            parameters = _parameters(game, player)
            products.append(_flat(_gradients(_loss(game, rules, player, half), parameters)))
        gradient = float(torch.dot(*products).clamp_min(0).sqrt())
        game, rules = copy.deepcopy((model, objective))
        parameters = _parameters(game, player)
        matvec = hessian_product(_loss(game, rules, player, batch), parameters)
        rng = torch.Generator().manual_seed(0)
        found[player] = Conditions(gradient, *lanczos(matvec, len(products[0]), steps, rng))
    return found


def still(place: Conditions) -> bool:
    """Whether a player's gradient counts as zero."""
    return place.gradient <= GRADIENT


def curved(place: Conditions) -> int:
    """The sign of a player's least curvature: 1, -1, or 0 where it counts as zero beside the greatest."""
    bar = CURVATURE * max(abs(place.least), abs(place.greatest))
    return (place.least > bar) - (place.least < -bar)


def verdict(places: Mapping[str, Conditions]) -> Verdict:
    """What all players' conditions say together.

    Returns:
        "moving": a gradient is not zero.
        "saddle": gradients are zero, and a player's loss has negative curvature: not even a local Nash equilibrium.
        "undecided": neither, but a least curvature counts as zero; the second order does not tell.
        "nash": a differential Nash equilibrium, as far as the Lanczos steps reached.
    """
    if not all(map(still, places.values())):
        return "moving"
    least = min(map(curved, places.values()))
    return "nash" if least > 0 else "saddle" if least < 0 else "undecided"


def hessian_product(loss: Tensor, parameters: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """v -> (Hessian of the loss in the parameters) v, by a gradient of the gradient's product with v.

    Args:
        loss: scalar with its graph.
        parameters: n numbers in all.
    Returns: a function of [n] float64 on the CPU, whose product is computed in the parameters' own type.
    """
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    sizes = [p.numel() for p in parameters]
    curved = [(g, p) for g, p in zip(gradients, parameters, strict=True) if g is not None and g.requires_grad]

    def product(v: Tensor) -> Tensor:
        parts = dict(zip(map(id, parameters), torch.split(v, sizes), strict=True))
        along = [parts[id(p)].view_as(p).to(p) for _, p in curved]
        if not curved:
            return torch.zeros_like(v)
        found = torch.autograd.grad(
            [g for g, _ in curved], parameters, along, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return _flat(found)

    return product


def lanczos(matvec: Callable[[Tensor], Tensor], dim: int, steps: int, rng: torch.Generator) -> tuple[float, float]:
    """The extreme Ritz values of a symmetric matrix in the Krylov space of a random vector.

    Args:
        matvec: v -> A v, [dim] float64.
        dim: size of A.
        steps: products taken; fewer where the space closes earlier.
        rng: of the first vector.
    Returns: (least, greatest): both within A's spectrum, and equal to its ends once `steps` reaches the number of
        distinct eigenvalues.

    Source: Lanczos 1950; full reorthogonalisation, twice: Parlett 1998, section 6.9.
    """
    basis = torch.zeros(min(steps, dim), dim, dtype=torch.float64)
    diagonal: list[float] = []
    beside: list[float] = []
    v = torch.randn(dim, generator=rng, dtype=torch.float64)
    v /= v.norm()
    for step in range(len(basis)):
        basis[step] = v
        w = matvec(v)
        diagonal.append(float(w @ v))
        for _ in range(2):
            w = w - basis[: step + 1].T @ (basis[: step + 1] @ w)
        norm = float(w.norm())
        if norm <= 1e-12 * max(map(abs, diagonal + beside)):  # what is left is rounding: the space is invariant
            break
        beside.append(norm)
        v = w / norm
    size = len(diagonal)
    off = torch.tensor(beside[: size - 1], dtype=torch.float64)
    ritz = torch.linalg.eigvalsh(torch.tensor(diagonal, dtype=torch.float64).diag() + off.diag(1) + off.diag(-1))
    return float(ritz[0]), float(ritz[-1])


def _loss(model: Any, objective: Objective, player: str, batch: Batch) -> Tensor:
    """A player's mean loss of an example: the sum over its turns, those of every n-th step by 1/n."""
    totals = [turn.loss(model, batch).total / turn.every for turn in objective.turns() if turn.player == player]
    return torch.stack(totals).sum() / objective.count(batch)


def _parameters(model: Any, player: str) -> list[Tensor]:
    return [p for p in model.players()[player].parameters() if p.requires_grad]


def _gradients(loss: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """[n] float64 on the CPU."""
    return torch.cat([tensor.detach().reshape(-1).to("cpu", torch.float64) for tensor in tensors])


def _halves(batch: Batch) -> tuple[Batch, Batch]:
    parts = list(batch.split(2))
    return parts[0], parts[-1]  # a batch of one row is both halves
