"""`prepare`: a section of params.yaml -> raw bytes -> `<out>/{train,valid,test}/part-*.parquet` and manifest.json."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dgm_models.construct import ConfigError, construct, did_you_mean
from pipelines.data.datasets import INDEXED, TABLE, dataset_class
from pipelines.data.manifest import FILE, PART, SCHEMA, Manifest, Part, read_manifest
from pipelines.data.raw import SPLITS, Array, Dataset, Raw, checked, stored_dtype
from pipelines.data.shards import encode, part_of, write_synced
from pipelines.data.split import split_rows
from pipelines.data.whole import whole_folder
from pipelines.storage import place

if TYPE_CHECKING:
    from pipelines.params import Cluster


@dataclass(frozen=True)
class Settings:
    """What every dataset has in common.

    Args:
        seed: of the splits, of the order of the rows, and of data that are generated.
        split: (train, valid, test) fractions, used where the source fixes no split.
        rows_per_shard: rows of one parquet file; the last one of a split may hold fewer.
        parallel: read and write on Ray Data, block by block; for `image-folder` and `parquet`. The bytes are the same.
    """

    seed: int = 0
    split: tuple[float, float, float] = (0.8, 0.1, 0.1)
    rows_per_shard: int = 10_000
    parallel: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "split", tuple(self.split))
        if len(self.split) != 3 or not all(0 < part < 1 for part in self.split):
            raise ValueError(f"split: {self.split}; expected three fractions above 0: train, valid, test")
        if abs(sum(self.split) - 1) > 1e-6:
            raise ValueError(f"split: {self.split} sums to {sum(self.split):g}; expected 1")
        if self.rows_per_shard < 1:
            raise ValueError(f"rows_per_shard: {self.rows_per_shard}; expected at least 1")


@dataclass(frozen=True)
class Section:
    """A dataset by its name in the table, its own settings and the common ones."""

    name: str
    dataset: Dataset
    settings: Settings = Settings()

    @classmethod
    def of(cls, entries: Mapping[str, Any], path: str = "dataset") -> Section:
        """From one flat section: `{name: moons, rows: 1000, noise: 0.1, seed: 0, split: [0.8, 0.1, 0.1]}`.

        Args:
            entries: as read from YAML.
            path: where the section stands, for messages ("datasets.moons").
        Raises: ConfigError, a ValueError, for an unknown dataset, an unknown or missing key, an impossible value.
        """
        if "name" not in entries:
            raise ConfigError(f"{path}.name: missing{did_you_mean('', TABLE)}")
        dataset = dataset_class(entries["name"], path)
        common, own = inspect.signature(Settings).parameters, inspect.signature(dataset).parameters
        for key in entries:
            if key not in {*common, *own, "name"}:
                raise ConfigError(f"{path}.{key}: unknown key{did_you_mean(key, {*common, *own})}")
        chosen = construct(dataset, {key: value for key, value in entries.items() if key in own}, path)
        settings = construct(Settings, {key: value for key, value in entries.items() if key in common}, path)
        if settings.parallel and entries["name"] not in INDEXED:
            raise ConfigError(f"{path}.parallel: {entries['name']} is read at once; only {', '.join(INDEXED)} can be")
        return cls(entries["name"], chosen, settings)


def prepare(section: Section | Mapping[str, Any], out: Path | str, cluster: Cluster | None = None) -> Manifest:
    """Reads a dataset and writes it to `out`, whole or not at all; the same input gives the same bytes.

    Args:
        section: a `Section`, or one flat section as read from YAML.
        out: the dataset's folder, or s3://bucket/prefix; an earlier one is replaced.
        cluster: where Ray runs when the section says `parallel`; None for this machine.
    Raises: ValueError that names the dataset, the file, what was found and what is expected. `out` is then as before;
        on S3 it is without a manifest, which nothing reads.

    >>> prepare({"name": "moons", "rows": 1000, "split": [0.8, 0.1, 0.1]}, "data/moons").rows  # doctest: +SKIP
    {'train': 800, 'valid': 100, 'test': 100}
    """
    section = section if isinstance(section, Section) else Section.of(section)
    if section.settings.parallel:
        from pipelines.data.parallel import prepare_on_ray

        return prepare_on_ray(section, out, cluster)
    return write(section.name, section.dataset.read(section.settings.seed), section.settings, out)


def write(name: str, raw: Raw, settings: Settings, out: Path | str) -> Manifest:
    """Checks and writes rows that are already in memory: what `prepare` does after reading."""
    raw = checked(name, raw)
    shards = plan(split_rows(name, len(raw.x), raw.splits, settings.split, settings.seed, raw.groups), settings)
    ids = np.arange(len(raw.x)) if raw.ids is None else raw.ids
    with output(out) as put:
        made = []
        for path, rows in shards.items():
            labels = None if raw.labels is None else raw.labels[rows]
            shard, content = make_shard(path, ids[rows], raw.x[rows], labels, bool(raw.columns))
            put(path, content)
            made.append(shard)
        manifest = manifest_of(name, raw, raw.x.shape[1:], settings, made)
        put(FILE, manifest.to_json().encode())
    return manifest


def plan(splits: Mapping[str, Array], settings: Settings) -> dict[str, Array]:
    """Path of every shard -> its row numbers."""
    shards = {}
    for split, ids in splits.items():
        for number, start in enumerate(range(0, len(ids), settings.rows_per_shard)):
            shards[f"{split}/part-{number:05d}.parquet"] = ids[start : start + settings.rows_per_shard]
    return shards


@dataclass(frozen=True)
class Shard:
    """A shard that was made: what the manifest needs to know of it.

    Attributes:
        part: its file.
        low, high: of its values: one number for all of them, or one for every column of a table.
        mean, variance: likewise, when they are real numbers; 0 for levels.
    """

    part: Part
    low: Sequence[float]
    high: Sequence[float]
    mean: Sequence[float]
    variance: Sequence[float]


def make_shard(path: str, ids: Array, x: Array, labels: Array | None, by_column: bool = False) -> tuple[Shard, bytes]:
    """One shard and its bytes; arguments as `write_part`."""
    content = encode(ids, x, labels)
    parts = list(x.T) if by_column else [x.reshape(-1)]
    columns = [np.ascontiguousarray(part) for part in parts]  # sums depend on the layout
    real = x.dtype.kind == "f"
    return Shard(
        part_of(path, len(ids), content),
        [float(column.min()) for column in columns],
        [float(column.max()) for column in columns],
        [float(column.mean(dtype="f8")) if real else 0.0 for column in columns],
        [float(column.var(dtype="f8")) if real else 0.0 for column in columns],
    ), content


def manifest_of(name: str, raw: Raw, shape: tuple[int, ...], settings: Settings, shards: list[Shard]) -> Manifest:
    """The manifest of these shards.

    Args:
        raw: what is known of the data; its rows are not looked at.
        shape: of a row.
        shards: all of them, in the order of the plan.
    Raises: ValueError when train is constant.
    """
    train = [shard for shard in shards if shard.part.split == "train"]
    location, scale = _affine(name, raw.levels, raw.columns, train)
    return Manifest(
        schema=SCHEMA,
        name=name,
        kind=raw.kind,
        shape=shape,
        dtype=stored_dtype(raw.levels),
        levels=raw.levels,
        classes=raw.classes,
        class_names=raw.class_names,
        location=location,
        scale=scale,
        rows={split: sum(shard.part.rows for shard in shards if shard.part.split == split) for split in SPLITS},
        parts=tuple(shard.part for shard in shards),
        split=settings.split,
        split_seed=settings.seed,
        licence=raw.licence,
        source=raw.source,
        entropy_nats=raw.entropy_nats,
        factors=raw.factors,
        columns=raw.columns,
    )


def _affine(name: str, levels: int | None, columns: Sequence[str], train: list[Shard]) -> Any:
    """(mean, standard deviation) of all values of train for real data, of each column of a table; (0, 1) for levels.

    Shard by shard, so that it is the same number whoever made the shards: the variance is the mean of the shards'
    variances plus the variance of their means.
    """
    low, high = (
        [pick(of_shards) for of_shards in zip(*(getattr(shard, end) for shard in train), strict=True)]
        for end, pick in (("low", min), ("high", max))
    )
    if levels is not None:
        if min(low) == max(high):
            raise ValueError(f"{name}: every value of train is {min(low):g}; expected data that vary")
        return 0.0, 1.0
    for number, (least, most) in enumerate(zip(low, high, strict=True)):
        if least == most:
            what = f"column {columns[number]!r}" if columns else "every value"
            way = "leave it out: name the others in `columns`" if columns else "expected data that vary"
            raise ValueError(f"{name}: {what} of train is {least:g}; {way}")
    weights = [shard.part.rows / sum(shard.part.rows for shard in train) for shard in train]
    found = [_moments(weights, [(shard.mean[i], shard.variance[i]) for shard in train]) for i in range(len(low))]
    return tuple(zip(*found, strict=True)) if columns else found[0]


def _moments(weights: Sequence[float], shards: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(mean, standard deviation) of a column from its (mean, variance) in every shard."""
    mean = math.fsum(weight * shard_mean for weight, (shard_mean, _) in zip(weights, shards, strict=True))
    variance = math.fsum(
        weight * (shard_variance + (shard_mean - mean) ** 2)
        for weight, (shard_mean, shard_variance) in zip(weights, shards, strict=True)
    )
    return mean, math.sqrt(variance)


@contextmanager
def output(out: Path | str) -> Iterator[Callable[[str, bytes], None]]:
    """`put(name, content)` for the files of a dataset, of which the manifest is the last.

    A local folder appears whole when the block ends well. On S3 the earlier manifest is removed first, and what the new
    one does not name last.
    """
    target = place(out)
    if target.local:
        with whole_folder(target.local, FILE) as folder:

            def write_below(name: str, content: bytes) -> None:
                (folder / name).parent.mkdir(exist_ok=True)
                write_synced(folder / name, content)

            yield write_below
        return
    target.delete(FILE)

    def write_there(name: str, content: bytes) -> None:
        target.write(name, content)

    yield write_there
    named = {part.path for part in read_manifest(out).parts}
    for entry in target.list():
        if PART.fullmatch(entry.name) and entry.name not in named:
            target.delete(entry.name)
