"""`dgm complete`, `--set`, and a user's own rows as a model's data."""

from __future__ import annotations

import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
import pyarrow.parquet as pq  # type: ignore[import-untyped, unused-ignore]
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

import dgm_models
from dgm_models.codecs import Discrete, Standardized
from dgm_models.construct import ConfigError
from dgm_models.method import Method, build, resampled
from dgm_models.nn.autoregression import Autoregressive
from dgm_models.nn.tempering import Tempering
from dgm_models.ops.likelihoods import Bernoulli
from dgm_models.protocols import DataSpec, Model
from dgm_models.sampling import complete
from pipelines import cli, pictures
from pipelines.data.prepare import prepare
from pipelines.stages import sample as stage
from pipelines.stages.rows import read

IMAGE = DataSpec("image", (1, 4, 6), 2)


class Copies(Autoregressive):
    """Every pixel is white with the probability sigmoid(4) where the one before it is white, else sigmoid(-4)."""

    def __init__(self, data: DataSpec) -> None:
        super().__init__(data, Discrete(data), Bernoulli())
        self.weight = torch.nn.Parameter(torch.tensor(4.0))

    def start(self, n: int, cond: Tensor | None) -> dict[str, Tensor]:
        return {"last": torch.zeros(n, 1)}

    def step(self, state: dict[str, Tensor], place: int) -> Tensor:
        return self.weight * (2 * state["last"] - 1)

    def admit(self, state: dict[str, Tensor], place: int, values: Tensor) -> None:
        state["last"] = values.float()


def method_of(model: Model) -> Method:
    small = {"network": {"name": "mlp", "width": 4, "depth": 1}, "latent_dim": 2}
    return dataclasses.replace(build("vae/vae", model.data, **small), model=model)


@pytest.fixture
def copies() -> Method:
    return method_of(Copies(IMAGE))


def rows(n: int) -> Tensor:
    return torch.randint(2, (n, 1, 4, 6), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


# ---- the library


def test_complete_keeps_what_is_known_and_depends_on_it(copies: Method) -> None:
    x, known = rows(200), stage.known_part("top:0.5", IMAGE)
    found = complete(copies, x, known, seed=3)
    assert found.dtype == x.dtype and torch.equal(found[:, :, :2], x[:, :, :2])
    assert copies.model.evaluations == 12  # places that are not known
    agrees = (found[:, 0, 2, 0] == x[:, 0, 1, 5]).double().mean()
    assert abs(float(agrees) - torch.tensor(4.0).sigmoid()) < 5 * (0.018 / 200) ** 0.5  # five standard deviations
    other = torch.where(known, x, 1 - x)
    assert torch.equal(complete(copies, other, known, seed=3), found)  # the rest is not read
    assert torch.equal(complete(copies, x[:150], known, seed=3), found[:150])  # nor what else is asked
    assert not torch.equal(complete(copies, x, known, seed=4), found)


class Careless(Model):
    """Gives nothing back of what it was given."""

    seen: Tensor

    def complete(self, x: Tensor, known: Tensor, rng: torch.Generator, cond: Tensor | None = None) -> Tensor:
        self.seen = x
        return torch.zeros_like(x)


def test_complete_gives_a_model_what_is_known_and_gives_it_back() -> None:
    data = DataSpec("vector", (3,), location=(0.1, 0.2, 0.3), scale=(0.7, 3.0, 1e-3))
    model = Careless(data, Standardized(data))
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    x[:, 1] = math.nan
    found = complete(method_of(model), x, torch.tensor([True, False, True]))
    assert torch.equal(found[:, ::2], x[:, ::2])  # bit for bit, though the codec rounds
    assert torch.equal(found[:, 1], torch.full((5,), 0.2)) and model.seen.isfinite().all()


def test_complete_refuses_what_it_cannot_do(copies: Method) -> None:
    x, known = rows(3), stage.known_part("top:0.5", IMAGE)
    with pytest.raises(ValueError, match=r"vae/vae cannot complete examples; `dgm models` lists"):
        complete(method_of(Model(IMAGE, Discrete(IMAGE))), x, known)
    with pytest.raises(ValueError, match=r"x: \(3, 1, 4, 5\); vae/vae was built for \[N, \*\(1, 4, 6\)\]"):
        complete(copies, x[..., :5], known)
    with pytest.raises(
        ValueError, match=r"known: torch\.bool \(1, 4, 5\); expected bool \(1, 4, 6\), or \(3, 1, 4, 6\)"
    ):
        complete(copies, x, known[..., :5])
    with pytest.raises(ValueError, match="one is known that comes after one that is not"):
        complete(copies, x, stage.known_part("left:0.5", IMAGE))
    with pytest.raises(ValueError, match="cond: this model was built without a condition"):
        complete(copies, x, known, cond=torch.zeros(3, dtype=torch.int64))


def test_resampled_changes_the_sampler_and_nothing_else(copies: Method) -> None:
    cold = resampled(copies, {"temperature": 0.05})
    assert cold.model.sampling == Tempering(0.05) and copies.model.sampling == Tempering()
    assert dgm_models.method.fingerprint(cold) == dgm_models.method.fingerprint(copies)
    assert cold.lineage == copies.lineage and cold.params == copies.params
    assert dgm_models.sample(cold, 50).sum() == 0 != dgm_models.sample(copies, 50).sum()  # logits of 80: no change
    assert resampled(cold, {}).model.sampling == Tempering(0.05)


def test_resampled_names_what_is_wrong(copies: Method) -> None:
    with pytest.raises(ConfigError, match=r'sampling\.temprature: unknown key; did you mean "temperature"'):
        resampled(copies, {"temprature": 1.0})
    with pytest.raises(ConfigError, match=r"sampling\.temperature: 0 is not a number above 0"):
        resampled(copies, {"temperature": 0})
    with pytest.raises(ConfigError, match="sampling: the sampler of vae/vae has no settings"):
        resampled(method_of(Model(IMAGE, Discrete(IMAGE))), {"temperature": 1.0})


# ---- the command


def test_settings_are_read_as_yaml_reads_them() -> None:
    assert stage.settings(["a=0.7", "b=3", "c=true", "d=heun"]) == {"a": 0.7, "b": 3, "c": True, "d": "heun"}
    for pairs, words in (
        (["a"], "expected key=value"),
        (["a="], "expected key=value"),
        (["a=1", "a=2"], "a is given twice"),
    ):
        with pytest.raises(ValueError, match=words):
            stage.settings(pairs)


def test_known_part_is_a_share_of_rows_or_columns_or_a_mask(tmp_path: Path) -> None:
    assert stage.known_part("top:0.5", IMAGE)[0].any(1).tolist() == [True, True, False, False]
    assert stage.known_part("left:0.5", IMAGE)[0].any(0).tolist() == [True] * 3 + [False] * 3
    binary = stage.known_part("top:0.5", DataSpec("vector", (6,), 2))  # a picture of 3 x 2
    assert binary.tolist() == [True] * 4 + [False] * 2
    assert stage.known_part("left:0.5", DataSpec("vector", (4,))).tolist() == [True, True, False, False]
    np.save(tmp_path / "mask.npy", np.eye(4, 6)[None].astype(np.uint8))
    assert torch.equal(stage.known_part(str(tmp_path / "mask.npy"), IMAGE)[0], torch.eye(4, 6).bool())
    np.save(tmp_path / "wrong.npy", np.full((1, 4, 6), 3))
    for text, words in {
        "top:1.5": "'1.5' is no share", "left:half": "'half' is no share", "right:0.5": "expected top:0.5, left:0.5",
        str(tmp_path / "wrong.npy"): "is no mask", str(tmp_path / "none.npy"): "none.npy",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=words):
            stage.known_part(text, IMAGE)
    with pytest.raises(ValueError, match=r"vector \(4,\) has no rows"):
        stage.known_part("top:0.5", DataSpec("vector", (4,)))


@pytest.fixture
def trained(copies: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose one trained run is `copies`."""
    monkeypatch.setenv("DGM_ROOT", str(tmp_path))
    (tmp_path / "artifacts" / "run").mkdir(parents=True)
    (tmp_path / "artifacts" / "run" / "spec.json").write_text("{}")
    monkeypatch.setattr(dgm_models, "load", lambda folder: copies, raising=False)
    np.save(tmp_path / "rows.npy", rows(5).numpy())
    return tmp_path


def dgm(*words: str) -> Any:
    done = CliRunner().invoke(cli.app, [*words])
    if done.exception:
        raise done.exception
    return done


def test_command_shows_original_known_part_and_draws_in_a_row(trained: Path) -> None:
    words = ["complete", "run", str(trained / "rows.npy"), "--known", "top:0.5", "--n", "3", "--draws", "2"]
    done = dgm(*words, "--out", str(trained / "x.npy"))
    assert "3 rows, 2 completions each" in done.output and "network evaluations for each: 12" in done.output
    drawn = torch.from_numpy(np.load(trained / "x.npy"))
    assert drawn.shape == (3, 2, 1, 4, 6)
    assert torch.equal(drawn[:, :, :, :2], rows(3)[:, None, :, :2].expand(-1, 2, -1, -1, -1))
    assert not torch.equal(drawn[:, 0], drawn[:, 1])
    dgm(*words, "--out", str(trained / "x.png"))
    image = Image.open(trained / "x.png")
    zoom = image.size[0] // (4 * 7 + 1)
    assert image.size == (zoom * (4 * 7 + 1), zoom * (3 * 5 + 1))
    small = np.asarray(image.resize((29, 16), Image.Resampling.NEAREST)).astype(int)
    for row, (x, both) in enumerate(zip(rows(3), drawn, strict=True)):
        for column, tile in ((0, x), (2, both[0]), (3, both[1])):
            corner = small[row * 5 + 1 : row * 5 + 5, column * 7 + 1 : column * 7 + 7]
            assert np.array_equal(corner[..., 0], 255 * tile[0].numpy())
        known = small[row * 5 + 1 : row * 5 + 5, 8:14]
        assert np.array_equal(known[:2, :, 0], 255 * x[0, :2].numpy())
        assert (known[2:] == pictures.HIDDEN).all()


def test_command_takes_settings_of_the_sampler(trained: Path) -> None:
    out = str(trained / "x.npy")
    done = dgm("sample", "run", "--n", "40", "--set", "temperature=0.05", "--out", out)
    assert np.load(out).sum() == 0 and "network evaluations for each: 24" in done.output
    with pytest.raises(ConfigError, match=r"sampling\.temprature: unknown key"):
        dgm("sample", "run", "--set", "temprature=0.05", "--out", out)
    with pytest.raises(ValueError, match="--set: the pipeline draws"):
        dgm("sample", "run", "--set", "temperature=0.05", "--stage")
    with pytest.raises(ValueError, match=r"x\.gif is neither a \.png nor a \.npy file"):
        dgm("complete", "run", "rows.npy", "--known", "top:0.5", "--out", "x.gif")


# ---- a user's rows


def test_rows_of_a_table_are_found_by_the_names_of_its_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DGM_ROOT", str(tmp_path))
    x = np.random.default_rng(0).normal(size=(40, 2))
    pq.write_table(pa.table({"b": x[:, 1], "other": x[:, 0], "a": x[:, 0]}), tmp_path / "t.parquet")
    section = {"name": "table", "path": str(tmp_path / "t.parquet"), "columns": ["a", "b"]}
    spec = prepare(section, tmp_path / "data" / "mine").spec()
    method = dataclasses.replace(method_of(Model(spec, Discrete(IMAGE))), lineage={"dataset": "mine"}, data=spec)
    (tmp_path / "rows.csv").write_text("extra,b,a\n9,2,1\n9,4,3\n")
    assert read(str(tmp_path / "rows.csv"), method)[0].tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert torch.equal(read(str(tmp_path / "t.parquet"), method)[0], torch.from_numpy(x.astype(np.float32)))
    (tmp_path / "rows.csv").write_text("b\n2\n")
    with pytest.raises(ValueError, match=r"rows\.csv: no column 'a'"):
        read(str(tmp_path / "rows.csv"), method)
    stranger = dataclasses.replace(method, lineage={})
    (tmp_path / "rows.csv").write_text("5,6\n7,8\n")  # without a dataset here: all columns, and no header
    assert read(str(tmp_path / "rows.csv"), stranger)[0].tolist() == [[5.0, 6.0], [7.0, 8.0]]
    np.save(tmp_path / "whole.npy", np.array([[1, 2]]))
    assert read(str(tmp_path / "whole.npy"), method)[0].dtype == torch.float32


def test_rows_may_be_images(copies: Method, tmp_path: Path) -> None:
    for name, x in zip("ab", rows(2), strict=True):
        Image.fromarray(255 * x[0].numpy()).save(tmp_path / f"{name}.png")
    assert torch.equal(read(str(tmp_path / "b.png"), copies)[0], rows(2)[1:])
    assert torch.equal(read(str(tmp_path), copies)[0], rows(2))
    stream = io.BytesIO()
    Image.new("L", (3, 3)).save(stream, "PNG")
    (tmp_path / "a.png").write_bytes(stream.getvalue())
    with pytest.raises(ValueError, match=r"a\.png: holds \(1, 1, 3, 3\); expected \[N, \*\(1, 4, 6\)\]"):
        read(str(tmp_path / "a.png"), copies)


def test_rows_that_are_no_examples_are_named(copies: Method, tmp_path: Path) -> None:
    np.save(tmp_path / "high.npy", np.full((2, 1, 4, 6), 2, np.uint8))
    with pytest.raises(ValueError, match=r"high\.npy: row 0 holds 2 at \(0, 0, 0\); expected integers 0\.\.1"):
        read(str(tmp_path / "high.npy"), copies)
    with pytest.raises(ValueError, match=r"or <dataset>/<split>"):
        read("digits/tset", copies)
