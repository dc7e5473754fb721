"""encode: a trained run with codes and its dataset -> `data/<codes>/`: an ordinary dataset of kind "codes".

Codes are whole numbers, such as those of a codebook, or real ones: latents drawn from their posterior. Those are stored
as they are, and the manifest's location and scale, of all values of train, give the prior values of variance 1.

What made the codes lies beside them, as an artifact: a prior that is trained on them needs nothing else to become a
model of the data. Its sha256 stands in the manifest, so that it is part of the identity of every such training.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dgm_models import noise
from dgm_models.protocols import Codes, Model
from pipelines import paths
from pipelines.data import shards
from pipelines.data.manifest import Manifest, read_manifest
from pipelines.data.prepare import Settings, write
from pipelines.data.raw import SPLITS, Raw, Source
from pipelines.params import Params

BLOCK = 256  # rows at once: floats differ between batch sizes, and a code is the nearest one of floats


def codes_of(model: Model, x: Tensor, ids: Tensor) -> Tensor:
    """The codes [N, *code_spec.shape] of stored x [N, *event] with row numbers [N]; all blocks have as many rows."""
    assert isinstance(model, Codes)
    blocks = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the number of threads changes the last bits
    try:
        for part, rows in zip(x.split(BLOCK), ids.split(BLOCK), strict=True):
            padded = torch.arange(BLOCK) % len(part)
            key = noise.fold(rows[padded], "encode")
            encoded, _ = model.codec.encode(part[padded], key)
            blocks.append(model.codes(encoded, key)[: len(part)])
    finally:
        torch.set_num_threads(threads)
    return torch.cat(blocks)


def encode_stage(key: str, out: Path, params: Params) -> Manifest:
    """Writes the codes of every row, in the splits and with the labels of the dataset; the same twice.

    Raises: ValueError when the run was trained on other data than the dataset holds now.
    """
    from dgm_models import method as library

    run, dataset = params.codes[key].run, params.codes[key].dataset
    method = library.load(paths.artifact(run))
    known, model = read_manifest(paths.data(dataset)), method.model
    if not isinstance(model, Codes):
        raise ValueError(f"codes.{key}.run: {run} is a {method.name}, which has no codes")
    if model.condition:
        raise ValueError(f"codes.{key}.run: {run} was built with a {model.condition.name}; train it without cond")
    if method.lineage.get("data_digest") != known.digest:
        raise ValueError(f"codes.{key}: {run} was trained on other data than data/{dataset} holds; run `dvc repro`")
    rows = {split: shards.load(paths.data(dataset), split) for split in SPLITS}
    ends = np.cumsum([0, *(len(part) for part in rows.values())])
    labels = [part.cond.numpy() for part in rows.values() if part.cond is not None]
    spec = model.code_spec
    raw = Raw(
        x=torch.cat([codes_of(method.model, part.x, part.id) for part in rows.values()]).numpy(),
        kind="codes",
        levels=spec.levels,
        labels=np.concatenate(labels) if labels else None,
        classes=known.classes,
        class_names=known.class_names,
        splits={split: (int(ends[i]), int(ends[i + 1])) for i, split in enumerate(SPLITS)},
        ids=torch.cat([part.id for part in rows.values()]).numpy(),
        factors=known.factors,
        licence=known.licence,
        source=Source(f"the codes of {method.name} on {dataset}", {"decoder": library.fingerprint(method)}),
    )
    manifest = write(key, raw, Settings(seed=known.split_seed), out)
    library.save(method, out / paths.decoder(key).name)
    return manifest
