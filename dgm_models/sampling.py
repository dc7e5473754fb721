"""Samples and completions in the stored form, the same for the same seed, however many are asked for."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dgm_models import noise
from dgm_models.codecs import Dequantized, Standardized
from dgm_models.conditions import Caption
from dgm_models.method import Method
from dgm_models.nn.conditioner import check
from dgm_models.ops.restoration import Observation, Part, View
from dgm_models.protocols import Completes, Model, Restores, Samples

BLOCK = 128  # a block is always drawn whole: floats differ between batch sizes
RESTORED = 8  # rows of a block of restorations, of which few are wanted


@torch.no_grad()
def sample(method: Method, n: int, seed: int = 0, device: str = "cpu", cond: Tensor | None = None) -> Tensor:
    """The first `n` of an endless list of samples.

    Args:
        method: a trained method whose model has the capability "samples".
        n: how many.
        seed: of the list.
        device: where the model runs.
        cond: [n, ...] what each sample is asked for, for a model with a condition (`conditions`).
    Returns: [n, *event] in the stored type.
    Raises: ValueError when the model cannot sample, n is below 1, or cond does not fit the model or n.
    """
    if n < 1:
        raise ValueError(f"n: {n} samples were asked for; at least 1")
    if not isinstance(method.model, Samples):
        raise ValueError(f"{method.name} has no sampler")
    model = method.model.to(device).eval()
    _check(model, cond, n)

    def draw(block: int, rng: torch.Generator) -> Tensor:
        return model.sample(BLOCK, rng, None if cond is None else _block(cond, block).to(device))

    return _in_blocks(method, n, "sample", seed, device, draw)


@torch.no_grad()
def complete(
    method: Method, x: Tensor, known: Tensor, seed: int = 0, cond: Tensor | None = None, device: str = "cpu"
) -> Tensor:
    """What is not known of stored examples, drawn from its distribution given the rest.

    Args:
        method: a trained method whose model has the capability "completes".
        x: [n, *event] as stored; only its known values are read.
        known: [n, *event] bool, or [*event] for all examples.
        seed: of the draws.
        cond: [n, ...] what each example is asked for, for a model with a condition.
        device: where the model runs.
    Returns: [n, *event] in the stored type: x where it is known.
    Raises: ValueError when the model cannot complete, when a shape does not fit, or when the model does not draw its
        values in an order that begins with the known ones.
    """
    if not isinstance(method.model, Completes):
        raise ValueError(f"{method.name} cannot complete examples; `dgm models` lists those that can: completes")
    if not len(x) or tuple(x.shape[1:]) != method.data.shape:
        raise ValueError(f"x: {tuple(x.shape)}; {method.name} was built for [N, *{method.data.shape}]")
    if known.dtype != torch.bool or known.shape not in (x.shape, x.shape[1:]):
        raise ValueError(
            f"known: {known.dtype} {tuple(known.shape)}; expected bool {method.data.shape}, or {tuple(x.shape)}"
        )
    known = known.expand(x.shape)
    given = torch.where(known, x, torch.zeros_like(x))
    keys = noise.fold(torch.arange(len(x)), "complete", seed)
    model = method.model.to(device).eval()
    _check(model, cond, len(x))

    def draw(block: int, rng: torch.Generator) -> Tensor:
        y, _ = model.codec.encode(_block(given, block).to(device), _block(keys, block).to(device))
        asked = None if cond is None else _block(cond, block).to(device)
        return model.complete(y, _block(known, block).to(device), rng, asked)

    return torch.where(known, x, _in_blocks(method, len(x), "complete", seed, device, draw).to(x.dtype))


@torch.no_grad()
def restore(
    method: Method,
    y: Tensor,
    view: View,
    noise: float = 0.0,
    seed: int = 0,
    cond: Tensor | None = None,
    device: str = "cpu",
    rounds: int = 3,
) -> Tensor:
    """Examples drawn from their distribution given what is seen of them: inpainting, super-resolution, colourisation
    and denoising with a model that was trained for none of them.

    Args:
        method: a trained method whose model has the capability "restores".
        y: [n, ...] what `view.see` gives of stored examples; need not be whole levels.
        view: what is seen: a part, a smaller picture, a grey one, or the whole.
        noise: standard deviation of y's noise, in stored units.
        seed: of the draws.
        cond: [n, ...] what each example is asked for, for a model with a condition.
        device: where the model runs.
        rounds: see `Observation`.
    Returns: [n, *event] in the stored type. A part without noise is given back as it is, at the nearest levels;
        anything else that is seen without noise is met before levels are rounded.
    Raises: ValueError when the model cannot restore, or when y is not what the view gives of its data.
    """
    if not isinstance(method.model, Restores):
        raise ValueError(f"{method.name} cannot restore examples; `dgm models` lists those that can: restores")
    model, shape = method.model.to(device).eval(), _seen(method, view)
    if not len(y) or tuple(y.shape[1:]) != shape:
        raise ValueError(f"y: {tuple(y.shape)}; of {method.name}'s data {method.data.shape} expected [N, *{shape}]")
    _check(model, cond, len(y))
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise: {noise:g}; expected a standard deviation, at least 0")
    if isinstance(method.data.scale, tuple) and noise:
        raise ValueError(f"noise: {noise:g}; these values have units of their own, and one number is no noise of all")
    zero, one = (_placed(method, view.back(torch.full_like(y[:1], value, dtype=torch.float64))) for value in (0, 1))
    unit = float((one - zero).max())
    placed = view.see(_placed(method, view.back(y.double()))).float()

    def draw(block: int, rng: torch.Generator) -> Tensor:
        rows = _block(placed, block, RESTORED).to(device)
        asked = None if cond is None else _block(cond, block, RESTORED).to(device)
        return model.restore(Observation(rows, view, noise * unit, rounds), rng, asked)

    found = _in_blocks(method, len(y), "restore", seed, device, draw, RESTORED)
    if isinstance(view, Part) and not noise:  # bit for bit, though the codec rounds
        known = y.double() if method.data.levels is None else y.double().round()
        return Observation(known, view).meet(found.double()).to(found.dtype)
    return found


def _seen(method: Method, view: View) -> tuple[int, ...]:
    """The shape of what is seen of one example. Raises: ValueError when there is no such view of the data."""
    try:
        example = torch.zeros(1, *method.data.shape)
        seen = view.see(example)
        if view.back(seen).shape == example.shape:
            return tuple(seen.shape[1:])
    except (RuntimeError, IndexError):
        pass
    raise ValueError(f"view: {view}; {method.name} models {method.data.kind} {method.data.shape}: no such view of it")


def _placed(method: Method, x: Tensor) -> Tensor:
    """Values [B, *event] between the stored ones in model space, where a level is the middle of its cell."""
    codec = method.model.codec
    if isinstance(codec, Standardized):
        return codec.encode(x, torch.zeros(len(x)))[0]
    if not isinstance(codec, Dequantized):
        raise ValueError(f"{method.name}: its model space has no values between levels")
    return codec.place(x + 0.5)[0]


def _check(model: Model, cond: Tensor | None, n: int) -> None:
    check(model.condition, cond)
    if cond is not None and len(cond) != n:
        raise ValueError(f"cond: {len(cond)} conditions for {n} samples; give one for each")


def _in_blocks(
    method: Method,
    n: int,
    name: str,
    seed: int,
    device: str,
    draw: Callable[[int, torch.Generator], Tensor],
    size: int = BLOCK,
) -> Tensor:
    """The first n rows, in the stored type, of blocks of `size` that `draw(number, rng)` gives in model space."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the number of threads changes the last bits
    try:
        blocks = []
        for block in range(-(-n // size)):
            rng = torch.Generator(device).manual_seed(noise.digest(name, seed, block))
            blocks.append(method.model.codec.decode(draw(block, rng)).cpu())
    finally:
        torch.set_num_threads(threads)
    return torch.cat(blocks)[:n]


def conditions(method: Method, x: Tensor, labels: Tensor | None, seed: int = 0) -> Tensor | None:
    """What samples have to be asked for to be compared with stored x [N, *event]; None for a model without condition.

    Args:
        method: a trained method.
        x, labels: rows of a dataset, labels [N] or None.
        seed: of conditions that are drawn.
    """
    return method.model.conditions(x, labels, noise.fold(torch.arange(len(x)), "condition", seed))


def labels_of(method: Method, n: int, label: int | None = None) -> Tensor | None:
    """[n] int64: one label for all samples, or every label in turn; None for a model without a condition.

    Raises: ValueError when there is no such label, or the model is asked for images.
    """
    condition = method.model.condition
    if condition is None:
        if label is not None:
            raise ValueError(f"label: {label}; {method.name} was built without a condition")
        return None
    if condition.spec(method.data).kind == "image":
        raise ValueError(f"cond: {method.name} is asked by {condition.name}, which needs images: give them as cond")
    classes = method.data.classes
    if label is not None and not 0 <= label < classes:
        raise ValueError(f"label: {label} is none of 0 to {classes - 1}")
    return torch.arange(n) % classes if label is None else torch.full((n,), label)


def labelled(method: Method, n: int, label: int | None = None, caption: str | None = None) -> Tensor | None:
    """[n, ...]: what asks all samples for one label or caption, or for every label in turn; None without a condition.

    Raises: ValueError when the model has no such label or word, when it is not asked by them, or when both are given.
    """
    if caption is None:
        labels = labels_of(method, n, label)
        return None if labels is None else conditions(method, torch.empty(n, 0), labels)
    condition = method.model.condition
    if not isinstance(condition, Caption) or label is not None:
        asked = f"asked by {condition.name}" if condition else "built without a condition"
        raise ValueError(f"caption: {caption!r} for {method.name}, {asked}{'' if label is None else ', with a label'}")
    return condition.read(method.data, caption).repeat(n, 1)


def _block(rows: Tensor, block: int, size: int = BLOCK) -> Tensor:
    """The rows of one block, filled up with its last one."""
    part = rows[block * size : (block + 1) * size]
    return torch.cat([part, part[-1:].expand(size - len(part), *part.shape[1:])])
