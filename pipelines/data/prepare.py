"""`prepare`: a section of params.yaml -> raw bytes -> `<out>/{train,valid,test}/part-*.parquet` and manifest.json."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgm_models.construct import ConfigError, construct, did_you_mean
from pipelines.data.datasets import TABLE, dataset_class
from pipelines.data.manifest import FILE, SCHEMA, Manifest, Part
from pipelines.data.raw import Array, Dataset, Raw, checked
from pipelines.data.shards import write_part, write_synced
from pipelines.data.split import split_rows
from pipelines.data.whole import whole_folder


@dataclass(frozen=True)
class Settings:
    """What every dataset has in common.

    Args:
        seed: of the splits, of the order of the rows, and of data that are generated.
        split: (train, valid, test) fractions, used where the source fixes no split.
        rows_per_shard: rows of one parquet file; the last one of a split may hold fewer.
    """

    seed: int = 0
    split: tuple[float, float, float] = (0.8, 0.1, 0.1)
    rows_per_shard: int = 10_000

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
        return cls(entries["name"], chosen, settings)


def prepare(section: Section | Mapping[str, Any], out: Path | str) -> Manifest:
    """Reads a dataset and writes it to `out`, whole or not at all; the same input gives the same bytes.

    Args:
        section: a `Section`, or one flat section as read from YAML.
        out: the dataset's folder; an earlier one is replaced.
    Raises: ValueError that names the dataset, the file, what was found and what is expected. `out` is then as before.

    >>> prepare({"name": "moons", "rows": 1000, "split": [0.8, 0.1, 0.1]}, "data/moons").rows  # doctest: +SKIP
    {'train': 800, 'valid': 100, 'test': 100}
    """
    section = section if isinstance(section, Section) else Section.of(section)
    return write(section.name, section.dataset.read(section.settings.seed), section.settings, out)


def write(name: str, raw: Raw, settings: Settings, out: Path | str) -> Manifest:
    """Checks and writes rows that are already in memory: what `prepare` does after reading."""
    raw = checked(name, raw)
    splits = split_rows(name, len(raw.x), raw.splits, settings.split, settings.seed)
    location, scale = _affine(name, raw, splits["train"])
    with whole_folder(Path(out), FILE) as folder:
        parts = [part for split, ids in splits.items() for part in _write_split(folder, split, ids, raw, settings)]
        manifest = Manifest(
            schema=SCHEMA,
            name=name,
            kind=raw.kind,
            shape=raw.x.shape[1:],
            dtype=str(raw.x.dtype),
            levels=raw.levels,
            classes=raw.classes,
            class_names=raw.class_names,
            location=location,
            scale=scale,
            rows={split: len(ids) for split, ids in splits.items()},
            parts=tuple(parts),
            split=settings.split,
            split_seed=settings.seed,
            licence=raw.licence,
            source=raw.source,
            entropy_nats=raw.entropy_nats,
        )
        write_synced(folder / FILE, manifest.to_json().encode())
    return manifest


def _write_split(folder: Path, split: str, ids: Array, raw: Raw, settings: Settings) -> list[Part]:
    parts = []
    for number, start in enumerate(range(0, len(ids), settings.rows_per_shard)):
        here = ids[start : start + settings.rows_per_shard]
        labels = None if raw.labels is None else raw.labels[here]
        parts.append(write_part(folder, f"{split}/part-{number:05d}.parquet", here, raw.x[here], labels))
    return parts


def _affine(name: str, raw: Raw, train: Array) -> tuple[float, float]:
    """(mean, standard deviation) of all values of train for real data, (0, 1) for levels."""
    x = raw.x[train]
    if x.min() == x.max():
        raise ValueError(f"{name}: every value of train is {x.min()}; expected data that vary")
    if raw.levels is not None:
        return 0.0, 1.0
    return float(x.mean(dtype="float64")), float(x.std(dtype="float64"))
