"""Codebooks: what reaches whom by gradient, averages against a naive twin, codes that nothing uses, soft codes."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from dgm_models.method import Method, build, encoded
from dgm_models.nn.quantize import Learning, Level, Quantization, Quantizer, Seen
from dgm_models.protocols import Batch, DataSpec
from dgm_models.training.optim import Optim, Optims
from dgm_models.training.runtime import Runtime, current
from dgm_models.training.source import ArraySource
from dgm_models.training.trainer import Train, Trainer

DATA = DataSpec("vector", (6,))
SMALL = {"width": 8, "blocks": 1, "vector_codes": 4, "codebook_size": 6, "code_dim": 3}


def stored(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(seed: int = 0, **params: object) -> Method:
    method = build("vae/vq_vae", DATA, seed=seed, **{**SMALL, **params})
    for part in method:
        part.double()
    return method


@torch.no_grad()
def begin(method: Method, batch: Batch) -> None:
    """What the trainer does before the first step."""
    method.objective.initialize(method.model, batch)


def batch_of(method: Method, n: int = 12) -> Batch:
    return encoded(method.model, stored(n))


def gradients(learning: Learning, commitment: float) -> dict[str, Tensor]:
    """Parameter's name -> gradient of one loss, the same weights and codebook for every argument."""
    method = made(codebook="ema", commitment=commitment)
    quantizer = method.model.quantizers[0]
    if learning == "gradient":
        own = made(codebook="gradient", commitment=commitment)
        own.model.load_state_dict(method.model.state_dict())
        method, quantizer = own, own.model.quantizers[0]
    with torch.no_grad():
        quantizer.codebook.mul_(0.1)  # near the encoder's first vectors: several codes are in use
    method.objective.loss(method.model, batch_of(method)).total.backward()
    return {name: p.grad for name, p in method.model.named_parameters() if p.grad is not None}


# ---- gradients


def test_straight_through_has_the_codes_values_and_the_identity_s_gradient() -> None:
    quantizer = Quantizer(5, 3, "gradient").double()
    z = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    codes = quantizer.nearest(z)
    weights = torch.randn(2, 4, 3, dtype=torch.float64)
    through = Level(quantizer, z, codes).through
    (through * weights).sum().backward()
    assert torch.allclose(through, quantizer(codes), atol=1e-14, rtol=0)  # z + (e - z) rounds once
    assert torch.equal(z.grad, weights)
    assert quantizer.codebook.grad is None


def test_codebook_loss_reaches_the_codebook_alone() -> None:
    ema, gradient = gradients("ema", 0.0), gradients("gradient", 0.0)
    assert set(gradient) - set(ema) == {"quantizers.0.codebook"}
    for name in ema:
        assert torch.equal(ema[name], gradient[name]), name


def test_codebook_gradient_is_that_of_the_squared_distance() -> None:
    method = made(codebook="gradient")
    batch = batch_of(method)
    quantizer = method.model.quantizers[0]
    method.objective.loss(method.model, batch).total.backward()
    (level,) = method.model.levels(batch.x, Quantizer.nearest)
    expected = torch.zeros_like(quantizer.codebook)
    for z, code in zip(level.z.detach().flatten(0, 1), level.codes.flatten(), strict=True):
        expected[code] += 2 * (quantizer.codebook[code].detach() - z)
    assert torch.allclose(quantizer.codebook.grad, expected, atol=1e-12, rtol=0)


def test_commitment_reaches_the_encoder_alone_and_is_linear_in_its_weight() -> None:
    none, some, more = (gradients("gradient", beta) for beta in (0.0, 0.25, 0.5))
    for name in none:
        change = some[name] - none[name]
        assert bool((change != 0).any()) == name.startswith("encoder"), name
        assert torch.allclose(more[name] - none[name], 2 * change, atol=1e-10, rtol=0), name


def test_ema_codebook_is_no_parameter() -> None:
    assert "quantizers.0.codebook" not in dict(made(codebook="ema").model.named_parameters())
    assert "quantizers.0.codebook" in dict(made(codebook="gradient").model.named_parameters())


# ---- averages


def test_ema_codebook_equals_the_naive_twin() -> None:
    size, dim, decay, rows = 4, 3, 0.9, 40
    quantizer = Quantizer(size, dim, "ema").double()
    rng = torch.Generator().manual_seed(1)
    n, m = [rows / size] * size, [quantizer.codebook[k] * rows / size for k in range(size)]
    e = quantizer.codebook.clone()
    for _ in range(20):
        z = torch.randn(1, rows, dim, generator=rng, dtype=torch.float64)
        codes = quantizer.nearest(z)
        seen = Seen(quantizer).double()
        seen.add(Level(quantizer, z, codes), torch.rand(1, rows, dtype=torch.float64))
        quantizer.follow(seen.counts, seen.sums, seen.square, decay)
        for k in range(size):  # the paper's eqs. 6 to 8, code by code
            mine = [row for row in z[0] if int(((row - e) ** 2).sum(1).argmin()) == k]
            n[k] = decay * n[k] + (1 - decay) * len(mine)
            m[k] = decay * m[k] + (1 - decay) * sum(mine, torch.zeros(dim, dtype=torch.float64))
        e = torch.stack([m[k] / n[k] for k in range(size)])
        assert torch.allclose(quantizer.codebook, e, atol=1e-12, rtol=0)
    assert torch.allclose(quantizer.usage, torch.tensor(n, dtype=torch.float64) / rows, atol=1e-13, rtol=0)


def test_codebook_moves_once_a_step_however_the_batch_is_divided() -> None:
    reached = []
    for accumulate in (1, 3):
        method = made(decay=0.5)
        trainer = Trainer(
            method.model, method.objective, ArraySource(stored(24), DATA), Train(steps=3, batch_size=12,
            accumulate=accumulate), Optims(Optim(name="sgd", lr=0.01)), 0,
        )  # fmt: skip
        trainer.run()
        reached.append(method.model.quantizers[0].codebook.clone())
    assert torch.allclose(*reached, atol=1e-12, rtol=0)
    assert not torch.allclose(reached[0], made().model.quantizers[0].codebook, atol=1e-2)


def test_validation_leaves_the_codebook_alone() -> None:
    method = made()
    method.model.eval()
    before = copy.deepcopy(method.objective.state_dict())
    method.objective.loss(method.model, batch_of(method))
    assert all(torch.equal(value, before[name]) for name, value in method.objective.state_dict().items())


def test_perplexity_is_the_number_of_codes_in_use() -> None:
    quantizer = Quantizer(8, 2, "ema")
    assert float(quantizer.perplexity) == pytest.approx(8.0)
    quantizer.usage.copy_(torch.tensor([0.5, 0.5, 0, 0, 0, 0, 0, 0]))
    assert float(quantizer.perplexity) == pytest.approx(2.0)


def test_unused_code_keeps_its_vector_when_its_averages_vanish() -> None:
    quantizer = Quantizer(2, 1, "ema")
    far = quantizer.codebook[1].clone()
    for _ in range(3000):
        quantizer.follow(torch.tensor([4.0, 0.0]), torch.tensor([[2.0], [0.0]]), torch.tensor(0.0), 0.9)
    assert float(quantizer.usage[1]) < 1e-30
    assert quantizer.codebook[0].item() == pytest.approx(0.5)
    assert torch.allclose(quantizer.codebook[1], far, rtol=1e-4)


# ---- beginnings and restarts


def vectors(method: Method, batch: Batch) -> Tensor:
    return method.model.levels(batch.x, Quantizer.nearest)[0].z.detach().flatten(0, 1)


def among(rows: Tensor, every: Tensor) -> Tensor:
    """[k] bool: which rows are one of `every`; an average over a product and a division rounds some times."""
    return (rows[:, None] - every[None]).abs().amax(2).amin(1) < 1e-12


def test_codebook_begins_at_vectors_of_the_batch() -> None:
    for learning in ("ema", "gradient"):
        method = made(codebook=learning)
        batch = batch_of(method)
        begin(method, batch)
        quantizer = method.model.quantizers[0]
        assert bool(among(quantizer.codebook, vectors(method, batch)).all())
        assert len(quantizer.codebook.unique(dim=0)) == 6
        assert 0 < float(quantizer.spread) < float(vectors(method, batch).var())
        assert all(not value.any() for value in method.objective.state_dict().values())


def test_codes_beyond_the_batch_s_vectors_keep_their_place() -> None:
    method = made(codebook_size=16)
    before = method.model.quantizers[0].codebook.clone()
    batch = batch_of(method, 2)  # 8 vectors
    begin(method, batch)
    moved = (method.model.quantizers[0].codebook != before).any(1)
    assert int(moved.sum()) == 8


@pytest.mark.parametrize("learning", ["ema", "gradient"])
def test_dead_code_is_put_onto_a_vector_of_the_batch(learning: Learning) -> None:
    method = made(codebook=learning, decay=0.5, restart=0.1)
    quantizer, objective = method.model.quantizers[0], method.objective
    begin(method, batch_of(method))
    with torch.no_grad():
        quantizer.place(torch.full((6, 3), 1e3), torch.arange(6) == 2)
    method.model.train()
    restarted_at = 0
    for step in range(1, 8):
        objective.loss(method.model, batch_of(method))
        objective.advance(method.model, step)
        if float(quantizer.codebook[2].detach().abs().max()) < 1e2:
            restarted_at = step
            break
    assert restarted_at == 4  # 0.5^4 is the first power below 0.1
    assert bool(among(quantizer.codebook[2:3], vectors(method, batch_of(method))).all())
    assert float(quantizer.usage[2]) == pytest.approx(1 / 6)


def test_dead_code_stays_without_restarts() -> None:
    method = made(decay=0.5, restart=0.0)
    quantizer = method.model.quantizers[0]
    quantizer.place(torch.full((6, 3), 1e3), torch.arange(6) == 2)
    method.model.train()
    for step in range(1, 8):
        method.objective.loss(method.model, batch_of(method))
        method.objective.advance(method.model, step)
    assert torch.allclose(quantizer.codebook[2], torch.full((3,), 1e3, dtype=torch.float64), rtol=1e-6)


class Lockstep:
    """The runtimes of some ranks that live in threads: a sum waits for everybody."""

    def __init__(self, rank: int, world: int, shared: list[list[Tensor]], barrier: threading.Barrier) -> None:
        self.rank, self.world, self.shared, self.barrier = rank, world, shared, barrier

    def sum(self, tensors: Sequence[Tensor]) -> None:
        self.shared[self.rank] = [tensor.clone() for tensor in tensors]
        self.barrier.wait(timeout=60)
        totals = [torch.stack(each).sum(0) for each in zip(*self.shared, strict=True)]
        self.barrier.wait(timeout=60)
        for tensor, total in zip(tensors, totals, strict=True):
            tensor.copy_(total)


def test_two_ranks_restart_the_codes_that_one_would() -> None:
    def start() -> Method:
        method = made(decay=0.5, restart=0.5)
        begin(method, batch_of(method))
        method.model.quantizers[0].place(torch.full((6, 3), 1e3), torch.tensor([0, 1, 0, 0, 1, 0]) > 0)
        method.model.quantizers[0].usage[[1, 4]] = 0.0  # dead after this step
        method.model.train()
        return method

    whole = start()
    whole.objective.loss(whole.model, batch_of(whole))
    whole.objective.advance(whole.model, 0)
    ranks = [start(), start()]
    for method, part in zip(ranks, batch_of(whole).split(2), strict=True):
        method.objective.loss(method.model, part)
    shared, barrier = [[], []], threading.Barrier(2)
    for rank, method in enumerate(ranks):
        method.objective.runtime = lambda rank=rank: Lockstep(rank, 2, shared, barrier)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda method: method.objective.advance(method.model, 0), ranks))
    expected = whole.model.quantizers[0]
    assert float(expected.codebook.abs().max()) < 1e2  # both were restarted
    for method in ranks:
        found = method.model.quantizers[0]
        assert torch.allclose(found.codebook, expected.codebook, atol=1e-12, rtol=0)
        assert torch.equal(found.codebook[[1, 4]], expected.codebook[[1, 4]])  # the same vectors, to the bit
    alone = start()  # the twin that forgets the other rank
    alone.objective.loss(alone.model, next(batch_of(whole).split(2)))
    alone.objective.advance(alone.model, 0)
    assert not torch.allclose(alone.model.quantizers[0].codebook, expected.codebook, atol=1e-3)


def test_objective_takes_the_trainer_s_runtime() -> None:
    assert made().objective.runtime is current
    assert isinstance(current(), Runtime)
    assert isinstance(made().objective, Quantization)


# ---- soft codes


def test_soft_codes_are_the_responsibilities_of_a_mixture() -> None:
    quantizer = Quantizer(4, 2, "ema").double()
    quantizer.spread.fill_(0.3)
    z = torch.randn(1, 1, 2, dtype=torch.float64)
    density = (-((z[0] - quantizer.codebook) ** 2).sum(1) / (2 * 0.3)).exp()
    codes, log_q = quantizer.draw(z.expand(20000, 1, 2), torch.Generator().manual_seed(0))
    expected = density / density.sum()
    share = torch.bincount(codes[:, 0], minlength=4) / 20000
    assert float((share - expected).abs().max()) < 4 * math.sqrt(0.25 / 20000)  # four standard errors of a share
    assert torch.allclose(log_q, expected.log()[codes[:, 0]], atol=1e-12, rtol=0)


def test_soft_codes_without_spread_are_the_nearest() -> None:
    quantizer = Quantizer(8, 3, "ema").double()
    quantizer.spread.zero_()
    z = torch.randn(10, 5, 3, dtype=torch.float64)
    codes, log_q = quantizer.draw(z, torch.Generator().manual_seed(0))
    assert torch.equal(codes, quantizer.nearest(z))
    assert float(log_q.abs().max()) < 1e-6  # the second nearest is thousands of nats away
    squares = ((z[:, :, None] - quantizer.codebook) ** 2).sum(3)
    assert torch.equal(codes, squares.argmin(2))
