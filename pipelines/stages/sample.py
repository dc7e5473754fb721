"""sample: an artifact -> `samples/<run>/`: sharded parquet in the stored type, and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from pipelines import files, paths
from pipelines.params import Params

if TYPE_CHECKING:
    from dgm_models.method import Method

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
             "run_digest": method.lineage.get("run_digest")},
        )  # fmt: skip
        (folder / "grid.png").write_bytes(pictures.grid(x[:64], method.data))


def sample_like(method: Method, file: Path, seed: int) -> Tensor:
    """One sample for each of a user's examples, asked for by the model's condition: edges, the rest of an image.

    Args:
        method: a trained method with a condition of images.
        file: a .npy of examples [N, *event] in the stored type.
        seed: of the samples, and of conditions that are drawn.
    Raises: ValueError naming the file when it does not hold such examples.
    """
    import numpy as np
    import torch

    import dgm_models
    from dgm_models.sampling import conditions

    try:
        rows = torch.from_numpy(np.load(file, allow_pickle=False))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"--like: {file}: {error}; expected a .npy of examples {method.data.shape}") from error
    if tuple(rows.shape[1:]) != method.data.shape:
        raise ValueError(f"--like: {file} holds {tuple(rows.shape)}; expected [N, *{method.data.shape}]")
    cond = conditions(method, rows, None, seed)
    if cond is None:
        raise ValueError(f"--like: {method.name} was built without a condition")
    return dgm_models.sample(method, len(rows), seed, cond=cond)
