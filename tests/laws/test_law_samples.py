"""Laws of what is kept and drawn: an artifact samples as its model did, in the stored form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dgm_models.method import Method, fit, load, save
from dgm_models.sampling import BLOCK, conditions, labelled, sample
from tests.laws import cases
from tests.laws.cases import CASES, Case

SAMPLERS = [case for case in CASES if "samples" in case.row.capabilities]


def draw(method: Method, n: int, seed: int = 0) -> Tensor:
    """Samples, of every label in turn where the method asks for one."""
    return sample(method, n, seed, cond=labelled(method, n))


def trained(case: Case):
    """A method after two steps: no weight is where its initialisation left it."""
    method = cases.made(case)
    return fit(method, cases.source(case.spec), steps=2, batch_size=8, optim={"lr": 0.01})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loaded_method_is_the_saved_one(case: Case, tmp_path) -> None:
    method = trained(case)
    again = load(save(method, tmp_path / "artifact", lineage={"run": "x"}))
    assert (again.name, again.data, again.params) == (method.name, method.data, method.params)
    assert again.lineage == {"run": "x"}
    assert not again.model.training
    assert cases.differences(cases.parameters(again), cases.parameters(method)) == []
    assert cases.differences(cases.parameters(again), cases.parameters(cases.made(case))) != []  # it was trained


@pytest.mark.parametrize("case", SAMPLERS, ids=str)
def test_loaded_method_samples_the_same_bytes(case: Case, tmp_path) -> None:
    method = trained(case)
    before = draw(method, 9, seed=3)
    assert torch.equal(draw(load(save(method, tmp_path / "artifact")), 9, seed=3), before)
    assert not torch.equal(draw(method, 9, seed=4), before)


@pytest.mark.parametrize("case", SAMPLERS, ids=str)
def test_samples_have_the_stored_type_shape_and_range(case: Case) -> None:
    x = draw(cases.made(case), 11)
    assert x.shape == (11, *case.spec.shape)
    assert x.dtype == cases.rows(case.spec, 1).dtype
    if case.spec.levels is None:
        assert bool(x.isfinite().all())
    else:
        assert int(x.min()) >= 0 and int(x.max()) < case.spec.levels
        assert len(x.unique()) > 1


@pytest.mark.parametrize("case", SAMPLERS, ids=str)
def test_samples_are_the_beginning_of_longer_lists(case: Case) -> None:
    method = cases.made(case)
    long = draw(method, BLOCK + 3, seed=1)
    for n in (1, BLOCK - 1, BLOCK, BLOCK + 1):
        assert torch.equal(draw(method, n, seed=1), long[:n])
    assert not torch.equal(long[:3], long[BLOCK:])  # blocks differ


@pytest.mark.parametrize("case", SAMPLERS, ids=str)
def test_samples_leave_the_global_generator_alone(case: Case) -> None:
    method = cases.made(case)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draw(method, 2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("n", [0, -1])
def test_samples_fewer_than_one_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match=f"n: {n} samples"):
        sample(cases.made(Case("vae/vae", "vector:discrete")), n)


def test_samples_of_a_model_without_a_sampler_are_refused() -> None:
    with pytest.raises(ValueError, match="extractor/classifier has no sampler"):
        sample(cases.made(Case("extractor/classifier", "image:discrete")), 1)


@pytest.mark.parametrize("case", [case for case in SAMPLERS if case.asked], ids=str)
def test_samples_follow_their_label_alone(case: Case) -> None:
    method = trained(case)
    zero, one = (sample(method, 20, cond=torch.full((20,), label)) for label in (0, 1))
    assert not torch.equal(zero, one)
    mixed = sample(method, 20, cond=torch.arange(20) % 2)
    assert torch.equal(mixed[::2], zero[::2]) and torch.equal(mixed[1::2], one[1::2])  # neighbours do not matter
    with pytest.raises(ValueError, match=r"built with \{name: label\}"):
        sample(method, 20)
    with pytest.raises(ValueError, match="3 conditions for 20 samples"):
        sample(method, 20, cond=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="label: 3 is none of 0 to 2"):
        labelled(method, 4, 3)


def test_samples_of_a_model_without_a_condition_cannot_be_asked_for_one() -> None:
    method = cases.made(Case("vae/vae", "vector:discrete"))
    with pytest.raises(ValueError, match="built without a condition"):
        sample(method, 2, cond=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="label: 1; vae/vae was built without a condition"):
        labelled(method, 2, 1)
    assert conditions(method, cases.rows(method.data, 2), None) is None
