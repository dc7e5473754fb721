"""likelihood: how probable a user's rows are under a trained model, beside held-out rows of its dataset."""

from __future__ import annotations

import csv
import functools
import io
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines import files, paths
from pipelines.data import shards
from pipelines.stages.rows import read
from pipelines.stages.sample import locate

HELD_OUT = 1000  # rows of valid that a row is ranked among, at most
HELD_OUT_ODE = 256  # of them by the ODE, which takes 50 to 250 passes forward and back


def likelihood(
    target: str, rows: str, importance: int, seed: int, out: Path | None, ode: bool = False
) -> dict[str, Any]:
    """The mean log-likelihood of rows with its interval, and each row's rank.

    Args:
        target: a run, an artifact's folder or a registry URI.
        rows: a file of examples or "<dataset>/<split>"; see `rows.read`.
        importance: draws of the bound, for models that have no density.
        seed: of dequantisation and of the draws.
        out: gets one line a row: number, nats, bits/dim, rank. The rank is the share of held-out rows that are less
            probable than the row: near 0 for an outlier. Nothing without a prepared dataset of the model.
        ode: by the probability-flow ODE of a diffusion model, an estimate, in place of its bound.
    Returns: {model, method, rows, kind, n, importance, nats: {value, low, high}, bits_per_dim or None, outliers}.
        `outliers` is the share of rows less probable than 99% of the held-out rows, None without them.
    Raises: ValueError that names the rows and what is expected.
    """
    import dgm_models
    from dgm_models.likelihood import ode_log_prob
    from dgm_models.metrics.likelihood import bits_per_dim, mean_estimate
    from dgm_models.protocols import Density

    if out is not None and out.suffix != ".csv":
        raise ValueError(f"--out: {out} is no .csv file")
    with tempfile.TemporaryDirectory(prefix="dgm-") as folder:
        method = dgm_models.load(locate(target, Path(folder)))
    x, labels = read(rows, method)
    if ode:
        told = functools.partial(ode_log_prob, method, seed=seed)
    else:
        told = functools.partial(dgm_models.log_prob, method, importance=importance, seed=seed)
    nats, kind = told(x, labels)
    levels = method.data.levels
    bits = None if levels is None else bits_per_dim(-nats, method.data.dims)
    ranks = rank(nats, held_out(method, told, HELD_OUT_ODE if ode else HELD_OUT))
    if out is not None:
        files.write_bytes(out, table(nats, bits, ranks).encode())
    return {
        "model": target,
        "method": method.name,
        "rows": rows,
        "kind": kind,
        "n": len(nats),
        "importance": None if ode or isinstance(method.model, Density) else importance,
        "nats": asdict(mean_estimate(nats)) if len(nats) > 1 else {"value": float(nats[0]), "low": None, "high": None},
        "bits_per_dim": None if bits is None else float(bits.mean()),
        "outliers": None if ranks is None else float((ranks < 0.01).double().mean()),
    }


def held_out(method: Any, told: Callable[..., tuple[Tensor, str]], n: int) -> Tensor | None:
    """What `told` says of the first n valid rows of the model's dataset; None where that is not prepared here."""
    folder = paths.data(str(method.lineage.get("dataset")))
    if not (folder / "manifest.json").is_file():
        return None
    valid = shards.load(folder, "valid")
    return told(valid.x[:n], None if valid.cond is None else valid.cond[:n])[0]


def rank(nats: Tensor, among: Tensor | None) -> Tensor | None:
    """[N] in [0, 1]: the share of `among` below each value, half of those that are equal."""
    if among is None:
        return None
    among = among.sort().values
    below = torch.searchsorted(among, nats) + torch.searchsorted(among, nats, right=True)
    return below.double() / (2 * len(among))


def table(nats: Tensor, bits: Tensor | None, ranks: Tensor | None) -> str:
    """CSV of one line a row."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    columns = {"nats": nats, "bits_per_dim": bits, "rank": ranks}
    given = {name: values.tolist() for name, values in columns.items() if values is not None}
    writer.writerow(["row", *given])
    writer.writerows([number, *values] for number, values in enumerate(zip(*given.values(), strict=True)))
    return stream.getvalue()


def words(found: dict[str, Any]) -> str:
    """The result as one paragraph."""
    nats, kind = found["nats"], {"exact": "exact", "bound": "a lower bound", "estimate": "an estimate"}[found["kind"]]
    if found["importance"]:
        kind += f", {found['importance']} draws"
    interval = "" if nats["low"] is None else f" [{nats['low']:.2f}, {nats['high']:.2f}]"
    lines = [f"{found['rows']}: log p = {nats['value']:.2f}{interval} nats a row ({kind}), {found['n']} rows"]
    if found["bits_per_dim"] is not None:
        lines.append(f"bits/dim {found['bits_per_dim']:.4f}")
    if found["outliers"] is not None:
        lines.append(f"{found['outliers']:.1%} of the rows are less probable than 99% of held-out rows")
    return "\n".join(lines)
