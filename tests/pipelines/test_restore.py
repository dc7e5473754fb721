"""`dgm restore`: a user's own picture, what is asked of it, and what it becomes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import dgm_models
from dgm_models.method import Method, build, save
from dgm_models.ops.restoration import Grey, Part, Smaller, Whole
from dgm_models.protocols import DataSpec
from pipelines import cli, pictures
from pipelines.stages.restore import job_of, restored
from tests.laws.cases import small

IMAGE = DataSpec("image", (1, 4, 6), 5)
COLOUR = DataSpec("image", (3, 4, 6), 256)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with one untrained model, a picture of 6 x 4 pixels, and a mask over its right half."""
    monkeypatch.setenv("DGM_ROOT", str(tmp_path))
    save(build("diffusion/ddpm", IMAGE, **small("diffusion/ddpm")), tmp_path / "artifacts" / "run")
    x = np.arange(24).reshape(4, 6) % 5 * 255 / 4
    Image.fromarray(x.round().astype(np.uint8)).save(tmp_path / "x.png")
    Image.fromarray(np.tile(np.uint8([0, 0, 0, 255, 255, 255]), (4, 1))).save(tmp_path / "mask.png")
    Image.fromarray(np.full((2, 3), 51, np.uint8)).save(tmp_path / "small.png")
    return tmp_path


def dgm(*words: Any) -> Any:
    done = CliRunner().invoke(cli.app, [str(word) for word in words])
    if done.exception:
        raise done.exception
    return done


# ---- what is seen


def test_picture_becomes_stored_units(folder: Path) -> None:
    x = torch.arange(24).reshape(1, 4, 6) % 5
    job = job_of(IMAGE, str(folder / "x.png"), "inpaint", mask=str(folder / "mask.png"))
    assert isinstance(job.view, Part) and job.hidden is not None
    assert torch.allclose(job.y, x[:, :, :3].flatten().float(), atol=0.01)  # 255 / 4 is rounded in the file
    assert job.hidden[0, :, 3:].all() and not job.hidden[0, :, :3].any()
    job = job_of(IMAGE, str(folder / "small.png"), "super_resolve", factor=2, noise=51)
    assert job.view == Smaller(2) and torch.allclose(job.y, torch.full((1, 2, 3), 0.8)) and job.noise == 0.8
    job = job_of(IMAGE, str(folder / "x.png"), "denoise", noise=25.5)
    assert isinstance(job.view, Whole) and torch.allclose(job.y, x.float(), atol=0.01)


def test_grey_of_a_colour_picture_is_the_mean_of_its_channels(folder: Path) -> None:
    Image.fromarray(np.tile(np.uint8([30, 60, 90]), (4, 6, 1))).save(folder / "rgb.png")
    job = job_of(COLOUR, str(folder / "rgb.png"), "colourise")
    assert job.view == Grey(3) and torch.equal(job.y, torch.full((1, 4, 6), 60.0))
    assert torch.equal(job_of(COLOUR, str(folder / "mask.png"), "colourise").y[0, :, 0], torch.zeros(4))


def test_hole_of_a_colour_picture_has_all_channels(folder: Path) -> None:
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(folder / "rgb.png")
    job = job_of(COLOUR, str(folder / "rgb.png"), "inpaint", mask=str(folder / "mask.png"))
    assert job.hidden is not None and job.hidden.sum() == 3 * 4 * 3 and job.y.shape == (36,)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"task": "sharpen"}, "--task: 'sharpen'; expected one of inpaint, super_resolve, colourise, denoise"),
    ({"task": "inpaint"}, "--mask: missing; inpaint needs it"),
    ({"task": "denoise", "noise": 5, "mask": "mask.png"}, "--mask: given; it is of inpaint, the task is denoise"),
    ({"task": "super_resolve"}, "--factor: missing; super_resolve needs it"),
    ({"task": "super_resolve", "factor": 3}, "--factor: 3; expected one from 2 that divides 4 and 6"),
    ({"task": "super_resolve", "factor": 2}, r"x\.png: 6 x 4 pixels; expected 3 x 2, of which the model makes 2 times"),
    ({"task": "denoise"}, r"--noise: 0; expected a standard deviation of pixels of 0 to 255, above 0 to denoise"),
    ({"task": "denoise", "noise": 300}, "--noise: 300"),
    ({"task": "denoise", "noise": 5, "file": "small.png"}, r"small\.png: 3 x 2 pixels; expected 6 x 4"),
    ({"task": "denoise", "noise": 5, "file": "none.png"}, r"none\.png: No such file"),
    ({"task": "inpaint", "mask": "small.png"}, r"small\.png: 3 x 2 pixels; expected 6 x 4, the picture's size"),
    ({"task": "inpaint", "mask": "x.png"}, r"--mask: .*x\.png: 64 at row 0, column 1; expected 0 \(black, known\)"),
    ({"task": "inpaint", "mask": "black.png"}, r"black\.png: black everywhere; paint white"),
    ({"task": "inpaint", "mask": "white.png"}, r"white\.png: white everywhere; leave black"),
    ({"task": "colourise"}, r"--task: colourise; this model makes grey pictures \(1, 4, 6\)"),
    ({"task": "colourise", "data": DataSpec("vector", (24,), 5)}, r"a picture; this model is of vector \(24,\)"),
]


@pytest.mark.parametrize(("given", "message"), WRONG, ids=lambda each: "" if isinstance(each, dict) else None)
def test_wrong_request_is_named_with_its_way_out(given: dict[str, Any], message: str, folder: Path) -> None:
    for name, value in (("black", 0), ("white", 255)):
        Image.fromarray(np.full((4, 6), value, np.uint8)).save(folder / f"{name}.png")
    request = {"data": IMAGE, "file": "x.png"} | given
    for key in {"file", "mask"} & request.keys():
        request[key] = str(folder / request[key])
    with pytest.raises(ValueError, match=message):
        job_of(**request)


def test_model_that_cannot_restore_is_named(folder: Path) -> None:
    method = build("vae/vae", IMAGE, **small("vae/vae"))
    job = job_of(IMAGE, str(folder / "x.png"), "denoise", noise=5)
    with pytest.raises(
        ValueError, match="vae/vae cannot restore examples; `dgm models` lists those that can: restores"
    ):
        restored(method, job, 2, 0)


# ---- the command


def test_command_paints_the_hole_and_nothing_else(folder: Path) -> None:
    words = ["restore", "run", folder / "x.png", "--task", "inpaint", "--mask", folder / "mask.png", "--n", 3]
    done = dgm(*words, "--out", folder / "y.png")
    assert "inpaint of" in done.output and "3 draws by diffusion/ddpm, seed 0, network evaluations" in done.output
    x, mask = (np.asarray(Image.open(folder / name)) for name in ("x.png", "mask.png"))
    draws = [np.asarray(Image.open(folder / f"y-{number}.png")) for number in range(3)]
    for draw in draws:
        assert draw.shape == (4, 6) and np.array_equal(draw[mask == 0], x[mask == 0])
    assert any(not np.array_equal(draws[0], draw) for draw in draws[1:])
    picture = Image.open(folder / "y.png")
    zoom = picture.size[0] // (4 * 7 + 1)
    tiles = np.asarray(picture.resize((29, 6), Image.Resampling.NEAREST))
    assert picture.size == (zoom * 29, zoom * 6)
    assert np.array_equal(tiles[1:5, 1:7, 0][mask == 0], x[mask == 0])
    assert (tiles[1:5, 1:7][mask == 255] == pictures.HIDDEN).all()
    assert all(np.array_equal(tiles[1:5, 7 * i + 8 : 7 * i + 14, 0], draw) for i, draw in enumerate(draws))
    again = dgm(*words, "--out", folder / "y.npy", "--rounds", 0, "--set", "steps=2")
    assert np.load(folder / "y.npy").shape == (3, 1, 4, 6) and "each: 2" in again.output


@pytest.mark.parametrize("words", [["small.png", "--task", "super_resolve", "--factor", "2"],
                                   ["x.png", "--task", "denoise", "--noise", "40"]])  # fmt: skip
def test_command_enlarges_and_denoises(words: list[str], folder: Path) -> None:
    dgm("restore", "run", folder / words[0], *words[1:], "--n", 2, "--out", folder / "y.png")
    assert np.asarray(Image.open(folder / "y-1.png")).shape == (4, 6)


def test_command_asks_a_model_with_labels(folder: Path) -> None:
    data = DataSpec("image", (1, 4, 6), 5, classes=3)
    method = build("diffusion/ddpm", data, **small("diffusion/ddpm"), cond={"name": "label"})
    save(method, folder / "artifacts" / "asked")
    words = ["restore", "asked", folder / "x.png", "--task", "denoise", "--noise", 40, "--out", folder / "y.npy"]
    dgm(*words, "--label", 2)
    with pytest.raises(ValueError, match="label: 3 is none of 0 to 2"):
        dgm(*words, "--label", 3)
    with pytest.raises(ValueError, match=r"y\.gif is neither a \.png nor a \.npy file"):
        dgm("restore", "run", folder / "x.png", "--task", "denoise", "--out", "y.gif")


def test_loaded_method_is_what_restores(folder: Path) -> None:
    method = dgm_models.load(folder / "artifacts" / "run")
    assert isinstance(method, Method)
    job = job_of(IMAGE, str(folder / "x.png"), "inpaint", mask=str(folder / "mask.png"))
    one, two, other = (restored(method, job, 3, seed) for seed in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other) and one.dtype == torch.uint8
