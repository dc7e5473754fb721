"""Two of the tables on which flows are compared, as the MAF paper prepares them."""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass

import numpy as np

from dgm_models.construct import did_you_mean
from pipelines.data.fetch import RawFile, fetch
from pipelines.data.raw import Array, Raw, Source

HOME = "https://zenodo.org/record/1161203/files/"
ARCHIVE = RawFile("uci-real", ("data.tar.gz",), HOME, "")
NOISE_SEED = 42  # of the source's shuffling and noise
COLUMNS = {"power": 8, "miniboone": 43}


@dataclass(frozen=True)
class UciReal:
    """Rows with the splits and the scaling of the papers' tables, so that nats compare with theirs.

    Every column has mean 0 and standard deviation 1 over train and valid together: that is the published data.
    No checksum is published, so the archive is held to the sum of its first use. It is unpacked in memory.

    Args:
        which: power (6 values) or miniboone (43).
        mirror: a folder, file://, http(s):// or s3:// prefix with uci-real/data.tar.gz; None is the public home.
            DGM_DATA_MIRROR takes precedence.

    Source: Papamakarios, Pavlakou, Murray 2017, arXiv:1705.07057, its appendix on data; zenodo 1161203.
    """

    which: str
    mirror: str | None = None

    def __post_init__(self) -> None:
        if self.which not in COLUMNS:
            raise ValueError(f"which: {self.which!r} is not known{did_you_mean(self.which, COLUMNS)}")

    def read(self, seed: int) -> Raw:
        got = fetch(ARCHIVE, self.mirror)
        x = _member(got.content, f"{self.which}/data.npy", got.label)
        if x.ndim != 2 or x.shape[1] != COLUMNS[self.which] or x.dtype.kind != "f":
            expected = f"floats [N, {COLUMNS[self.which]}]"
            raise ValueError(f"uci-real: {self.which}/data.npy holds {x.dtype} {x.shape}; expected {expected}")
        x = noisy_power(x) if self.which == "power" else x.astype(np.float64)
        test = len(x) - int(0.1 * len(x))
        valid = test - int(0.1 * test)
        x = (x - x[:test].mean(0)) / x[:test].std(0)
        return Raw(
            x=x,
            kind="vector",
            splits={"train": (0, valid), "valid": (valid, test), "test": (test, len(x))},
            licence="not stated by the source",
            source=Source(f"{HOME}{ARCHIVE.names[0]}", {ARCHIVE.names[0]: got.sha256}),
        )


def noisy_power(x: Array) -> Array:
    """[N, 6] of the file's [N, 8]: rows shuffled, two columns left out, uniform noise as wide as a column's steps."""
    rng = np.random.RandomState(NOISE_SEED)
    x = x.astype(np.float64)
    rng.shuffle(x)
    voltage, active, meters = 0.01 * rng.rand(len(x), 1), 0.001 * rng.rand(len(x), 1), rng.rand(len(x), 3)
    return np.delete(x, [1, 3], 1) + np.hstack([active, voltage, meters, np.zeros((len(x), 1))])


def _member(archive: bytes, name: str, label: str) -> Array:
    """A .npy of a tar archive. Raises: ValueError naming what is not there, or is none."""
    try:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            for member in tar:
                if member.isfile() and member.name.endswith(name):
                    file = tar.extractfile(member)
                    assert file is not None
                    return np.asarray(np.load(io.BytesIO(file.read()), allow_pickle=False))
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise ValueError(f"{label}: {name}: {error}; expected a tar archive with this .npy in it") from error
    raise ValueError(f"{label}: no {name} in it; expected the archive of zenodo 1161203")
