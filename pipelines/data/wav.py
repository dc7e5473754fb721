"""A .wav file -> its amplitudes."""

from __future__ import annotations

import io
import wave

import numpy as np

from pipelines.data.raw import Array


def decode(content: bytes, label: str) -> tuple[Array, int]:
    """The amplitudes [T] float64 in [-1, 1), the mean of the channels, and the sample rate in Hz.

    Args:
        content: the bytes of a file of PCM samples of 8, 16, 24 or 32 bits.
        label: the file's name in messages.
    Raises: ValueError that names the file for any other content.
    """
    try:
        with wave.open(io.BytesIO(content)) as opened:
            told, frames = opened.getparams(), opened.readframes(opened.getnframes())
    except (wave.Error, EOFError) as error:
        raise ValueError(
            f"{label}: {str(error) or 'it ends within its header'}; expected PCM samples, which "
            "`ffmpeg -i in -c:a pcm_s16le out.wav` writes"
        ) from error
    bits, channels = 8 * told.sampwidth, told.nchannels
    if bits not in (8, 16, 24, 32):
        raise ValueError(f"{label}: samples of {bits} bits; expected 8, 16, 24 or 32")
    if len(frames) != told.nframes * channels * told.sampwidth:
        raise ValueError(f"{label}: {len(frames)} bytes of samples where its header tells of {told.nframes} frames of "
                         f"{channels * told.sampwidth}; expected a whole file")  # fmt: skip
    if bits == 8:
        x = (np.frombuffer(frames, np.uint8).astype(np.float64) - 128) / 128
    else:
        high = np.zeros((told.nframes * channels, 4), np.uint8)  # the upper bytes of 32-bit integers
        high[:, 4 - told.sampwidth :] = np.frombuffer(frames, np.uint8).reshape(-1, told.sampwidth)
        x = high.view("<i4")[:, 0] / 2.0**31
    return x.reshape(-1, channels).mean(1), told.framerate
