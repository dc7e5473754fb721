"""The eight binary sets of the papers on autoregressive density estimation, with the splits of their source."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dgm_models.construct import did_you_mean
from pipelines.data.fetch import RawFile, fetch
from pipelines.data.raw import SPLITS, Array, Raw, Source

HOME = "http://www.cs.toronto.edu/~larocheh/public/datasets/"
ALPHABET = tuple("abcdefghijklmnopqrstuvwxyz")
OCR_HOME = "http://ai.stanford.edu/~btaskar/ocr/"


@dataclass(frozen=True)
class Published:
    """One set as its source publishes it.

    Attributes:
        folder: below the home.
        file: its name, with {} for the split.
        dims: values of a row.
        rows: of train, valid and test.
        targets: the file's label of each class; () where its label says nothing.
    """

    folder: str
    file: str
    dims: int
    rows: tuple[int, int, int]
    targets: tuple[int, ...]


SETS: dict[str, Published] = {
    "adult": Published("adult", "a5a_{}.libsvm", 123, (5000, 1414, 26147), (-1, 1)),
    "connect4": Published("connect-4", "connect-4_{}.libsvm", 126, (16000, 4000, 47557), (-1, 0, 1)),
    "dna": Published("dna", "dna_scale_{}.libsvm", 180, (1400, 600, 1186), (1, 2, 3)),
    "mushrooms": Published("mushrooms", "mushrooms_{}.libsvm", 112, (2000, 500, 5624), (1, 2)),
    "nips": Published("nips-0-12", "nips-0-12_all_shuffled_bidon_target_{}.amat", 500, (400, 100, 1240), ()),
    "ocr-letters": Published("ocr-letters", "letter.data.gz", 128, (32152, 10000, 10000), tuple(range(26))),
    "rcv1": Published("rcv1", "rcv1_all_subset.binary_{}_voc_150.amat", 150, (40000, 10000, 150000), (0, 1)),
    "web": Published("web", "w6a_{}.libsvm", 300, (14000, 3188, 32561), (-1, 1)),
}


@dataclass(frozen=True)
class UciBinary:
    """Vectors of 0 and 1; no checksum is published, so a file is held to the sum of its first use.

    Args:
        which: adult (123 values), connect4 (126), dna (180), mushrooms (112), nips (500, without labels), ocr-letters
            (128: 16 x 8 pixels), rcv1 (150) or web (300).
        mirror: a folder, file://, http(s):// or s3:// prefix with a subfolder uci-binary/<folder>/; None is the public
            home. DGM_DATA_MIRROR takes precedence.

    Source: Larochelle, Bengio, Turian 2010, "Tractable multivariate binary density estimation and the restricted
    Boltzmann forest"; the letters are Taskar's (2003), in the order and with the splits of Larochelle's mlpython.
    """

    which: str
    mirror: str | None = None

    def __post_init__(self) -> None:
        if self.which not in SETS:
            raise ValueError(f"which: {self.which!r} is not known{did_you_mean(self.which, SETS)}")

    def read(self, seed: int) -> Raw:
        published = SETS[self.which]
        parts, sums = (_letters if self.which == "ocr-letters" else _parts)(published, self.mirror)
        ends = np.cumsum([0, *(len(x) for x, _ in parts)]).tolist()
        for split, (x, _), expected in zip(SPLITS, parts, published.rows, strict=True):
            if len(x) != expected:
                raise ValueError(f"uci-binary: {self.which}: {len(x)} rows of {split}; expected {expected}")
        labels = np.concatenate([targets for _, targets in parts])
        place = {target: number for number, target in enumerate(published.targets)}
        unknown = sorted(set(labels.tolist()) - place.keys()) if place else []
        if unknown:
            raise ValueError(f"uci-binary: {self.which}: labels {unknown}; expected {list(published.targets)}")
        return Raw(
            x=np.concatenate([x for x, _ in parts]),
            kind="vector",
            levels=2,
            labels=np.array([place[target] for target in labels.tolist()], np.int32) if place else None,
            classes=len(place),
            splits={split: (ends[i], ends[i + 1]) for i, split in enumerate(SPLITS)},
            licence="not stated by the source",
            source=Source(OCR_HOME if self.which == "ocr-letters" else f"{HOME}{published.folder}/", sums),
        )


Parts = tuple[list[tuple[Array, Array]], dict[str, str]]  # (x [N, D] uint8, targets [N]) a split; sums of the files


def _parts(published: Published, mirror: str | None) -> Parts:
    parse: Callable[[str, bytes, int], tuple[Array, Array]] = (
        parse_libsvm if published.file.endswith(".libsvm") else parse_amat
    )
    parts, sums = [], {}
    for split in SPLITS:
        name = published.file.format(split)
        got = fetch(RawFile(f"uci-binary/{published.folder}", (name,), f"{HOME}{published.folder}/", ""), mirror)
        parts.append(parse(got.label, got.content, published.dims))
        sums[name] = got.sha256
    return parts, sums


def parse_libsvm(label: str, content: bytes, dims: int) -> tuple[Array, Array]:
    """Lines of `target index:value ...`, indices from 1, what is not named being 0 -> (x [N, dims], targets [N])."""
    lines = content.decode("ascii", "replace").splitlines()
    x, targets = np.zeros((len(lines), dims), np.uint8), np.zeros(len(lines), np.int64)
    for row, line in enumerate(lines):
        target, *cells = line.split() or [""]
        try:
            targets[row] = int(target)
            for cell in cells:
                index, _, value = cell.partition(":")
                if not 1 <= int(index) <= dims or float(value) not in (0.0, 1.0):
                    raise ValueError(cell)
                x[row, int(index) - 1] = float(value)
        except ValueError as error:
            expected = f"a target and index:1 with indices 1 to {dims}"
            raise ValueError(f"{label}: line {row + 1}: {error}; expected {expected}") from error
    return x, targets


def parse_amat(label: str, content: bytes, dims: int) -> tuple[Array, Array]:
    """Lines of `dims` digits 0 or 1 and a target -> (x [N, dims], targets [N])."""
    rows = []
    for number, line in enumerate(content.decode("ascii", "replace").splitlines(), 1):
        cells = line.split()
        if len(cells) != dims + 1 or not set(cells[:-1]) <= {"0", "1"} or not cells[-1].lstrip("+-").isdigit():
            raise ValueError(f"{label}: line {number} has {len(cells)} cells; expected {dims} of 0 and 1, and a target")
        rows.append(cells)
    table = np.array(rows, np.int64).reshape(len(rows), dims + 1)
    return table[:, :-1].astype(np.uint8), table[:, -1]


def _letters(published: Published, mirror: str | None) -> Parts:
    got = fetch(RawFile(f"uci-binary/{published.folder}", (published.file,), OCR_HOME, ""), mirror)
    x, targets = parse_letters(got.label, got.content, published.dims)
    order = shuffled(len(x))
    ends = np.cumsum(published.rows)[:-1]
    parts = list(zip(np.split(x[order], ends), np.split(targets[order], ends), strict=True))
    return parts, {published.file: got.sha256}


def parse_letters(label: str, content: bytes, dims: int) -> tuple[Array, Array]:
    """Lines of six cells, the second of them the letter, and `dims` pixels, with tabs between them."""
    pixels, targets = [], []
    for number, line in enumerate(content.decode("ascii", "replace").splitlines(), 1):
        cells = line.strip("\t").split("\t")
        if len(cells) != dims + 6 or not set(cells[6:]) <= {"0", "1"} or cells[1] not in ALPHABET:
            expected = f"six, the second of them a letter, and {dims} of 0 and 1"
            raise ValueError(f"{label}: line {number} has {len(cells)} cells; expected {expected}")
        pixels.append(cells[6:])
        targets.append(ALPHABET.index(cells[1]))
    return np.array(pixels, np.uint8).reshape(len(pixels), dims), np.array(targets)


def shuffled(count: int) -> list[int]:
    """The source's order: `random.shuffle` of Python 2 with seed 12345, which draws otherwise than that of Python 3."""
    rng, order = random.Random(12345), list(range(count))
    for last in range(count - 1, 0, -1):
        other = int(rng.random() * (last + 1))
        order[last], order[other] = order[other], order[last]
    return order
