"""rnn, wavenet and image_transformer: what their papers say of them, on sequences that can be enumerated or solved."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dgm_models.autoregressive.wavenet import DilatedConvolutions
from dgm_models.construct import ConfigError
from dgm_models.method import Method, build, fit
from dgm_models.nn.attention import CausalTransformer
from dgm_models.nn.sequence import Causal, SequenceModel
from dgm_models.ops import mulaw
from dgm_models.protocols import DataSpec
from dgm_models.registry import METHODS
from tests.laws.cases import every_state

BITS = DataSpec("vector", (10,), 2, classes=3)
SETTINGS = {
    "rnn": {"width": 6, "layers": 2},
    "gru": {"width": 6, "cell": "gru"},
    "wavenet": {"width": 6, "skip_width": 5, "layers": 3, "blocks": 2, "kernel": 3},
    "image_transformer": {"width": 8, "layers": 2, "heads": 2},
}


def method(name: str, data: DataSpec, asked: bool = False, scale: float = 1.0) -> Method:
    """Small, its weights times `scale`, in float64."""
    cond = {"cond": {"name": "label"}} if asked else {}
    made = build("autoregressive/" + name.replace("gru", "rnn"), data, **SETTINGS[name], **cond)
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.mul_(scale)
    made.model.double().eval()
    return made


def network(name: str, data: DataSpec = BITS) -> Causal:
    model = method(name, data).model
    assert isinstance(model, SequenceModel)
    return model.network


def as_image(bits: DataSpec) -> DataSpec:
    """The same values for a method of images alone."""
    return DataSpec("image", (1, 2, 5), bits.levels, bits.classes)


@pytest.mark.parametrize("asked", [False, True], ids=["plain", "label"])
@pytest.mark.parametrize("name", SETTINGS)
def test_probabilities_of_ten_bits_sum_to_one(name: str, asked: bool) -> None:
    data = as_image(BITS) if name == "image_transformer" else BITS
    model = method(name, data, asked, scale=3.0).model
    x = every_state(data)
    with torch.no_grad():
        log_p = model.log_prob(x, torch.ones(len(x), dtype=torch.int64) if asked else None).double()
    assert float(log_p.exp().sum()) == pytest.approx(1.0, abs=1e-6)  # the likelihood is in float32
    assert float(log_p.std()) > 0.3  # far from uniform


SHAPES = [
    DataSpec("image", (3, 2, 3), 4, classes=3),
    DataSpec("tokens", (9,), 5, classes=3),
    DataSpec("codes", (2, 3), 7, classes=3),
    DataSpec("audio", (2, 7), 16, classes=3),
]
SHAPED = [
    (name, data)
    for name in SETTINGS
    for data in SHAPES
    if f"{data.kind}:discrete" in METHODS["autoregressive/" + name.replace("gru", "rnn")].data
]


@pytest.mark.parametrize("asked", [False, True], ids=["plain", "label"])
@pytest.mark.parametrize(("name", "data"), SHAPED, ids=lambda value: getattr(value, "kind", value))
def test_step_by_step_is_all_at_once(name: str, data: DataSpec, asked: bool) -> None:
    model = method(name, data, asked).model
    rng = torch.Generator().manual_seed(0)
    x, cond = torch.randint(data.levels or 0, (4, *data.shape), generator=rng), torch.arange(4) % 3 if asked else None
    with torch.no_grad():
        state, found = model.start(4, cond), []
        for place in range(data.dims):
            found.append(model.step(state, place))
            model.admit(state, place, x.flatten(1)[:, model.places[place]])
        expected = model.conditionals(x, cond)
    assert float((torch.stack(found, 1) - expected).abs().max()) < 1e-12  # float64 sums in another order
    assert float(expected.std()) > 1e-3
    if asked:
        assert float((model.conditionals(x, (torch.arange(4) + 1) % 3) - expected).detach().abs().min()) > 0


def test_image_is_read_pixel_by_pixel_and_its_channels_in_order() -> None:
    data = DataSpec("image", (3, 2, 2), 4)
    model = method("rnn", data).model
    assert model.places[:, 0].tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    # the same level is another symbol in another channel
    flat = torch.zeros(1, 3, 2, 2, dtype=torch.int64)
    assert isinstance(model, SequenceModel) and model.embedding.num_embeddings == 3 * 4 + 1
    seen: list[Tensor] = []
    model.embedding.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    model.conditionals(flat, None)
    assert seen[0].tolist() == [[12, 0, 4, 8, 0, 4, 8, 0, 4, 8, 0, 4]]


@pytest.mark.parametrize("name", SETTINGS)
def test_output_sees_no_later_input(name: str) -> None:
    data = as_image(BITS) if name == "image_transformer" else BITS
    causal = network(name, data)
    inputs = torch.randn(1, 10, causal.width, dtype=torch.float64, requires_grad=True)
    outputs = causal(inputs) @ torch.randn(causal.width, dtype=torch.float64)  # a sum of normalised values is constant
    for place in range(10):
        (slope,) = torch.autograd.grad(outputs[0, place], inputs, retain_graph=True)
        seen = slope[0].abs().sum(1) != 0
        assert not bool(seen[place + 1 :].any())  # exactly 0, and not nearly
        assert bool(seen[: place + 1].all())  # all of the past: ten places are within the receptive field


@pytest.mark.parametrize("name", ["rnn", "gru", "wavenet"])
def test_nan_reaches_no_earlier_output(name: str) -> None:
    causal = network(name)
    for place in range(10):
        inputs = torch.zeros(1, 10, causal.width, dtype=torch.float64)
        inputs[0, place] = math.nan
        assert causal(inputs)[0].isnan().any(1).tolist() == [t >= place for t in range(10)]


@pytest.mark.parametrize(
    ("layers", "blocks", "kernel", "expected"), [(10, 1, 2, 1024), (4, 3, 2, 46), (3, 2, 3, 29), (1, 1, 2, 2)]
)
def test_wavenet_sees_what_its_receptive_field_says(layers: int, blocks: int, kernel: int, expected: int) -> None:
    torch.manual_seed(0)
    causal = DilatedConvolutions(4, 4, layers, blocks, kernel, 0).double()
    assert causal.receptive_field == expected
    inputs = torch.randn(1, expected + 30, 4, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(causal(inputs)[0, -1].sum(), inputs)
    seen = slope[0].abs().sum(1) != 0
    assert seen.tolist() == [False] * 30 + [True] * expected


def test_wavenet_keeps_only_what_it_has_yet_to_see() -> None:
    causal = DilatedConvolutions(4, 4, 5, 2, 2, 0)
    queues = causal.start(3)
    assert sum(past.shape[1] for past in queues.past) == 2 * 31 == causal.receptive_field - 1


def test_attention_sees_a_place_by_its_position() -> None:
    torch.manual_seed(0)
    causal = CausalTransformer(8, 1, 2, 6).double()
    inputs = torch.randn(1, 6, 8, dtype=torch.float64)
    swapped = inputs[:, [1, 0, 2, 3, 4, 5]]
    with torch.no_grad():
        assert float((causal(inputs) - causal(swapped))[0, -1].abs().max()) > 1e-6
        causal.places.weight.zero_()
        assert float((causal(inputs) - causal(swapped))[0, -1].abs().max()) < 1e-12  # a set without positions


def test_transformer_begins_as_gpt_2_does() -> None:
    torch.manual_seed(0)
    causal = CausalTransformer(64, 8, 4, 32)
    for name, parameter in causal.named_parameters():
        if name.endswith("norm.weight"):
            assert bool((parameter == 1).all())
        elif parameter.ndim == 1:
            assert bool((parameter == 0).all())
        else:
            added = name.endswith(("attention.outward.weight", "mlp.2.weight"))
            expected = 0.02 / math.sqrt(16) if added else 0.02
            assert float(parameter.detach().std()) == pytest.approx(expected, rel=0.1)  # 6 standard errors


def test_transformer_refuses_more_places_than_it_has() -> None:
    causal = CausalTransformer(4, 1, 1, 3)
    with pytest.raises(ValueError, match="inputs: 4 places; this transformer was built for 3"):
        causal(torch.zeros(1, 4, 4))
    cache = causal.start(1)
    for _ in range(3):
        causal.step(torch.zeros(1, 4), cache)
    with pytest.raises(ValueError, match="more than the 3 places"):
        causal.step(torch.zeros(1, 4), cache)


def test_settings_that_cannot_be_are_refused() -> None:
    image = as_image(BITS)
    with pytest.raises(ConfigError, match="method: heads: 3 do not divide width 8"):
        build("autoregressive/image_transformer", image, width=8, heads=3)
    with pytest.raises(ConfigError, match="cond: edges is an image"):
        build("autoregressive/rnn", image, cond={"name": "edges"})
    with pytest.raises(ConfigError, match="kernel: 1 is not a whole number at least 2"):
        build("autoregressive/wavenet", BITS, kernel=1)


def chain(n: int, length: int, transitions: Tensor, seed: int) -> Tensor:
    """[n, length] states of a Markov chain that begins in each state alike."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.empty(n, length, dtype=torch.int64)
    x[:, 0] = torch.randint(len(transitions), (n,), generator=rng)
    for place in range(1, length):
        x[:, place] = torch.multinomial(transitions[x[:, place - 1]], 1, generator=rng)[:, 0]
    return x


def test_rnn_learns_a_markov_chain_to_its_entropy() -> None:
    transitions = torch.tensor([[0.8, 0.15, 0.05], [0.1, 0.3, 0.6], [0.25, 0.7, 0.05]])
    length = 8
    made = build("autoregressive/rnn", DataSpec("tokens", (length,), 3), cell="gru", width=12)
    fit(
        made, chain(16_000, length, transitions, 0).to(torch.uint8), steps=240, batch_size=64,
        optim={"lr": 0.02, "schedule": "cosine"},
    )  # fmt: skip
    x = chain(4000, length, transitions, 1)
    true = -math.log(3) + transitions.log()[x[:, :-1], x[:, 1:]].sum(1)
    share, entropy = torch.full((3,), 1 / 3, dtype=torch.float64), math.log(3)
    for _ in range(length - 1):  # the entropy of the chain itself, step by step
        exact = transitions.double()
        entropy -= float(share @ (exact * exact.log()).sum(1))
        share = share @ exact
    assert float(-true.mean()) == pytest.approx(entropy, abs=5 * float(true.std()) / math.sqrt(4000))
    with torch.no_grad():
        excess = true - made.model.log_prob(x)  # its mean is the divergence from the chain, 0 at the entropy
    assert float(excess.mean()) < 0.05
    assert float(excess.mean()) > -3 * float(excess.std()) / math.sqrt(4000)  # no model beats the entropy


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_mu_law_gives_every_level_back(levels: int) -> None:
    q = torch.arange(levels)
    x = mulaw.expand(q, levels)
    assert torch.equal(mulaw.compress(x, levels), q)
    assert float(x[0]) == pytest.approx(-1, abs=1e-12) and float(x[-1]) == pytest.approx(1, abs=1e-12)
    assert bool((x.diff() > 0).all())
    assert torch.allclose(x, -x.flip(0), atol=1e-12)


def test_mu_law_takes_the_nearest_level_and_is_fine_near_zero() -> None:
    x = torch.linspace(-1, 1, 20_001, dtype=torch.float64)
    error = (mulaw.expand(mulaw.compress(x)) - x).abs()
    # half a step of f, 1 / mu, through the slope of its inverse, log(1 + mu) (1 + mu |x|) / mu, at a cell's outer end
    slope = math.log(256) * (1 / 255 + x.abs())
    assert bool((error <= slope * math.exp(math.log(256) / 255) / 255).all())
    assert float(error[x.abs() < 0.01].max()) < 1e-3 < 1 / 255  # finer than 256 equal steps
    assert mulaw.compress(torch.tensor([-2.0, 2.0])).tolist() == [0, 255]  # what lies beyond is clipped
