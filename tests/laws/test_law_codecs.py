"""Laws of the codecs: bytes come back, a uniform model scores exactly log2(levels) bits a dimension through each."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dgm_models import noise
from dgm_models.codecs import Codec, Dequantized, Discrete, Logit, Standardized, continuous, discrete
from dgm_models.metrics.likelihood import bits_per_dim
from dgm_models.protocols import DataSpec

LEVELS = (2, 17, 256, 1000)
WHOLE = {"discrete": Discrete, "dequantized": Dequantized, "logit": Logit}


def stored(levels: int) -> Tensor:
    """Every level many times: [64, D] so that each sits beside other draws of the noise."""
    x = torch.arange(levels).repeat(64, 1)
    return x.to(torch.uint8 if levels <= 256 else torch.int32)


def spec(levels: int | None, dims: int) -> DataSpec:
    return DataSpec("vector", (dims,), levels)


def uniform_log_prob(codec: Codec, y: Tensor, levels: int) -> Tensor:
    """[B] nats of y [B, D] under the model that is uniform over the stored data, in model space, float64."""
    y = y.double()
    if isinstance(codec, Discrete):
        each = torch.full_like(y, -math.log(levels))
    elif isinstance(codec, Dequantized):
        each = torch.full_like(y, -math.log(2.0))  # the density 1/2 on (-1, 1)
    else:
        assert isinstance(codec, Logit)
        # sigmoid(y) is uniform on (alpha, 1 - alpha): the logistic density over 1 - 2 alpha
        each = F.logsigmoid(y) + F.logsigmoid(-y) - math.log(1 - 2 * codec.alpha)
    return each.sum(1)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("name", WHOLE)
def test_codec_gives_the_stored_bytes_back(name: str, levels: int) -> None:
    x = stored(levels)
    codec = WHOLE[name](spec(levels, levels))
    back = codec.decode(codec.encode(x, torch.arange(len(x)))[0])
    assert back.dtype == x.dtype
    assert torch.equal(back, x)


@pytest.mark.parametrize("levels", [*LEVELS, 65536])
@pytest.mark.parametrize("edge", [0.0, 1.0])
def test_codec_gives_the_stored_bytes_back_at_the_edges_of_the_noise(
    levels: int, edge: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    smallest = 2.0**-24  # the draws of noise.uniform in float32 lie between 2^-24 and 1 - 2^-24

    def draw(keys: Tensor, stream: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((len(keys), *shape), abs(edge - smallest), dtype=dtype)

    monkeypatch.setattr(noise, "uniform", draw)
    x = torch.arange(levels)[None].to(torch.int32)
    for codec in (Dequantized(spec(levels, levels)), Logit(spec(levels, levels))):
        if isinstance(codec, Logit) and levels > 1000:
            continue  # float32 near logit(0.95) has no 65536 cells
        assert torch.equal(codec.decode(codec.encode(x, torch.arange(1))[0]).int(), x), type(codec).__name__


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("name", WHOLE)
def test_codec_charges_a_uniform_model_log2_of_the_levels(name: str, levels: int) -> None:
    x = stored(levels)
    codec = WHOLE[name](spec(levels, levels))
    y, log_det = codec.encode(x, torch.arange(len(x)))
    bits = bits_per_dim(-(uniform_log_prob(codec, y, levels) + log_det.double()), levels)
    # log_det is float32: its relative rounding is 6e-8 of up to 7 nats a dimension, and Logit adds D terms of float32
    assert float((bits - math.log2(levels)).abs().max()) < 2e-6


@pytest.mark.parametrize("levels", LEVELS)
def test_codec_twin_that_forgets_the_levels_is_caught(levels: int) -> None:
    x = stored(levels)
    codec = Dequantized(spec(levels, levels))
    y, log_det = codec.encode(x, torch.arange(len(x)))
    wrong = log_det.double() + levels * math.log(levels)  # without - log levels for each dimension
    bits = bits_per_dim(-(uniform_log_prob(codec, y, levels) + wrong), levels)
    assert float((bits - math.log2(levels)).abs().min()) > 0.9


def slogdet(function: Callable[[Tensor], Tensor], x: Tensor) -> float:
    jacobian = torch.autograd.functional.jacobian(function, x)
    return float(torch.linalg.slogdet(jacobian.reshape(x.numel(), x.numel()).double())[1])


def cell(codec: Codec, levels: int) -> Callable[[Tensor], Tensor]:
    """The codec's map of x + u, as its docstring writes it, in the type of its argument."""

    def function(v: Tensor) -> Tensor:
        y = 2 * v / levels - 1
        if isinstance(codec, Logit):
            y = torch.logit(codec.alpha + (1 - 2 * codec.alpha) * v / levels)
        return y

    return function


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("kind", [Dequantized, Logit])
def test_codec_log_det_is_that_of_the_jacobian(kind: type, levels: int) -> None:
    x = torch.tensor([[0, 1, levels // 2, levels - 1]]).to(torch.int32)
    key = torch.tensor([5])
    codec = kind(spec(levels, 4))
    y, log_det = codec.encode(x, key)
    v = x.double() + noise.uniform(key, "dequantize", (4,)).double()
    function = cell(codec, levels)
    # y is float32: half a unit in the last place of numbers below 4, or one to stay within the cell
    assert float((y.double() - function(v)).abs().max()) < 5e-7
    assert float(log_det) == pytest.approx(slogdet(function, v), abs=2e-6)  # stored as float32, below 32


def test_codec_log_det_of_real_data_is_exact_in_float64() -> None:
    data = DataSpec("vector", (3,), None, location=1.5, scale=0.25)
    x = torch.randn(2, 3, dtype=torch.float64)
    y, log_det = Standardized(data).encode(x, torch.arange(2))
    assert torch.allclose(Standardized(data).decode(y), x, atol=1e-15, rtol=0)  # a division and a product by 2^-2
    expected = slogdet(lambda v: Standardized(data).encode(v, torch.arange(1))[0], x[:1])
    assert log_det.tolist() == pytest.approx([expected] * 2, abs=1e-6)  # stored as float32


@pytest.mark.parametrize("kind", [Dequantized, Logit])
def test_codec_noise_follows_the_key_alone(kind: type) -> None:
    x = stored(17)
    codec = kind(spec(17, 17))
    key = torch.arange(len(x))
    whole = codec.encode(x, key)[0]
    assert torch.equal(codec.encode(x[10:20], key[10:20])[0], whole[10:20])
    assert not torch.equal(whole[0], whole[1])


@pytest.mark.parametrize("kind", [Discrete, Dequantized, Logit])
def test_codec_of_whole_levels_refuses_real_data(kind: type) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__} codec needs data of whole levels"):
        kind(spec(None, 3))


@pytest.mark.parametrize("kind", [Discrete, Dequantized, Logit])
@pytest.mark.parametrize("levels", [2, 256, 1000])
def test_codec_keeps_what_a_model_gives_within_the_levels(kind: type, levels: int) -> None:
    y = torch.tensor([[-1e6, -1.0, -0.0, 1.0, 1e6]])
    y = y.long() if kind is Discrete else y
    x = kind(spec(levels, 5)).decode(y)
    assert (int(x.min()), int(x.max())) == (0, levels - 1)


def test_codec_exactness_is_stated() -> None:
    assert [kind(spec(4, 2)).exact for kind in (Discrete, Dequantized, Logit)] == [True, False, False]
    assert Standardized(spec(None, 2)).exact
    assert (type(continuous(spec(4, 2))), type(continuous(spec(None, 2)))) == (Dequantized, Standardized)
    assert (type(discrete(spec(4, 2))), type(discrete(spec(None, 2)))) == (Discrete, Standardized)


@pytest.mark.parametrize("alpha", [0.0, 0.5, -0.1])
def test_codec_logit_refuses_a_squeeze_outside_its_range(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha"):
        Logit(spec(4, 2), alpha)
