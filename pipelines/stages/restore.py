"""restore: a user's picture with a hole, with noise, too small or grey -> what a trained model makes of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dgm_models.method import Method
    from dgm_models.ops.restoration import View
    from dgm_models.protocols import DataSpec

TASKS = {"inpaint": "--mask", "super_resolve": "--factor", "colourise": "", "denoise": "--noise"}  # what each needs
DEEPEST = 255  # the largest value of a file's pixel


@dataclass(frozen=True)
class Job:
    """What is to be done to which picture.

    Attributes:
        view: what the picture is of an example.
        y: [...] what is seen, in stored units.
        noise: its standard deviation, in stored units.
        hidden: [*event] bool, what has no colour of its own in a picture of the input; None for nothing.
    """

    view: View
    y: Tensor
    noise: float
    hidden: Tensor | None = None


def job_of(
    data: DataSpec, file: str, task: str, mask: str | None = None, factor: int | None = None, noise: float = 0.0
) -> Job:
    """Reads a user's picture.

    Args:
        data: what the model makes.
        file: an image file: of the size that the model makes, or `factor` times smaller.
        task: a key of `TASKS`.
        mask: an image file of the same size, white where the picture is to be painted and black where it is known.
        factor: of both sides, for super_resolve.
        noise: standard deviation of the picture's noise, of 0 to 255.
    Raises: ValueError naming the option or the file, what it is and what is expected.
    """
    from dgm_models.ops.restoration import Grey, Part, Smaller, Whole

    if task not in TASKS:
        raise ValueError(f"--task: {task!r}; expected one of {', '.join(TASKS)}")
    if data.kind != "image" or data.levels is None or data.shape[0] not in (1, 3):
        raise ValueError(f"{file}: a picture; this model is of {data.kind} {data.shape}, levels {data.levels}")
    for option, given, owner in (("--mask", mask, "inpaint"), ("--factor", factor, "super_resolve")):
        if (given is not None) != (task == owner):
            way = f"{task} needs it" if task == owner else f"it is of {owner}, the task is {task}"
            raise ValueError(f"{option}: {'given' if given is not None else 'missing'}; {way}")
    if not 0 <= noise <= DEEPEST or (task == "denoise" and noise == 0):
        raise ValueError(f"--noise: {noise:g}; expected a standard deviation of pixels of 0 to 255, above 0 to denoise")
    unit = (data.levels - 1) / DEEPEST
    channels, height, width = data.shape
    if task == "super_resolve":
        assert factor is not None
        if factor < 2 or height % factor or width % factor:
            raise ValueError(f"--factor: {factor}; expected one from 2 that divides {height} and {width}")
        small = _picture(
            file, (channels, height // factor, width // factor), f"of which the model makes {factor} times as much"
        )
        return Job(Smaller(factor), small * unit, noise * unit)
    x = _picture(file, data.shape, "the size that the model makes")
    if task == "inpaint":
        assert mask is not None
        hidden = _mask(mask, (1, height, width)).expand(data.shape)
        view: View = Part(~hidden)
        return Job(view, view.see(x[None] * unit)[0], noise * unit, hidden)
    if task == "colourise" and channels == 1:
        raise ValueError(f"--task: colourise; this model makes grey pictures {data.shape}")
    view = Grey(channels) if task == "colourise" else Whole()
    return Job(view, view.see(x[None] * unit)[0], noise * unit)


def _picture(file: str, shape: tuple[int, ...], what: str) -> Tensor:
    """[C, H, W] float32, 0 to 255."""
    from pipelines.data import images

    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}; expected an image file") from error
    x = torch.from_numpy(images.decode(content, file, None, shape[0]).copy()).float()
    if tuple(x.shape) != shape:
        raise ValueError(
            f"{file}: {x.shape[2]} x {x.shape[1]} pixels; expected {shape[2]} x {shape[1]}, {what}: resize or crop it"
        )
    return x


def _mask(file: str, shape: tuple[int, ...]) -> Tensor:
    """[1, H, W] bool: where the mask is white."""
    x = _picture(file, shape, "the picture's size")
    wrong = (x != 0) & (x != DEEPEST)
    if wrong.any():
        _, row, column = (int(i) for i in wrong.nonzero()[0])
        raise ValueError(
            f"--mask: {file}: {int(x[0, row, column])} at row {row}, column {column}; expected 0 (black, known) or 255 "
            "(white, to be painted) everywhere: save it as a PNG without soft edges"
        )
    hidden = x == DEEPEST
    if not hidden.any():
        raise ValueError(f"--mask: {file}: black everywhere; paint white what is to be painted")
    if hidden.all():
        raise ValueError(f"--mask: {file}: white everywhere; leave black what is known, or use `dgm sample`")
    return hidden


def restored(
    method: Method, job: Job, n: int, seed: int, label: int | None = None, rounds: int | None = None
) -> Tensor:
    """[n, *event] stored: n draws for one picture."""
    from dgm_models.sampling import labelled, restore

    y = job.y[None].expand(n, *job.y.shape)
    more = {} if rounds is None else {"rounds": rounds}
    return restore(method, y, job.view, job.noise, seed, labelled(method, n, label), **more)


def files_of(job: Job, drawn: Tensor, data: DataSpec, out: Path) -> dict[Path, bytes]:
    """`out` with the input and all draws in a row, and every draw as a picture of its own, `<name>-0.png` and on."""
    from pipelines import pictures

    levels = (data.levels or 256) - 1
    given = job.view.back(job.y[None].double()).round().clamp(0, levels).to(drawn.dtype)
    hidden = torch.zeros(len(drawn) + 1, *data.shape, dtype=torch.bool)
    if job.hidden is not None:
        hidden[0] = job.hidden
    found = {out: pictures.table(torch.cat([given, drawn]), data, len(drawn) + 1, hidden)}
    for number, x in enumerate(drawn):
        found[out.with_name(f"{out.stem}-{number}.png")] = pictures.single(x, data)
    return found
