"""Datasets: what `read` returns, and every refusal by name."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import inspect
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.data.datasets import TABLE, binarized_mnist, dataset_class, fashion_mnist, mnist
from pipelines.data.datasets.binarized_mnist import BinarizedMnist
from pipelines.data.datasets.digits import Digits
from pipelines.data.datasets.image_folder import ImageFolder
from pipelines.data.datasets.npy import Npy
from pipelines.data.raw import Array, Raw, Source, checked

RNG = np.random.default_rng(0)
IMAGES = {"train": RNG.integers(0, 256, (12, 28, 28), np.uint8), "t10k": RNG.integers(0, 256, (4, 28, 28), np.uint8)}
LABELS = {"train": np.arange(12, dtype=np.uint8) % 10, "t10k": np.arange(4, dtype=np.uint8)}


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DGM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DGM_DATA_MIRROR", str(tmp_path / "mirror"))


def idx(array: Array, magic: int | None = None, counted: int | None = None) -> bytes:
    """An unpacked IDX file; `magic` and `counted` plant a wrong header."""
    shape = (len(array) if counted is None else counted, *array.shape[1:])
    return struct.pack(f">I{array.ndim}I", magic or 0x0800 + array.ndim, *shape) + array.tobytes()


def mnist_files() -> dict[str, bytes]:
    files = {}
    for part in IMAGES:
        files[f"{part}-images"] = idx(IMAGES[part])
        files[f"{part}-labels"] = idx(LABELS[part])
    return files


def mirrored(module: ModuleType, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts `files` packed into the mirror and their sums into the module's table."""
    for key, content in files.items():
        file, packed = module.FILES[key], gzip.compress(content, mtime=0)
        changed = dataclasses.replace(file, checksum="md5:" + hashlib.md5(packed).hexdigest())
        monkeypatch.setitem(module.FILES, key, changed)
        (tmp_path / "mirror" / file.folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "mirror" / file.folder / file.names[0]).write_bytes(packed)


@pytest.mark.parametrize(("name", "module"), [("mnist", mnist), ("fashion-mnist", fashion_mnist)])
def test_mnist_reads_images_labels_and_the_fixed_test(
    name: str, module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirrored(module, mnist_files(), tmp_path, monkeypatch)
    raw = dataset_class(name)().read(seed=0)
    assert np.array_equal(raw.x[:, 0], np.concatenate([IMAGES["train"], IMAGES["t10k"]]))
    assert raw.labels is not None
    assert raw.labels.tolist() == [*LABELS["train"], *LABELS["t10k"]]
    assert (raw.kind, raw.levels, raw.classes, len(raw.class_names)) == ("image", 256, 10, 10)
    assert raw.splits == {"train": (0, 12), "test": (12, 16)}
    packed = (tmp_path / "mirror" / name / "t10k-labels-idx1-ubyte.gz").read_bytes()
    assert raw.source.files["t10k-labels-idx1-ubyte.gz"] == hashlib.sha256(packed).hexdigest()
    assert raw.source.origin == module.HOME


@pytest.mark.parametrize(
    ("key", "content", "words"),
    [
        ("train-images", idx(IMAGES["train"], magic=0x801), "train-images-idx3-ubyte.gz: magic number 0x00000801; exp"),
        ("t10k-labels", idx(LABELS["t10k"], magic=0x803), "t10k-labels-idx1-ubyte.gz: magic number 0x00000803; exp"),
        ("train-images", idx(IMAGES["train"])[:-1], "9407 values; the header's 12 x 28 x 28 expects 9408"),
        (
            "train-labels",
            idx(LABELS["train"], counted=13),
            "train-labels-idx1-ubyte.gz: 12 values; the header's 13 exp",
        ),
        ("train-labels", idx(LABELS["train"][:-1]), "11 labels; expected 12, one an image of mnist: train-images"),
        ("t10k-images", idx(IMAGES["t10k"][:, :27]), r"images of \(27, 28\); train has \(28, 28\)"),
        ("train-labels", idx(LABELS["train"])[:6], "train-labels-idx1-ubyte.gz: a header of 6 bytes; expected 8"),
        ("train-labels", b"", "train-labels-idx1-ubyte.gz: magic number 0x; expected 0x00000801"),
    ],
)
def test_mnist_refuses_a_damaged_file_by_name(
    key: str, content: bytes, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirrored(mnist, {**mnist_files(), key: content}, tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=rf"^mnist: .*{words}"):
        mnist.Mnist().read(0)


def test_mnist_takes_its_own_mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirrored(mnist, mnist_files(), tmp_path, monkeypatch)
    monkeypatch.delenv("DGM_DATA_MIRROR")
    assert len(mnist.Mnist(mirror=str(tmp_path / "mirror")).read(0).x) == 16


@pytest.mark.parametrize(("module", "name"), [(mnist, "mnist"), (fashion_mnist, "fashion-mnist")])
def test_mnist_refuses_other_bytes_than_the_published(module: ModuleType, name: str, tmp_path: Path) -> None:
    (tmp_path / "mirror" / name).mkdir(parents=True)
    (tmp_path / "mirror" / name / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(IMAGES["train"])))
    with pytest.raises(ValueError, match=rf"{name}: train-images-idx3-ubyte\.gz: .*expected md5 (f68b3c2d|8d4fb7e6)"):
        dataset_class(name)().read(0)


def amat(x: Array) -> bytes:
    return "".join(" ".join(map(str, row)) + "\n" for row in x.reshape(len(x), -1)).encode()


def binarized(contents: dict[str, bytes], packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "mirror" / "binarized-mnist"
    folder.mkdir(parents=True)
    for split, content in contents.items():
        file = binarized_mnist.FILES[split]
        changed = dataclasses.replace(file, checksum="sha256:" + hashlib.sha256(content).hexdigest())
        monkeypatch.setitem(binarized_mnist.FILES, split, changed)
        (folder / file.names[packed]).write_bytes(gzip.compress(content) if packed else content)


BINARY = {split: RNG.integers(0, 2, (n, 1, 28, 28), np.uint8) for split, n in (("train", 5), ("valid", 2), ("test", 3))}


@pytest.mark.parametrize("packed", [False, True])
def test_binarized_mnist_reads_its_three_splits(packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {split: amat(x) for split, x in BINARY.items()}
    binarized(texts, packed, tmp_path, monkeypatch)
    raw = BinarizedMnist().read(seed=0)
    assert np.array_equal(raw.x, np.concatenate(list(BINARY.values())))
    assert raw.splits == {"train": (0, 5), "valid": (5, 7), "test": (7, 10)}
    assert (raw.levels, raw.classes, raw.labels) == (2, 0, None)
    expected = {f"binarized_mnist_{split}.amat": hashlib.sha256(text).hexdigest() for split, text in texts.items()}
    assert raw.source.files == expected  # the same for both forms


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (amat(BINARY["valid"])[:-1], "3135 bytes; expected whole lines of 1568"),
        (b"", "0 bytes; expected whole lines"),
        (amat(BINARY["valid"]).replace(b"1", b"2", 1), "line 1 differs; expected 784 digits 0 or 1"),
        (amat(BINARY["valid"])[:-1] + b" ", "line 2 differs"),
    ],
)
def test_binarized_mnist_refuses_other_text_by_name(
    content: bytes, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binarized({"train": amat(BINARY["train"]), "valid": content}, False, tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=rf"^binarized-mnist: binarized_mnist_valid\.amat: {words}"):
        BinarizedMnist().read(0)


def test_digits_are_the_1797_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = Digits().read(seed=0)
    assert raw.x.shape == (1797, 1, 8, 8)
    assert (raw.x.max(), raw.levels, raw.classes) == (16, 17, 10)
    monkeypatch.setattr("pipelines.data.datasets.digits.SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"digits: scikit-learn's load_digits has sha256 fe61.*expected 000"):
        Digits().read(seed=0)


def save(path: Path, array: Any) -> str:
    np.save(path, array)
    return str(path)


def test_npy_reads_rows_and_labels(tmp_path: Path) -> None:
    x = RNG.normal(size=(6, 3))
    raw = Npy(save(tmp_path / "x.npy", x), labels=save(tmp_path / "y.npy", np.array([0, 1, 2, 0, 1, 2]))).read(0)
    assert np.array_equal(raw.x, x)
    assert raw.classes == 3
    assert raw.source.files["x.npy"] == hashlib.sha256((tmp_path / "x.npy").read_bytes()).hexdigest()


def test_npy_refuses_what_is_no_array_by_name(tmp_path: Path) -> None:
    whole = Path(save(tmp_path / "whole.npy", np.zeros((4, 3))))
    (tmp_path / "half.npy").write_bytes(whole.read_bytes()[:-8])
    (tmp_path / "empty.npy").write_bytes(b"")
    np.savez(tmp_path / "two.npz", a=np.zeros(2))
    np.save(tmp_path / "objects.npy", np.array([{}, {}], dtype=object), allow_pickle=True)
    for name in ("half.npy", "empty.npy", "two.npz", "objects.npy", "absent.npy"):
        with pytest.raises(ValueError, match=rf"^npy: .*{name}: .*expected|^npy: .*{name}: an archive"):
            Npy(str(tmp_path / name)).read(0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"kind": "picture"}, "kind: 'picture'; expected one of image"), ({"levels": 1}, "levels: 1; expected 2"),
     ({"kind": "tokens"}, "levels: None with kind 'tokens'")],
)  # fmt: skip
def test_npy_refuses_impossible_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Npy("x.npy", **settings)


def raw_of(x: Any, **changes: Any) -> Raw:
    settings: dict[str, Any] = {"kind": "vector", "licence": "-", "source": Source("-")}
    return Raw(np.asarray(x), **settings | changes)


ONE = np.array([[0.0, 1.0], [2.0, 3.0]])


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (raw_of(np.zeros((0, 2))), r"an array of shape \(0, 2\) without rows; expected at least one row"),
        (raw_of(np.zeros((3, 0))), r"an array of shape \(3, 0\); expected no axis of length 0"),
        (raw_of(np.float64(3)), r"an array of shape \(\) without rows"),
        (raw_of(np.zeros((3, 4)), kind="image"), r"an array of shape \(3, 4\); expected 4 axes, rows first, for k"),
        (raw_of(np.zeros((3, 2, 2))), r"an array of shape \(3, 2, 2\); expected 2 axes, rows"),
        (raw_of(np.ones((3, 2))), r"every value is 1\.0; expected data that vary"),
        (raw_of([[0.0, 1.0], [2.0, np.nan]]), r"row 1 holds nan at \(1,\); expected finite float32"),
        (raw_of([[0.0, -np.inf], [2.0, 1.0]]), r"row 0 holds -inf at \(1,\); expected finite"),
        (raw_of([[0.0, 1e300], [2.0, 1.0]]), r"row 0 holds 1e\+300 at \(1,\); expected finite float32"),
        (raw_of([[0, 1], [2, 3]]), "dtype int64 without levels; expected floats"),
        (raw_of(ONE, levels=4), r"dtype float64 with 4 levels; expected integers 0\.\.3"),
        (raw_of([[0, 1], [256, 3]], levels=256), r"row 1 holds 256 at \(0,\); expected integers 0\.\.255"),
        (raw_of([[0, 1], [2, -1]], levels=4), r"row 1 holds -1 at \(1,\); expected integers 0\.\.3"),
        (raw_of([[0, 1], [2, 3]], levels=2**31), "2147483648 levels; expected 2 to"),
        (raw_of([["a", "b"]]), "dtype <U1 without levels"),
        (raw_of(ONE, labels=np.array([0, 2]), classes=2), r"labels 0\.\.2; expected 0\.\.1"),
        (raw_of(ONE, labels=np.array([0, -1]), classes=2), r"labels -1\.\.0; expected 0\.\.1"),
        (raw_of(ONE, labels=np.array([0]), classes=2), r"labels of shape \(1,\); expected \(2,\), one a row"),
        (raw_of(ONE, labels=np.array([0.5, 1]), classes=2), "labels of dtype float64; expected integers"),
    ],
)  # fmt: skip
def test_checked_refuses_by_name(raw: Raw, words: str) -> None:
    with pytest.raises(ValueError, match=rf"^things: {words}"):
        checked("things", raw)


@pytest.mark.parametrize(
    ("x", "levels", "dtype"),
    [(np.array([[0, 255]]), 256, "uint8"), (np.array([[0, 256]]), 257, "int32"), (ONE, None, "float32"),
     (np.array([[True, False]]), 2, "uint8"), (ONE.astype(">f8"), None, "float32")],
)  # fmt: skip
def test_checked_stores_the_smallest_dtype(x: Array, levels: int | None, dtype: str) -> None:
    stored = checked("things", raw_of(x, levels=levels)).x
    assert stored.dtype == dtype
    assert stored.tolist() == x.tolist()


def picture(path: Path, size: tuple[int, int] = (6, 4), mode: str = "RGB", **how: Any) -> Array:
    """Writes noise and returns it [H, W, C] or [H, W]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], len(mode))
    x = RNG.integers(0, 255, shape, np.uint8)
    Image.fromarray(x, mode if mode != "I;16" else None).save(path, **how)
    return x


def test_image_folder_reads_classes_from_subfolders_in_order(tmp_path: Path) -> None:
    names = ("ape", "bee", "cat", "dog", "elk", "fox", "gnu", "hen")
    written = [picture(tmp_path / name / "deep" / "0.PNG") for name in reversed(names)]
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    raw = ImageFolder(str(tmp_path)).read(0)
    assert np.array_equal(raw.x, np.stack(written[::-1]).transpose(0, 3, 1, 2))
    assert raw.class_names == names
    assert raw.labels is not None
    assert (raw.labels.tolist(), raw.classes, raw.levels) == (list(range(8)), 8, 256)


def test_image_folder_without_subfolders_has_no_labels(tmp_path: Path) -> None:
    grey = picture(tmp_path / "a.png", mode="L")
    raw = ImageFolder(str(tmp_path), channels=1).read(0)
    assert np.array_equal(raw.x[:, 0], grey[None])
    assert (raw.labels, raw.classes) == (None, 0)


def test_image_folder_crops_the_middle_and_resizes(tmp_path: Path) -> None:
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200  # the central square
    Image.fromarray(wide).save(tmp_path / "wide.png")
    picture(tmp_path / "tall.png", (8, 20))
    raw = ImageFolder(str(tmp_path), size=5).read(0)
    assert raw.x.shape == (2, 3, 5, 5)
    assert (raw.x[1] == 200).all()


def test_image_folder_turns_a_photograph_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    x = picture(tmp_path / "a.png", (6, 4), exif=exif)
    assert np.array_equal(ImageFolder(str(tmp_path)).read(0).x[0].transpose(1, 2, 0), np.rot90(x, -1))


def test_image_folder_sum_notices_a_changed_and_a_renamed_file(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    sums = [dict(ImageFolder(str(tmp_path)).read(0).source.files)]
    picture(tmp_path / "a.png")
    sums.append(dict(ImageFolder(str(tmp_path)).read(0).source.files))
    (tmp_path / "a.png").rename(tmp_path / "b.png")
    sums.append(dict(ImageFolder(str(tmp_path)).read(0).source.files))
    assert len({str(each) for each in sums}) == 3
    assert str(tmp_path) not in str(sums)


def test_image_folder_refuses_differing_sizes_without_a_size(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", (6, 4))
    picture(tmp_path / "b.png", (6, 5))
    with pytest.raises(ValueError, match=r"b\.png: 6 x 5 pixels; the images before it have 6 x 4; give size"):
        ImageFolder(str(tmp_path)).read(0)


def test_image_folder_names_an_unreadable_image(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"image-folder: .*b\.png: unreadable image"):
        ImageFolder(str(tmp_path)).read(0)
    (tmp_path / "b.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"image-folder: .*b\.png: unreadable image"):
        ImageFolder(str(tmp_path)).read(0)


def test_image_folder_refuses_transparency_and_depth_but_takes_an_opaque_alpha(tmp_path: Path) -> None:
    x = picture(tmp_path / "a.png", mode="RGBA")
    with pytest.raises(ValueError, match=r"a\.png: transparent pixels; expected an opaque image"):
        ImageFolder(str(tmp_path)).read(0)
    x[..., 3] = 255
    Image.fromarray(x).save(tmp_path / "a.png")
    assert np.array_equal(ImageFolder(str(tmp_path)).read(0).x[0].transpose(1, 2, 0), x[..., :3])
    Image.fromarray(RNG.integers(0, 60000, (4, 6), np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png: mode I;16; expected 8 bits a channel"):
        ImageFolder(str(tmp_path)).read(0)


def test_image_folder_refuses_none_no_images_and_loose_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absent: no such folder"):
        ImageFolder(str(tmp_path / "absent")).read(0)
    with pytest.raises(ValueError, match=r"no image in it; expected files ending in \.png"):
        ImageFolder(str(tmp_path)).read(0)
    picture(tmp_path / "cat" / "a.png")
    picture(tmp_path / "loose.png")
    with pytest.raises(ValueError, match=r"loose\.png lies beside the classes' subfolders"):
        ImageFolder(str(tmp_path)).read(0)


def test_image_folder_refuses_impossible_settings() -> None:
    with pytest.raises(ValueError, match="size: 0; expected at least 1"):
        ImageFolder("x", size=0)
    with pytest.raises(ValueError, match="channels: 2; expected 1 or 3"):
        ImageFolder("x", channels=2)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", TABLE)
def test_table_row_is_a_frozen_dataclass_of_plain_settings(name: str) -> None:
    target = dataset_class(name)
    parameters = inspect.signature(target).parameters.values()
    given = {p.name: "x" for p in parameters if p.default is p.empty}
    own = {"parquet": {"column": "x"}, "uci-binary": {"which": "adult"}, "uci-real": {"which": "power"}}
    given |= own.get(name, {})
    with pytest.raises(dataclasses.FrozenInstanceError):
        target(**given).anything = 1  # type: ignore[attr-defined]
    plain = (
        "int",
        "float",
        "str",
        "bool",
        "tuple",
        "Literal",
        "Kind",
        "None",
        "[",
        "]",
        "|",
        ",",
        " ",
        "1",
        "3",
        "...",
    )
    for parameter in parameters:
        rest = str(parameter.annotation)
        for word in plain:
            rest = rest.replace(word, "")
        assert rest == ""


def test_table_imports_nothing_until_asked() -> None:
    code = "import pipelines.data.datasets as d, sys; print([m for m in sys.modules if m.startswith((%s))])"
    code %= "d.__name__ + '.', 'torch', 'numpy'"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_table_suggests_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r'dataset\.name: \'mnits\' is not known; did you mean "mnist"'):
        dataset_class("mnits")
