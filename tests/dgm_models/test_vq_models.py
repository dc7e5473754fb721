"""VQ-VAE and VQ-VAE-2: codes there and back, bounds of distributions that sum to one, the codes' size."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML
from torch import Tensor

from dgm_models.codecs import Discrete
from dgm_models.construct import ConfigError
from dgm_models.method import Method, build, compose, encoded, fit
from dgm_models.nn.quantize import Quantizer
from dgm_models.protocols import DataSpec
from tests.laws import cases

IMAGE = DataSpec("image", (1, 8, 8), 17, classes=10)
TINY = DataSpec("image", (1, 2, 2), 3)  # 81 states
NAMES = ("vae/vq_vae", "vae/vq_vae_2")
SIZES = {"width": 8, "blocks": 1, "code_dim": 3}


def made(name: str, data: DataSpec = IMAGE, halvings: int = 1, size: int = 6, **params: object) -> Method:
    side = {"bottom_halvings": halvings} if name == "vae/vq_vae_2" else {"halvings": halvings}
    return build(name, data, **SIZES, **side, codebook_size=size, **params)


def trained(name: str, data: DataSpec = IMAGE, halvings: int = 1, size: int = 6, steps: int = 40) -> Method:
    method = made(name, data, halvings, size)
    fit(method, cases.rows(data, 64), steps=steps, batch_size=32, optim={"lr": 0.01})
    return method


# ---- codes


@pytest.mark.parametrize(("name", "shape"), [("vae/vq_vae", (4, 4)), ("vae/vq_vae_2", (4 + 16,))])
def test_codes_are_data_of_their_own_kind(name: str, shape: tuple[int, ...]) -> None:
    method = trained(name)
    x = encoded(method.model, cases.rows(IMAGE, 10)).x
    spec, codes = method.model.code_spec, method.model.codes(x)
    assert (spec.kind, spec.shape, spec.levels, spec.classes) == ("codes", shape, 6, 10)
    assert codes.shape == (10, *shape) and codes.dtype == torch.int64
    assert int(codes.min()) >= 0 and int(codes.max()) < 6 and len(codes.unique()) > 1
    codec = Discrete(spec)
    assert torch.equal(codec.decode(codec.encode(codes, torch.arange(10))[0]).long(), codes)


@pytest.mark.parametrize("name", NAMES)
def test_codes_give_the_decoder_what_the_encoder_gave_it(name: str) -> None:
    method = trained(name)
    x = encoded(method.model, cases.rows(IMAGE, 10)).x
    straight = method.model.outputs([level.through for level in method.model.levels(x, Quantizer.nearest)])
    again = method.model.outputs_of(method.model.codes(x))
    assert torch.allclose(straight, again, atol=1e-4, rtol=1e-4)  # z + (e - z) is e but for a float32 rounding
    assert not torch.allclose(method.model.outputs_of(method.model.codes(x.flip(0))), again, atol=1e-2)


def test_codes_of_the_top_come_first() -> None:
    method = trained("vae/vq_vae_2")
    x = encoded(method.model, cases.rows(IMAGE, 4)).x
    top, bottom = method.model.levels(x, Quantizer.nearest)
    assert torch.equal(method.model.codes(x), torch.cat([top.codes, bottom.codes], 1))
    assert (top.codes.shape[1], bottom.codes.shape[1]) == (4, 16)


def test_codes_of_the_bottom_follow_the_top_that_was_drawn() -> None:
    method = trained("vae/vq_vae_2")
    x = encoded(method.model, cases.rows(IMAGE, 16)).x

    def other_top(quantizer: Quantizer, z: Tensor) -> Tensor:
        codes = quantizer.nearest(z)
        return (codes + 1) % 6 if z.shape[1] == 4 else codes

    nearest, other = (method.model.levels(x, pick)[1].z for pick in (Quantizer.nearest, other_top))
    assert not torch.allclose(nearest, other, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "halvings", "message"),
    [("vae/vq_vae", 4, "4 halvings do not divide 8 x 8; use at most 3"), ("vae/vq_vae_2", 3, "4 halvings do not")],
)
def test_halvings_beyond_the_image_are_named(name: str, halvings: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(name, halvings=halvings)


# ---- bounds


def space(method: Method) -> Tensor:
    return encoded(method.model, cases.every_state(TINY)).x


def every_code(method: Method) -> Tensor:
    return cases.every_state(method.model.code_spec)


@torch.no_grad()
def exact(method: Method, x: Tensor) -> Tensor:
    """[B] nats: log p(x), summed over every code, each of the same probability."""
    each = []
    for code in every_code(method):
        each.append(method.model.log_likelihood(x, code.expand(len(x), *code.shape)).double())
    return torch.stack(each).logsumexp(0) - math.log(len(each))


@torch.no_grad()
def of_the_nearest(method: Method, x: Tensor) -> Tensor:
    """[B] nats: log p(x|codes(x)) + log p(codes(x))."""
    spec = method.model.code_spec
    return method.model.log_likelihood(x, method.model.codes(x)).double() - spec.dims * math.log(spec.levels)


def small(name: str) -> Method:
    """At most 4^3 or 3^5 codes of a 2 x 2 image."""
    halvings, size = (1, 4) if name == "vae/vq_vae" else (0, 3)
    return trained(name, TINY, halvings, size, steps=60)


@pytest.mark.parametrize("name", NAMES)
def test_bound_of_the_nearest_codes_sums_to_at_most_one(name: str) -> None:
    method = small(name)
    x = space(method)
    bound, log_p = of_the_nearest(method, x), exact(method, x)
    assert float(log_p.exp().sum()) == pytest.approx(1.0, abs=1e-5)  # 81 float32 log-probabilities
    assert float(bound.exp().sum()) < 1.0
    assert bool((bound <= log_p + 1e-5).all())
    spec = method.model.code_spec
    forgotten = bound + spec.dims * math.log(spec.levels)  # the twin that leaves the codes out
    assert float(forgotten.exp().sum()) > 1.0


@pytest.mark.parametrize("name", NAMES)
def test_bound_of_soft_codes_rises_below_the_log_probability(name: str) -> None:
    method = small(name)
    x, rng = space(method), torch.Generator().manual_seed(0)
    log_p = exact(method, x).mean()
    means = []
    for k, repeats in ((1, 64), (8, 16), (64, 4)):
        with torch.no_grad():
            draws = torch.stack([method.model.elbo(x, rng, k=k).double() for _ in range(repeats)])
        means.append(float(draws.mean()))
    assert means[0] < means[1] < means[2] < float(log_p) + 0.02  # the last one's standard error is below 0.01


@pytest.mark.parametrize("name", NAMES)
def test_prior_of_the_codes_makes_a_distribution_of_the_data(name: str) -> None:
    decoder = small(name)
    codes = decoder.model.codes(encoded(decoder.model, cases.rows(TINY, 64)).x)
    prior = build("autoregressive/made", decoder.model.code_spec, width=16)
    fit(prior, codes.to(torch.uint8), steps=60, batch_size=32, optim={"lr": 0.02})
    model = compose(prior, decoder).model
    x = space(decoder)
    every = every_code(decoder)
    with torch.no_grad():
        log_prior = prior.model.log_prob(every).double()
        each = torch.stack([decoder.model.log_likelihood(x, c.expand(len(x), *c.shape)).double() for c in every])
        log_p = (each + log_prior[:, None]).logsumexp(0)
        nearest = decoder.model.codes(x)
        hard = decoder.model.log_likelihood(x, nearest).double() + prior.model.log_prob(nearest).double()
        for quantizer in decoder.model.quantizers:
            quantizer.spread.fill_(1e3)  # every code is drawn: the bound's exp has no rare large values
        soft = torch.stack([model.elbo(x, torch.Generator().manual_seed(i), k=64).double() for i in range(8)])
    assert float(log_p.exp().sum()) == pytest.approx(1.0, abs=1e-5)
    assert bool((hard <= log_p + 1e-5).all()) and float(hard.exp().sum()) < 1.0
    sums = soft.exp().sum(1)  # unbiased, whatever the codes are drawn from
    error = float(sums.std()) / math.sqrt(len(sums))
    assert error < 0.05 and float(sums.mean()) == pytest.approx(1.0, abs=5 * error)
    assert float(soft.mean()) < float(log_p.mean())
    drawn = model.sample(4096, torch.Generator().manual_seed(0)).flatten(1)
    place = (drawn * torch.tensor([27, 9, 3, 1])).sum(1)
    share = torch.bincount(place, minlength=81).double() / 4096
    spread = (log_p.exp() * (1 - log_p.exp()) / 4096).sqrt()
    assert float(((share - log_p.exp()) / spread).abs().max()) < 5  # of 81 states, in standard errors


# ---- the size of the codes


def test_codes_of_the_zoo_are_at_most_a_quarter_of_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    params = YAML(typ="safe", pure=True).load(Path(cases.ROOT, "zoo", "params.yaml").read_text())
    assert params["codes"]
    for coded in params["codes"].values():
        assert coded["dataset"] == "digits"
        run = params["runs"][coded["run"]]
        method = {**run["method"], **({"network": run["network"]} if "network" in run else {})}
        spec = build(method.pop("name"), IMAGE, **method).model.code_spec
        if spec.levels is None:  # latents: by their number
            assert 4 * spec.dims <= IMAGE.dims
            continue
        bits, data = spec.dims * math.log2(spec.levels), IMAGE.dims * math.log2(IMAGE.levels)
        with capsys.disabled():
            print(
                f"\n{coded['run']}: {spec.dims} codes of {math.log2(spec.levels):g} bits are {bits:g}, data {data:.1f}"
            )
        assert bits <= data / 4
