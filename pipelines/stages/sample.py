"""sample: an artifact -> `samples/<run>/`: sharded parquet in the stored type, and a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pipelines import files, paths
from pipelines.params import Params

if TYPE_CHECKING:
    from dgm_models.method import Method
    from dgm_models.protocols import DataSpec

SHARD = 10_000


def locate(target: str, into: Path) -> Path:
    """The artifact folder of a run, a folder, or a registry URI such as models:/digits@champion (fetched to `into`).

    Raises: ValueError that names the target and what is accepted.
    """
    if target.startswith("models:/"):
        from pipelines.registration import fetch

        return fetch(target, into / "artifact")
    for folder in (paths.artifact(target), Path(target)):
        if (folder / "spec.json").is_file():
            return folder
    raise ValueError(
        f"{target!r} is no trained run (artifacts/{target}), no artifact's folder and no models:/<name>@<alias>"
    )


def write(x: Tensor, folder: Path) -> None:
    """Stored samples [N, *event] as parquet shards with a sealed manifest."""
    import numpy as np

    from pipelines.data.shards import write_part

    for number, start in enumerate(range(0, len(x), SHARD)):
        rows = x[start : start + SHARD].numpy()
        write_part(folder, f"part-{number:05d}.parquet", np.arange(start, start + len(rows)), rows, None)


def read(folder: Path, shape: tuple[int, ...]) -> Tensor:
    """What `write` wrote, verified."""
    import numpy as np
    import pyarrow.parquet as pq
    import torch

    from dgm_models.training import checkpoint

    checkpoint.verify(folder)
    dtype = np.dtype(files.read_json(folder / "samples.json")["dtype"])
    parts = []
    for path in sorted(folder.glob("part-*.parquet")):
        values = pq.read_table(path)["x"].combine_chunks()
        parts.append(np.frombuffer(b"".join(values.to_pylist()), dtype).reshape(-1, *shape))
    return torch.from_numpy(np.concatenate(parts).copy())


def sample_stage(run: str, out: Path, params: Params) -> None:
    """As many samples as the evaluation compares, by `evaluation.seed`."""
    import dgm_models
    from pipelines import pictures
    from pipelines.stages.evaluate import drawn

    method = dgm_models.load(paths.artifact(run))
    x = drawn(method, params.dataset_of(run), params.evaluation)
    with files.whole(out, seal=True) as folder:
        write(x, folder)
        files.write_json(
            folder / "samples.json",
            {"n": len(x), "seed": params.evaluation.seed, "dtype": str(x.numpy().dtype), "run": run,
             "run_digest": method.lineage.get("run_digest"), "evaluations": method.model.evaluations},
        )  # fmt: skip
        (folder / "grid.png").write_bytes(pictures.grid(x[:64], method.data))


def sample_like(method: Method, rows: str, seed: int) -> Tensor:
    """One sample for each of a user's examples, asked for by the model's condition: edges, the rest of an image.

    Args:
        method: a trained method with a condition of images.
        rows: examples; see `rows.read`.
        seed: of the samples, and of conditions that are drawn.
    Raises: ValueError naming the rows when they are no such examples.
    """
    import dgm_models
    from dgm_models.sampling import conditions
    from pipelines.stages.rows import read

    x, labels = read(rows, method)
    cond = conditions(method, x, labels, seed)
    if cond is None:
        raise ValueError(f"--like: {method.name} was built without a condition")
    return dgm_models.sample(method, len(x), seed, cond=cond)


def settings(pairs: Sequence[str]) -> dict[str, Any]:
    """`--set key=value` options as settings of a sampler; a value is read as YAML reads it.

    Raises: ValueError naming the option that is no pair, or the key that is given twice.
    """
    from ruamel.yaml import YAML

    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals and value):
            raise ValueError(f"--set: {pair!r}; expected key=value, such as temperature=0.7")
        if key in found:
            raise ValueError(f"--set: {key} is given twice")
        found[key] = YAML(typ="safe", pure=True).load(value)
    return found


def known_part(text: str, data: DataSpec) -> Tensor:
    """What `--known` says: "top:0.5" or "left:0.5", a share of an example's rows or columns, or a .npy of a mask.

    Args:
        text: as given.
        data: what one example is. A vector that is shown as a picture has that picture's rows and columns; any other
            event's last axis runs from left to right and the one before it from the top.
    Returns: [*event] bool, or [N, *event] where the mask's file has a mask for every example.
    Raises: ValueError naming the option and what is expected.
    """
    import numpy as np
    import torch

    from pipelines import pictures

    side, colon, number = text.partition(":")
    if side in ("top", "left") and colon:
        try:
            share = float(number)
        except ValueError:
            share = math.nan
        if not 0 <= share < 1:
            raise ValueError(f"--known: {text}: {number!r} is no share from 0 to below 1, such as {side}:0.5")
        shape = pictures.tile(data) or data.shape
        axis = len(shape) - (1 if side == "left" else 2)
        if axis < 0:
            raise ValueError(f"--known: {text}: {data.kind} {data.shape} has no rows; give left:{number}, or a .npy")
        known = torch.zeros(shape, dtype=torch.bool)
        known.narrow(axis, 0, round(share * shape[axis])).fill_(True)
        return known.reshape(data.shape)
    try:
        mask = np.load(text, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"--known: {text}: {error}; expected top:0.5, left:0.5 or a .npy of a mask") from error
    if not isinstance(mask, np.ndarray) or mask.dtype.kind not in "biu" or (mask != mask.astype(bool)).any():
        raise ValueError(f"--known: {text} is no mask; expected a .npy of false and true, or 0 and 1, {data.shape}")
    return torch.from_numpy(mask.astype(bool))


def completed(
    method: Method, x: Tensor, labels: Tensor | None, known: Tensor, draws: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Stored examples [N, *event] completed several times: [N, draws, *event], and what was known [N, *event] bool.

    Args:
        labels: [N], for a model that is asked for labels.
        known: [*event] bool, or [N, *event].
        draws: completions of every example.
        seed: of the draws.
    """
    from dgm_models.sampling import complete, conditions

    if known.shape not in (x.shape, x.shape[1:]):
        expected = f"{method.data.shape} or {tuple(x.shape)}"
        raise ValueError(f"--known: a mask of shape {tuple(known.shape)}; expected {expected}")
    known = known.expand(x.shape)
    cond = conditions(method, x, labels, seed)
    asked = None if cond is None else cond.repeat_interleave(draws, 0)
    found = complete(method, x.repeat_interleave(draws, 0), known.repeat_interleave(draws, 0), seed, asked)
    return found.unflatten(0, (len(x), draws)), known


def completions(x: Tensor, known: Tensor, drawn: Tensor, data: DataSpec) -> bytes:
    """A PNG of one row an example: the original, what is known of it, the draws [N, draws, *event].

    Raises: ValueError for data whose examples are no pictures.
    """
    import torch

    from pipelines import pictures

    shown = torch.cat([x[:, None], x[:, None], drawn], 1)
    hidden = torch.zeros(shown.shape, dtype=torch.bool)
    hidden[:, 1] = ~known
    return pictures.table(shown.flatten(0, 1), data, shown.shape[1], hidden.flatten(0, 1))
