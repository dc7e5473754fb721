"""Counted distributions: they are the empirical ones, within their form, and say how large they would have to be."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dgm_models.construct import ConfigError
from dgm_models.method import Method, build, fit
from dgm_models.protocols import DataSpec
from tests.laws import cases

DATA = DataSpec("vector", (4,), 3)
FORMS = ["independent", "markov", "table"]


def data(n: int = 600) -> Tensor:
    """[n, 4] rows in which every value depends on the two before it; not every state occurs."""
    rng = torch.Generator().manual_seed(0)
    x, which = torch.randint(3, (n, 4), generator=rng), torch.rand(n, 4, generator=rng)
    for d in (1, 2, 3):
        x[:, d] = torch.where(which[:, d] < 0.4, x[:, d - 1], torch.where(which[:, d] < 0.8, x[:, d - 2], x[:, d]))
    return x.to(torch.uint8)


def counted(form: str, pseudocount: float, x: Tensor, batch: int | None = None, epochs: int = 1) -> Method:
    batch = batch or len(x)
    method = build("autoregressive/histogram", DATA, form=form, pseudocount=pseudocount)
    method.model.double()
    return fit(method, x, steps=epochs * len(x) // batch, batch_size=batch, optim={"name": "sgd", "lr": 1.0})


def entropy(x: Tensor) -> float:
    """Of the rows' empirical distribution, in nats."""
    shares = x.unique(dim=0, return_counts=True)[1].double() / len(x)
    return -float((shares * shares.log()).sum())


def test_table_is_the_empirical_distribution_with_pseudocounts() -> None:
    x, a = data(), 0.5
    states = cases.every_state(DATA)
    counts = (x[:, None] == states).all(2).sum(0).double()
    expected = (counts + a) / (len(x) + a * len(states))
    found = counted("table", a, x).model.log_prob(states).exp().double()
    assert bool((counts == 0).any())  # and these get no zero
    assert torch.allclose(found, expected, rtol=1e-5)  # float32 log-probabilities of about -5


@pytest.mark.parametrize("form", ["independent", "markov"])
def test_shares_are_those_of_the_counts_in_every_conditional_table(form: str) -> None:
    x, a = data(), 2.0
    model = counted(form, a, x).model
    chance = model.conditionals(x.long(), None).softmax(2).gather(2, x.long()[..., None])[..., 0]  # [n, 4]
    for d in range(4):
        same = x[:, d : d + 1] == x[:, d]
        context = x[:, d - 1 : d] == x[:, d - 1] if form == "markov" and d else torch.ones_like(same)
        expected = ((same & context).sum(1).double() + a) / (context.sum(1) + 3 * a)
        assert torch.allclose(chance[:, d], expected, rtol=1e-12)  # float64


@pytest.mark.parametrize("form", FORMS)
def test_nll_of_the_counted_rows_is_their_entropy(form: str) -> None:
    x = data()
    pairs = sum(entropy(x[:, d - 1 : d + 1]) - entropy(x[:, d - 1 : d]) for d in (1, 2, 3))
    expected = {
        "independent": sum(entropy(x[:, d : d + 1]) for d in range(4)),
        "markov": entropy(x[:, :1]) + pairs,
        "table": entropy(x),
    }
    nll = -float(counted(form, 1e-9, x).model.log_prob(x.long()).detach().double().mean())
    assert nll == pytest.approx(expected[form], abs=1e-6)  # float32 log-probabilities
    assert expected["table"] + 0.2 < expected["markov"] + 0.1 < expected["independent"]  # the rows do depend


def test_counts_of_batches_are_those_of_all_rows() -> None:
    x = data()
    whole, batches = counted("markov", 1.0, x), counted("markov", 1.0, x, batch=60)
    assert torch.allclose(whole.model.logits, batches.model.logits, atol=1e-12)
    assert float(batches.objective.counts.sum()) == 4 * len(x)
    twice = counted("markov", 2.0, x, epochs=2)  # every row counts twice, so that a pseudocount of 2 weighs as 1
    assert torch.allclose(whole.model.logits, twice.model.logits, atol=1e-12)
    early = build("autoregressive/histogram", DATA, pseudocount=1.0)
    fit(early, x, steps=1, batch_size=60, optim={"name": "sgd", "lr": 1.0})
    assert not torch.allclose(early.model.logits.double(), whole.model.logits, atol=1e-2)


@pytest.mark.parametrize("form", FORMS)
def test_probabilities_of_twelve_bits_sum_to_one(form: str) -> None:
    method = build("autoregressive/histogram", DataSpec("vector", (12,), 2), form=form)
    total = float(method.model.log_prob(cases.every_state(method.data)).detach().double().exp().sum())
    assert total == pytest.approx(1.0, abs=1e-6)


def test_table_of_an_image_is_refused_with_its_size() -> None:
    image = DataSpec("image", (1, 28, 28), 2)
    cells = sum(2 ** (d + 1) for d in range(784))  # a table for every dimension
    assert 10**236 <= cells < 10**237
    with pytest.raises(ConfigError, match=r"784 dimensions with 2 levels has about 10\^236 cells.* use markov or inde"):
        build("autoregressive/histogram", image, form="table")
    with pytest.raises(ConfigError, match=r"the markov form of 784 .* has 51,314,944 cells.* use independent"):
        build("autoregressive/histogram", replace(image, levels=256))
    assert build("autoregressive/histogram", image).model.logits.numel() == 2 + 783 * 4


def test_histogram_samples_have_the_counted_pairs() -> None:
    x, n = data(), 20_000
    model = counted("markov", 1e-9, x).model
    drawn = model.sample(n, torch.Generator().manual_seed(0))
    for d in (1, 2, 3):
        pairs = [rows[:, d - 1].long() * 3 + rows[:, d].long() for rows in (drawn, x)]
        share, expected = (torch.bincount(pair, minlength=9) / len(pair) for pair in pairs)
        assert bool(((share - expected).abs() < 5 * (expected / n).sqrt() + 1e-9).all())  # five standard errors
    assert math.isfinite(float(model.log_prob(drawn).detach().sum()))
