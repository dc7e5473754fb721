"""Laws of autoregressive models: no output sees what comes later, caches change nothing, completions are exact."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dgm_models.method import Method, build, encoded
from dgm_models.nn.autoregression import Autoregressive
from tests.laws import cases
from tests.laws.cases import CASES, FIRST, PLAIN, Case, takes
from tests.laws.test_law_density import ENUMERABLE

METHODS = {case.method for case in FIRST if isinstance(cases.made(case).model, Autoregressive)}
DRAWN = [case for case in PLAIN if case.method in METHODS]
ASKED = [case for case in CASES if case.method in METHODS]
DISCRETE = [case for case in DRAWN if case.sort in ENUMERABLE]
ONE_ORDER = {"masks": 1, "random_order": False}


def small(case: Case, **params: Any) -> Method:
    """The method on a small space, in float64, its weights doubled: far from uniform."""
    spec = replace(case.spec, shape=ENUMERABLE[case.sort]) if case.sort in ENUMERABLE else case.spec
    own = {key: value for key, value in params.items() if takes(case.method, key)}
    asked = {"cond": {"name": "label"}} if case.asked else {}
    method = build(case.method, spec, **{**cases.small(case.method), **own, **asked})
    with torch.no_grad():
        for p in method.model.parameters():
            p.mul_(2.0)
    method.model.double().eval()
    return method


def rows(method: Method, n: int, seed: int = 0) -> Tensor:
    """[n, *event] in model space, float64 where it is real."""
    x = encoded(method.model, cases.rows(method.data, n, seed), labels=cases.labels(method.data, n)).x
    return x.double() if x.is_floating_point() else x


def walk(model: Autoregressive, x: Tensor, cond: Tensor | None) -> Tensor:
    """The conditionals [B, P, K] by start, step and admit."""
    state, found = model.start(len(x), cond), []
    for place, at in enumerate(model.places):
        found.append(model.step(state, place))
        model.admit(state, place, x.flatten(1)[:, at])
    return torch.stack(found, 1)


@pytest.mark.parametrize("case", ASKED, ids=str)
@torch.no_grad()
def test_cached_outputs_equal_uncached(case: Case) -> None:
    method = small(case)
    x = rows(method, 5)
    cond = torch.arange(5) % method.data.classes if case.asked else None
    whole = method.model.conditionals(x, cond)
    for _ in range(2):  # twice: a walk leaves nothing behind
        # float64: the same numbers, added in another order
        torch.testing.assert_close(walk(method.model, x, cond), whole, rtol=1e-10, atol=1e-10)
    if case.asked:
        other = method.model.conditionals(x, (cond + 1) % method.data.classes)
        assert bool((other != whole).flatten(2).any(2)[:, 0].all())  # the very first place is asked too


# ---- causality: by changed values, by gradients, by NaN


def later_than(model: Autoregressive) -> Tensor:
    """[P, D] bool: whether a value is none of those that come before a place."""
    place = torch.empty(model.data.dims, dtype=torch.int64)
    for p, at in enumerate(model.places):
        place[at] = p
    return place >= torch.arange(len(model.places))[:, None]


@pytest.mark.parametrize("case", DRAWN, ids=str)
@torch.no_grad()
def test_outputs_keep_every_bit_when_later_values_change(case: Case) -> None:
    model = small(case).model
    x = rows(small(case), 4)
    before, later, moved = model.conditionals(x, None), later_than(model), False
    for d in range(model.data.dims):
        changed = x.flatten(1).clone()
        changed[:, d] = changed[:, d] + 1.0 if model.data.levels is None else (changed[:, d] + 1) % model.data.levels
        after = model.conditionals(changed.reshape(x.shape), None)
        assert torch.equal(after[:, later[:, d]], before[:, later[:, d]])
        moved |= not torch.equal(after, before)
    assert moved


class Numbers(TorchFunctionMode):
    """Levels as numbers that may have a gradient or be NaN, and products in which a weight of 0 is no connection.

    A level that is looked up gives what it always gives, with a slope of 1 in the level. A product of NaN and 0 is 0: a
    mask that multiplies then stops a NaN, as one that selects does.
    """

    PRODUCTS = ("linear", "conv1d", "conv2d", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm")

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in ("one_hot", "embedding") and args[0].is_floating_point():
            level = args[0].detach().nan_to_num().round().long()
            return func(level, *args[1:], **kwargs) + (args[0] - args[0].detach())[..., None]
        if name == "long" and args[0].is_floating_point():
            return args[0]
        if name == "scaled_dot_product_attention" and any(part.isnan().any() for part in args[:3]):
            return attention(*args, **kwargs)
        if name in self.PRODUCTS and (args[0].isnan().any() or args[1].isnan().any()):
            return product(func, args, kwargs)
        return func(*args, **kwargs)


def product(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The product of args[0] and args[1], NaN where a NaN meets anything but 0."""
    a, b = args[:2]
    unbiased = tuple(None if isinstance(more, Tensor) else more for more in args[2:])
    rest = {**kwargs, "bias": None} if "bias" in kwargs else kwargs

    def count(one: Tensor, two: Tensor) -> Tensor:
        found: Tensor = func(one.to(a.dtype), two.to(a.dtype), *unbiased, **rest)
        return found

    met = count(a.isnan(), b != 0) + count(a != 0, b.isnan())  # NaN != 0
    found: Tensor = func(a.nan_to_num(), b.nan_to_num(), *args[2:], **kwargs)
    return found.masked_fill(met > 0, math.nan)


def attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False, **kwargs: Any) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, in which a key that is masked out does not exist."""
    scores = (q @ k.mT) / math.sqrt(q.shape[-1])
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
    return product(torch.matmul, (scores.softmax(-1), v), {})


def as_numbers(method: Method) -> Tensor:
    """One example [1, *event] in float64, with neither the lowest nor the highest level where there are more."""
    x = rows(method, 1)
    return x.double().clamp(1, method.data.levels - 2) if (method.data.levels or 2) > 2 else x.double()


@pytest.mark.parametrize("case", DRAWN, ids=str)
def test_outputs_have_no_gradient_from_later_values(case: Case) -> None:
    method = small(case)
    later = later_than(method.model)
    with Numbers():
        jacobian = torch.autograd.functional.jacobian(
            lambda x: method.model.conditionals(x, None)[0].double(), as_numbers(method), vectorize=False
        )
    sizes = jacobian.flatten(2).abs().sum(1)  # [P, D]
    assert float(sizes[later].max()) == 0.0  # masked products are exactly zero
    assert float(sizes[~later].max()) > 0.0


@pytest.mark.parametrize("case", DRAWN, ids=str)
@torch.no_grad()
def test_outputs_are_numbers_when_later_values_are_nan(case: Case) -> None:
    method = small(case)
    model, x, reached = method.model, as_numbers(method), False
    later = later_than(model)
    for d in range(model.data.dims):
        broken = x.flatten(1).clone()
        broken[:, d] = math.nan
        with Numbers():
            after = model.conditionals(broken.reshape(x.shape), None)[0]
        assert bool(after[later[:, d]].isfinite().all())
        reached |= bool(after.isnan().any())
    assert reached  # the probe goes through


# ---- completions


def prefix(model: Autoregressive, n: int, places: int) -> Tensor:
    """[n, *event] bool: the values of the first places."""
    known = torch.zeros(n, model.data.dims, dtype=torch.bool)
    known[:, model.places[:places].flatten()] = True
    return known.reshape(n, *model.data.shape)


@pytest.mark.parametrize("case", DISCRETE, ids=str)
@torch.no_grad()
def test_completions_have_the_conditional_distribution(case: Case) -> None:
    method, n = small(case, **ONE_ORDER), 4096
    model, one = method.model, rows(method, 1, seed=1)
    known = prefix(model, n, len(model.places) // 2)
    drawn = model.complete(one.expand(n, *one.shape[1:]), known, torch.Generator().manual_seed(0))
    assert torch.equal(drawn[known], one.expand(n, *one.shape[1:])[known])
    states = cases.every_state(method.data)
    states = states[(states == one)[:, known[0]].all(1)]
    p = model.log_prob(states).double().softmax(0)
    equal = (drawn.flatten(1)[:, None] == states.flatten(1)).all(2)  # [n, states]
    observed = equal.sum(0).double()
    assert int(observed.sum()) == n
    common = p * n >= 5  # Pearson's rule; the rest is one cell
    observed = torch.cat([observed[common], observed[~common].sum()[None]])
    expected = torch.cat([p[common] * n, (p[~common].sum() * n)[None]])
    free = max(len(observed) - 1, 1)
    statistic = float(((observed - expected) ** 2 / expected.clamp_min(1e-9)).sum())
    assert statistic < free + 5 * math.sqrt(2 * free) + 5  # about five standard deviations; more for few cells


@pytest.mark.parametrize("case", DRAWN, ids=str)
def test_completions_keep_what_is_known_and_read_nothing_else(case: Case) -> None:
    method = small(case, **ONE_ORDER)
    model, x = method.model, rows(method, 3)
    known = prefix(model, 3, len(model.places) // 2)
    known[0] = True  # rows differ in how much is known
    other = torch.where(known, x, math.nan if model.data.levels is None else model.data.levels - 1 - x)
    one, two = (model.complete(each, known, torch.Generator().manual_seed(0)) for each in (x, other))
    assert torch.equal(one, two) and torch.equal(one[known], x[known])
    assert bool(one.double().isfinite().all())


@pytest.mark.parametrize("case", DRAWN, ids=str)
def test_completions_of_a_wrong_mask_are_refused(case: Case) -> None:
    method = small(case, **ONE_ORDER)
    known = ~prefix(method.model, 2, 1)
    with pytest.raises(ValueError, match=r"known: .* comes after one that"):
        method.model.complete(rows(method, 2), known, torch.Generator())


@pytest.mark.parametrize("case", DRAWN, ids=str)
def test_evaluations_are_the_steps_that_were_taken(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    method = small(case, **ONE_ORDER)
    model, taken = method.model, []
    step = type(model).step

    def counted(self: Autoregressive, state: Any, place: int) -> Tensor:
        taken.append(place)
        return step(self, state, place)

    monkeypatch.setattr(type(model), "step", counted)
    places = len(model.places)
    model.sample(2, torch.Generator().manual_seed(0))
    assert model.evaluations == places and taken == list(range(places))
    taken.clear()
    model.complete(rows(method, 2), prefix(model, 2, places // 2), torch.Generator().manual_seed(0))
    assert model.evaluations == len(taken) == places - places // 2  # what is known costs nothing


@pytest.mark.parametrize("case", DRAWN, ids=str)
@torch.no_grad()
def test_temperature_near_zero_gives_the_mode_of_every_conditional(case: Case) -> None:
    model = small(case, **ONE_ORDER).model
    dtype = torch.int64 if model.data.levels else torch.float64
    state, greedy = model.start(1, None), torch.zeros(1, model.data.dims, dtype=dtype)
    for place, at in enumerate(model.places):
        greedy[:, at] = model.likelihood.mode(model.step(state, place)[..., None]).to(dtype)
        model.admit(state, place, greedy[:, at])
    model.sampling = replace(model.sampling, temperature=1e-6)
    drawn = model.sample(4, torch.Generator().manual_seed(0)).flatten(1)
    # a millionth of a scale of about 1; whole levels are the same
    torch.testing.assert_close(drawn, greedy.expand(4, -1), rtol=0, atol=0 if model.data.levels else 1e-3)
    model.sampling = replace(model.sampling, temperature=1.0)
    assert not torch.equal(*model.sample(2, torch.Generator().manual_seed(0)).flatten(1))
