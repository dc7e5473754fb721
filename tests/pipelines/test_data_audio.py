"""Sound: plucked strings are the recursion that they are said to be, .wav files are read as they were written."""

from __future__ import annotations

import io
import struct
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dgm_models import noise
from dgm_models.likelihood import log_prob
from dgm_models.method import build, fit, load, save
from dgm_models.ops import mulaw
from dgm_models.protocols import DataSpec
from dgm_models.sampling import sample
from pipelines import pictures
from pipelines.data import shards, wav
from pipelines.data.datasets.audio_folder import AudioFolder
from pipelines.data.datasets.plucks import Plucks
from pipelines.data.prepare import prepare
from pipelines.data.raw import SPLITS, Array
from pipelines.data.split import split_rows

SMALL = {"rows": 120, "length": 96, "rate": 2000, "pitches": [110.0, 220.0, 440.0]}


def plucks(**changes: Any) -> Plucks:
    return Plucks(**{**SMALL, "pitches": (110.0, 220.0, 440.0), **changes})


def test_pluck_follows_its_recursion() -> None:
    settings = plucks(length=200)
    for label, delay in enumerate(settings.delays):
        y = settings.render(torch.arange(3), label)
        t = np.arange(delay + 1, 200)
        assert np.array_equal(y[:, t], (y[:, t - delay] + y[:, t - delay - 1]) / 2)
        assert np.abs(y[:, : delay + 1]).max() <= 1 and y[:, : delay + 1].std() > 0.4  # uniform in (-1, 1): 0.58


def test_pluck_sounds_at_its_pitch() -> None:
    settings = Plucks(rows=1, length=8192)
    for label, pitch in enumerate(settings.pitches):
        y = settings.render(torch.arange(8), label)[:, 4096:]
        power = (np.abs(np.fft.rfft(y - y.mean(1, keepdims=True))) ** 2).sum(0)
        loudest = power.argmax() * settings.rate / 4096  # Hz: the first partial or, by its random start, another one
        partial = max(1, round(loudest / pitch))
        exact = settings.rate / (settings.delays[label] + 0.5)
        assert loudest / partial == pytest.approx(exact, abs=2)  # a bin is 1.95 Hz wide
        assert exact == pytest.approx(pitch, rel=0.015)


def test_plucks_are_levels_of_their_label_and_begin_alike() -> None:
    few, many, other = plucks(rows=9).read(1), plucks().read(1), plucks().read(2)
    assert few.labels is not None and many.labels is not None
    assert (many.kind, many.levels, many.classes, many.x.dtype) == ("audio", 256, 3, np.uint8)
    assert many.class_names == ("110 Hz", "220 Hz", "440 Hz")
    assert np.array_equal(few.x, many.x[:9]) and np.array_equal(few.labels, many.labels[:9])
    assert not np.array_equal(many.x, other.x)
    assert np.bincount(many.labels).min() > 25  # 40 expected
    keys = noise.fold(torch.arange(9), "plucks", 1)
    for row, label in enumerate(few.labels):
        y = torch.from_numpy(plucks().render(keys[row : row + 1], int(label)))
        assert np.array_equal(few.x[row], mulaw.compress(y).numpy())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": 0}, "rows: 0; expected at least 1"),
        ({"pitches": [900.0]}, r"pitches: \[900.0\]; expected Hz above 0 and at most 800"),
        ({"pitches": [110.0, 110.5]}, r"pitches: \[110.0, 110.5\] have the delays \[18, 18\] at rate: 2000"),
        ({"length": 19}, "length: 19; expected more than 19"),
    ],
)
def test_impossible_plucks_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"dataset: {words}"):
        prepare({"name": "plucks", **SMALL, **changes}, tmp_path / "out")


def written(frames: Array, bits: int, rate: int = 8000) -> bytes:
    """A .wav file of integers [T, channels]."""
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(frames.shape[1])
        file.setsampwidth(bits // 8)
        file.setframerate(rate)
        offset = 128 if bits == 8 else 0
        values = [int(value) + offset for value in frames.reshape(-1)]
        file.writeframes(b"".join(value.to_bytes(bits // 8, "little", signed=bits > 8) for value in values))
    return stream.getvalue()


@pytest.mark.parametrize("bits", [8, 16, 24, 32])
def test_wav_is_read_as_it_was_written(bits: int) -> None:
    full = 2 ** (bits - 1)
    frames = np.array([[0, 0], [full - 1, full - 1], [-full, -full], [full // 2, -full // 4], [-1, 0]])
    x, rate = wav.decode(written(frames, bits, 11025), "a.wav")
    assert rate == 11025
    assert x.tolist() == [0.0, (full - 1) / full, -1.0, 0.125, -0.5 / full]  # exact, and the mean of the channels


def test_wav_that_is_none_is_named() -> None:
    whole = written(np.zeros((50, 1), int), 16)
    floats = whole[:20] + struct.pack("<H", 3) + whole[22:]  # the format's code: 3 is floating point
    for content, words in (
        (b"no sound", "RIFF.*; expected PCM"),
        (b"", "it ends within its header"),
        (floats, "unknown format: 3; expected PCM samples, which `ffmpeg -i in -c:a pcm_s16le out.wav` writes"),
        (whole[:-10], "90 bytes of samples where its header tells of 50 frames of 2; expected a whole file"),
    ):
        with pytest.raises(ValueError, match=f"^a.wav: .*{words}"):
            wav.decode(content, "a.wav")


def sounds(folder: Path, names: list[str], length: int = 50, rate: int = 8000, bits: int = 16) -> None:
    """Files of `length` samples; the amplitude of each is its number in the list."""
    for number, name in enumerate(names, 1):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(written(np.full((length, 1), 1000 * number), bits, rate))


NAMES = [f"{kind}/{number:02d}.wav" for kind in ("bell", "drum") for number in range(10)]


def test_audio_folder_labels_windows_by_subfolder(tmp_path: Path) -> None:
    sounds(tmp_path, [*NAMES, "bell/.hidden.wav"])
    (tmp_path / "bell" / "notes.txt").write_text("")
    raw = AudioFolder(str(tmp_path), length=16).read(0)
    assert raw.labels is not None and raw.groups is not None
    assert raw.x.shape == (60, 1, 16)  # 3 windows of 16 in 50 samples, 20 files
    assert (raw.kind, raw.levels, raw.class_names) == ("audio", 256, ("bell", "drum"))
    assert raw.labels.tolist() == [0] * 30 + [1] * 30
    assert raw.groups.tolist() == [number for number in range(20) for _ in range(3)]
    expected = mulaw.compress(torch.arange(1, 21) * 1000 / 2**15)
    assert np.array_equal(raw.x, np.broadcast_to(expected.repeat_interleave(3).numpy()[:, None, None], raw.x.shape))
    assert raw.source.origin == "a local folder of sounds: 8000 Hz, 256 mu-law levels"


def test_audio_folder_is_split_by_file(tmp_path: Path) -> None:
    sounds(tmp_path / "in", NAMES)
    manifest = prepare(
        {"name": "audio-folder", "path": str(tmp_path / "in"), "length": 10, "split": [0.6, 0.2, 0.2]},
        tmp_path / "out",
    )
    assert manifest.rows == {"train": 60, "valid": 20, "test": 20}
    files = {split: set((shards.load(tmp_path / "out", split).id // 5).tolist()) for split in SPLITS}
    assert [len(files[split]) for split in SPLITS] == [12, 4, 4]
    assert len(files["train"] | files["valid"] | files["test"]) == 20


def test_split_of_groups_is_seeded_and_refuses_too_few() -> None:
    groups = np.repeat(np.arange(30), np.arange(1, 31))
    first, again, other = (split_rows("s", 465, None, (0.8, 0.1, 0.1), seed, groups) for seed in (0, 0, 1))
    for key in SPLITS:
        assert np.array_equal(first[key], again[key])
        inside = np.isin(groups, groups[first[key]])
        assert sorted(first[key]) == np.flatnonzero(inside).tolist()  # whole groups
    assert sorted(np.concatenate(list(first.values()))) == list(range(465))
    assert set(groups[first["test"]]) != set(groups[other["test"]])
    with pytest.raises(ValueError, match="of 6 rows in 3 groups that are not divided leaves valid empty"):
        split_rows("s", 6, None, (0.8, 0.1, 0.1), 0, np.arange(6) // 2)


def test_audio_folder_refuses_what_does_not_fit_and_says_what_to_do(tmp_path: Path) -> None:
    sounds(tmp_path, ["a.wav", "b.wav"])
    sounds(tmp_path, ["c.wav"], rate=11025)
    with pytest.raises(ValueError, match=r"c\.wav: 11025 Hz, and a\.wav has 8000 Hz; .*resample.*-ar 8000"):
        AudioFolder(str(tmp_path), length=10).read(0)
    with pytest.raises(ValueError, match=r"a\.wav: 8000 Hz, and rate: 11025 Hz; .*-ar 11025"):
        AudioFolder(str(tmp_path), length=10, rate=11025).read(0)
    (tmp_path / "c.wav").unlink()
    with pytest.raises(ValueError, match=r"a\.wav: 50 samples, fewer than length: 51"):
        AudioFolder(str(tmp_path), length=51).read(0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"audio-folder: .*no sound in it; expected files ending in \.wav"):
        AudioFolder(str(tmp_path / "empty"), length=10).read(0)
    with pytest.raises(ValueError, match="length: 0; expected at least 1"):
        AudioFolder(str(tmp_path), length=0)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (DataSpec("audio", (1, 24), 256), "autoregressive/wavenet"),
        (DataSpec("tokens", (9,), 7), "autoregressive/rnn"),
        (DataSpec("codes", (3, 3), 5), "autoregressive/image_transformer"),
    ],
    ids=lambda value: getattr(value, "kind", None),
)
def test_sequence_goes_the_whole_road(data: DataSpec, name: str, tmp_path: Path) -> None:
    section: dict[str, Any] = {"name": "plucks", "rows": 60, "length": 24, "rate": 2000, "pitches": [220.0, 440.0]}
    if data.kind != "audio":
        x = np.random.default_rng(0).integers(0, data.levels or 2, (60, *data.shape))
        np.save(tmp_path / "x.npy", x)
        section = {"name": "npy", "path": str(tmp_path / "x.npy"), "kind": data.kind, "levels": data.levels}
    spec = prepare(section, tmp_path / "data").spec()
    assert (spec.kind, spec.shape, spec.levels) == (data.kind, data.shape, data.levels)
    train, test = (shards.load(tmp_path / "data", split) for split in ("train", "test"))
    small = {"layers": 2} | ({"heads": 2} if name.endswith("transformer") else {})
    method = build(name, spec, width=8, **small, **({"cond": {"name": "label"}} if spec.classes else {}))
    fit(method, train.x, cond=train.cond, steps=3, batch_size=8)
    again = load(save(method, tmp_path / "artifact"))
    nats, kind = log_prob(again, test.x, test.cond)
    assert kind == "exact" and torch.equal(nats, log_prob(method, test.x, test.cond)[0])
    drawn = sample(again, 5, cond=None if test.cond is None else test.cond[:5])
    assert drawn.shape == (5, *spec.shape) and drawn.dtype == test.x.dtype
    assert again.model.evaluations == spec.dims
    assert pictures.grid(drawn, spec).startswith(b"\x89PNG")


def test_picture_of_a_sound_is_no_tile() -> None:
    assert pictures.tile(DataSpec("audio", (1, 1024), 256)) is None
    assert pictures.tile(DataSpec("codes", (4, 4), 8)) == (1, 4, 4)
    loud, soft = (pictures.grid(torch.full((2, 1, 64), level, dtype=torch.uint8), DataSpec("audio", (1, 64), 256))
                  for level in (250, 130))  # fmt: skip
    assert loud != soft
