"""The layout of the reduction's buckets, and gradients that share their memory."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

from dgm_models.codecs import Standardized
from dgm_models.objective import Loss, Objective, Turn
from dgm_models.protocols import Batch, DataSpec, Model
from dgm_models.training import reduce
from dgm_models.training.optim import Optim, Optims
from dgm_models.training.runtime import Runtime
from dgm_models.training.source import ArraySource
from dgm_models.training.trainer import Train, Trainer


def parameters(*sizes: int, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(size, dtype=dtype)) for size in sizes]


def test_buckets_hold_every_parameter_once_last_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reduce, "BUCKET_BYTES", 40)
    assert reduce.buckets(parameters(3, 4, 5, 100, 1, 2)) == [[5, 4, 3], [2, 1, 0]]
    assert reduce.buckets([]) == []


def test_buckets_have_one_type_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reduce, "BUCKET_BYTES", 40)
    mixed = [*parameters(5, 5), *parameters(5, dtype=torch.float64), *parameters(5, 5, dtype=torch.bfloat16)]
    found = reduce.buckets(mixed)
    assert sorted(i for bucket in found for i in bucket) == [0, 1, 2, 3, 4]
    assert all(len({mixed[i].dtype for i in bucket}) == 1 for bucket in found)
    assert found == [[2], [1, 0], [4, 3]]  # the bfloat16 bucket of 20 bytes stays open to the end


DATA = DataSpec("vector", (4,))


class Shared(Model):
    """Two weights whose gradients autograd leaves as views of one tensor."""

    def __init__(self) -> None:
        super().__init__(DATA, Standardized(DATA))
        self.p, self.q = nn.Parameter(torch.zeros(4, 1)), nn.Parameter(torch.zeros(1, 4))


class Linear(Objective):
    def turns(self) -> list[Turn]:
        return [Turn("model", self.loss)]

    def loss(self, model: Shared, batch: Batch) -> Loss:
        return Loss(((model.p.view(-1) + model.q.view(-1)) * batch.x).sum())


def test_gradients_that_share_their_memory_are_divided_once() -> None:
    model = Shared()
    rows = ArraySource(torch.ones(8, 4), DATA)
    Trainer(model, Linear(), rows, Train(steps=1, batch_size=8), Optims(Optim(name="sgd", lr=1.0)), 0).run()
    assert model.p.flatten().tolist() == model.q.flatten().tolist() == [-1.0] * 4  # the mean of x, from 0


def test_an_interrupted_update_leaves_nothing_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    class Finished:
        def wait(self) -> None: ...

    monkeypatch.setattr(reduce.dist, "all_reduce", lambda tensor, async_op: Finished())
    monkeypatch.setattr(reduce.Reduction, "_agree", lambda self, here, scalars: None)
    p, q = parameters(2, 3)
    reduction = reduce.Reduction(Runtime(world=2), "model", {"p": p, "q": q})
    reduction.backward((p * 2.0).sum() + (q * 3.0).sum(), last=True)  # and then something raised
    p.grad = q.grad = None
    reduction.begin()
    reduction.backward((p * 5.0).sum() + (q * 7.0).sum(), last=True)
    assert reduction.finish([]) == [p, q]
    assert p.grad is not None and p.grad.tolist() == [5.0] * 2
    assert q.grad is not None and q.grad.tolist() == [7.0] * 3


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_glibc_is_told_to_keep_freed_memory() -> None:
    script = """
from dgm_models.training.runtime import keep_freed_memory
import resource, torch
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    before = faults()
    for _ in range(50): torch.ones(4 * 2**20)
    return faults() - before
before = work(); assert keep_freed_memory(); work(); print(before, work())
"""
    given, kept = map(
        int, subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout.split()
    )
    assert kept < given / 10
