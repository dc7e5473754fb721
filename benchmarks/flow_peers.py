"""A training step and sampling of MAF, NSF and NICE against zuko's and nflows', side by side in one run.

The peers are no dependencies of the project. They go into a folder of their own, without what they ask for:

    pip install --no-deps --target /tmp/peers zuko==1.6.0 nflows==0.14
    PYTHONPATH=.:/tmp/peers python benchmarks/flow_peers.py

All sides have the same networks with the same weights (ReLU, the same masks, the last layers near 0), the same number
of parameters, Adam, float32 and one thread, in one process. Before anything is timed, every side's loss on the first
batch must be ours. A peer's step is `-log_prob(x).mean()`, its gradient and Adam on a batch that is ready in memory;
ours is `Trainer.step` with everything in it, and beside it the same without the drawing of the batch. Sampling is one
call without gradient. Times are the processor's, of this process. Ratios are taken within a turn, in which the sides
alternate; the median over the turns is printed.

Where a peer writes the same map with other parameters, they are set so that the map is the same: nflows' scales and
slopes are softplus(raw) + 1e-3, whose biases are moved to give 1. zuko's knots are other functions of raw numbers,
equal at 0 and near it: their loss may differ by 1e-3 of its size, every other one by 1e-5.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_models.method import build
from dgm_models.nn.coupling import SplitCoupling
from dgm_models.nn.flow import Flow
from dgm_models.nn.masked_flow import MaskedAutoregressive
from dgm_models.nn.spline import UNIT
from dgm_models.protocols import Batch, DataSpec
from dgm_models.training.optim import Optim, Optims
from dgm_models.training.runtime import keep_freed_memory
from dgm_models.training.source import ArraySource, Source
from dgm_models.training.trainer import Train, Trainer

ROWS, READY = 20_000, 20
SMALL = 1e-3  # the last layers' weights
CLOSE, CLOSE_KNOTS = 1e-5, 1e-3
OPTIM = Optim(lr=1e-4)


@dataclass(frozen=True)
class Case:
    """One flow: a method of the project, and how many coordinates it has."""

    method: str
    dims: int
    width: int
    depth: int
    layers: int
    batch: int
    params: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        told = " ".join(str(value) for value in self.params.values())
        return (
            f"{self.method} {told}".strip() + f", {self.dims} coordinates, {self.layers} x {self.depth} x {self.width}"
        )


BINS, BOUND = 8, 5.0
CASES = [
    Case("maf", 16, 128, 2, 5, 256),
    Case("maf", 64, 256, 2, 5, 256),
    Case("neural_spline", 16, 128, 2, 5, 256, {"form": "coupling", "bins": BINS, "bound": BOUND}),
    Case("neural_spline", 16, 128, 2, 5, 256, {"form": "autoregressive", "bins": BINS, "bound": BOUND}),
    Case("nice", 64, 256, 3, 4, 256, {"base": "normal"}),
    Case("nice", 784, 512, 3, 4, 128, {"base": "normal"}),
]


def linears(network: nn.Module) -> list[nn.Linear]:
    """In order, masked ones among them."""
    return [layer for layer in network.modules() if isinstance(layer, nn.Linear)]


def layers_of(model: Flow) -> list[SplitCoupling | MaskedAutoregressive]:
    return [part for part in model.transform.modules() if isinstance(part, SplitCoupling | MaskedAutoregressive)]


def ours(case: Case) -> Flow:
    """The project's flow with last layers near 0: shifts of SMALL, and knots; scales stay 1."""
    network = {"name": "mlp", "width": case.width, "depth": case.depth, "activation": "relu"}
    data = DataSpec("vector", (case.dims,))
    model = build(f"flows/{case.method}", data, network=network, layers=case.layers, **case.params).model
    assert isinstance(model, Flow)
    with torch.no_grad():
        for layer in layers_of(model):
            last = linears(layer.network)[-1]
            last.weight.copy_(SMALL * torch.randn_like(last.weight))
            if case.method == "maf":
                last.weight[1::2] = 0.0
    return model


def copied(source: list[nn.Linear], target: list[Any]) -> None:
    """The weights, and the masks where there are any, of ours into a peer's layers of the same sizes."""
    with torch.no_grad():
        for mine, theirs in zip(source, target, strict=True):
            theirs.weight.copy_(mine.weight)
            theirs.bias.copy_(mine.bias)
            if "mask" in dict(mine.named_buffers()):
                theirs.mask.copy_(mine.get_buffer("mask"))


def turned(layers: list[Any], dims: int) -> None:
    """Makes a masked network over reversed coordinates one over them as stored: zuko reverses the order alone."""
    with torch.no_grad():
        first, last = layers[0], layers[-1]
        for tensor in (first.weight, first.mask):
            tensor.copy_(tensor.flip(1).clone())
        for tensor in (last.weight, last.bias, last.mask):
            tensor.copy_(tensor.unflatten(0, (dims, -1)).flip(0).flatten(0, 1).clone())


class Zuko:
    def __init__(self, case: Case, model: Flow) -> None:
        import zuko
        from zuko.flows.autoregressive import MaskedAutoregressiveTransform
        from zuko.flows.coupling import GeneralCouplingTransform
        from zuko.transforms import AdditiveTransform, DependentTransform, MonotonicAffineTransform
        from zuko.transforms import MonotonicRQSTransform as Spline

        kind: dict[str, Any] = {"hidden_features": [case.width] * case.depth}
        if case.method == "neural_spline":
            kind |= {"univariate": partial(Spline, bound=BOUND), "shapes": [(BINS,), (BINS,), (BINS - 1,)]}
        if case.method == "nice":
            kind |= {"univariate": AdditiveTransform, "shapes": [()]}
        coordinates, transforms = torch.arange(case.dims), []
        for i, layer in enumerate(layers_of(model)):
            if isinstance(layer, SplitCoupling):
                mask = torch.zeros(case.dims, dtype=torch.bool).index_fill(0, layer.kept, True)
                transform = GeneralCouplingTransform(case.dims, mask=mask, **kind)
            else:
                transform = MaskedAutoregressiveTransform(
                    case.dims, order=coordinates.flip(0) if i % 2 else coordinates, **kind
                )
            theirs = [part for part in transform.hyper if not isinstance(part, nn.ReLU)]
            copied(linears(layer.network), theirs)
            if isinstance(layer, MaskedAutoregressive) and i % 2:
                turned(theirs, case.dims)
            transforms.append(transform)
        if case.method == "nice":

            def scaling(log_scale: Tensor) -> Any:
                return DependentTransform(MonotonicAffineTransform(torch.zeros(()), log_scale), 1)

            transforms.append(zuko.lazy.UnconditionalTransform(scaling, torch.zeros(case.dims)))
        base = zuko.lazy.UnconditionalDistribution(
            zuko.distributions.DiagNormal, torch.zeros(case.dims), torch.ones(case.dims), buffer=True
        )
        self.module: nn.Module = zuko.lazy.Flow(transforms, base)

    def log_prob(self, x: Tensor) -> Tensor:
        found: Tensor = self.module().log_prob(x)
        return found

    def sample(self, n: int) -> Tensor:
        found: Tensor = self.module().sample((n,))
        return found


class Plain(nn.Sequential):
    """A coupling's network as nflows calls it."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        found: Tensor = super().forward(x)
        return found


class Nflows:
    def __init__(self, case: Case, model: Flow) -> None:
        from nflows import transforms as nf
        from nflows.distributions.normal import StandardNormal
        from nflows.flows.base import Flow as NflowsFlow
        from nflows.transforms.made import MaskedLinear

        masked = {
            "hidden_features": case.width, "num_blocks": case.depth - 1, "use_residual_blocks": False,
            "activation": F.relu,
        }  # fmt: skip
        spline = {"num_bins": BINS, "tails": "linear", "tail_bound": BOUND}
        parts: list[nn.Module] = []
        for i, layer in enumerate(layers_of(model)):
            mine = linears(layer.network)
            if isinstance(layer, SplitCoupling):
                moved = torch.zeros(case.dims).index_fill(0, layer.moved, 1.0)

                def network(inputs: int, outputs: int) -> Plain:
                    sizes = [inputs] + [case.width] * case.depth
                    inner = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
                    return Plain(*inner, nn.Linear(sizes[-1], outputs))

                if case.method == "nice":
                    transform = nf.AdditiveCouplingTransform(moved, network)
                else:
                    transform = nf.PiecewiseRationalQuadraticCouplingTransform(moved, network, **spline)
                copied(mine, linears(transform.transform_net))
                last = linears(transform.transform_net)[-1]
            else:
                parts += [nf.ReversePermutation(case.dims)] if i else []
                if case.method == "maf":
                    transform = nf.MaskedAffineAutoregressiveTransform(case.dims, **masked)
                else:
                    transform = nf.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
                        features=case.dims, **masked, **spline
                    )
                theirs = [part for part in transform.autoregressive_net.modules() if isinstance(part, MaskedLinear)]
                copied(mine, theirs)
                last = theirs[-1]
            with torch.no_grad():  # softplus of UNIT is 1 - 1e-3
                if case.method == "maf":
                    for tensor in (last.weight, last.bias):
                        tensor.copy_(tensor.unflatten(0, (case.dims, 2)).flip(1).flatten(0, 1).clone())
                    last.bias[0::2] += UNIT
                elif case.method == "neural_spline":
                    last.bias.unflatten(0, (-1, 3 * BINS - 1))[:, 2 * BINS :] += UNIT
            parts.append(transform)
        if case.method == "nice":
            parts.append(Scaling(case.dims))
        self.module: nn.Module = NflowsFlow(nf.CompositeTransform(parts), StandardNormal([case.dims]))

    def log_prob(self, x: Tensor) -> Tensor:
        found: Tensor = self.module.log_prob(x)  # type: ignore[operator]
        return found

    def sample(self, n: int) -> Tensor:
        found: Tensor = self.module.sample(n)  # type: ignore[operator]
        return found


class Scaling(nn.Module):
    """NICE's diagonal, which nflows has not, as one of its transforms."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(dims))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x * self.log_scale.exp(), self.log_scale.sum().expand(len(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z * (-self.log_scale).exp(), -self.log_scale.sum().expand(len(z))


PEERS: dict[str, Callable[[Case, Flow], Any]] = {"zuko": Zuko, "nflows": Nflows}


class Ours(Trainer):
    """The trainer as it is, which adds up the seconds that went into drawing batches."""

    def __init__(self, case: Case, model: Flow) -> None:
        from dgm_models.nn.maximum_likelihood import MaximumLikelihood

        x = torch.randn(ROWS, case.dims, generator=torch.Generator().manual_seed(0))
        train = Train(steps=10**9, batch_size=case.batch)
        super().__init__(model, MaximumLikelihood(), ArraySource(x, model.data), train, Optims(OPTIM), 0)
        self.drawing = 0.0

    def _fetch(self, source: Source, start: int, stop: int, *path: int | str) -> Batch:
        begun = time.process_time()
        batch = super()._fetch(source, start, stop, *path)
        self.drawing += time.process_time() - begun
        return batch


class Side:
    """A peer's training."""

    def __init__(self, case: Case, peer: Any) -> None:
        self.peer, self.position = peer, 0
        rng = torch.Generator().manual_seed(1)
        self.ready = [torch.randn(case.batch, case.dims, generator=rng) for _ in range(READY)]
        self.optimizer = torch.optim.Adam(peer.module.parameters(), lr=OPTIM.lr, betas=OPTIM.betas, eps=OPTIM.eps)

    def step(self) -> None:
        loss = -self.peer.log_prob(self.ready[self.position % READY]).mean()
        self.position += 1
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def seconds(action: Callable[[], object], times: int) -> float:
    """Of one call, the processor's."""
    begun = time.process_time()
    for _ in range(times):
        action()
    return (time.process_time() - begun) / times


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def measure(case: Case, names: list[str], turns: int, length: float) -> None:
    """Asserts that the sides are the same, then times them in turns."""
    torch.manual_seed(0)
    model = ours(case)
    peers = {name: PEERS[name](case, model) for name in names}
    x = torch.randn(case.batch, case.dims)
    with torch.no_grad():
        loss = -float(model.log_prob(x).mean())
        print(f"{case}; {size(model):,} parameters, batch {case.batch}, {torch.get_num_threads()} thread", flush=True)
        for name, peer in peers.items():
            theirs = -float(peer.log_prob(x).mean())
            close = CLOSE_KNOTS if (name, case.method) == ("zuko", "neural_spline") else CLOSE
            if size(peer.module) != size(model) or abs(theirs - loss) > close * abs(loss):
                raise SystemExit(
                    f"{case}: the sides are not the same: ours {size(model)} parameters and a first loss of {loss}, "
                    f"{name} {size(peer.module)} and {theirs}"
                )
            print(f"  first loss {loss:.6f}, {name} {theirs:.6f}")
    trainer, rng = Ours(case, model), torch.Generator().manual_seed(0)
    sides = {name: Side(case, peer) for name, peer in peers.items()}
    steps: dict[str, Callable[[], object]] = {"ours": trainer.step}
    samples: dict[str, Callable[[], object]] = {"ours": lambda: model.sample(case.batch, rng)}
    for name in names:
        steps[name] = sides[name].step
        samples[name] = partial(peers[name].sample, case.batch)
    for what, actions in (("step", steps), ("sampling", samples)):
        timed(what, actions, trainer, turns, length)


def timed(what: str, actions: dict[str, Callable[[], object]], trainer: Ours, turns: int, length: float) -> None:
    found: dict[str, list[float]] = {name: [] for name in (*actions, "drawing")}
    with torch.set_grad_enabled(what == "step"):
        for action in actions.values():
            seconds(action, 3)
        times = {name: max(1, round(length / seconds(action, 3))) for name, action in actions.items()}
        for turn in range(turns):
            for name in list(actions) if turn % 2 == 0 else list(actions)[::-1]:
                trainer.drawing = 0.0
                found[name].append(seconds(actions[name], times[name]))
                if name == "ours":
                    found["drawing"].append(trainer.drawing / times[name])
    took = ", ".join(f"{name} {statistics.median(found[name]) * 1e3:.3f} ms" for name in actions)
    print(f"  {what}: {took}")
    for name in actions:
        if name == "ours":
            continue
        ratios = [a / b for a, b in zip(found["ours"], found[name], strict=True)]
        print(f"    ours / {name}: {told(ratios)}", end="")
        if what == "step":
            alike = [(a - d) / b for a, d, b in zip(found["ours"], found["drawing"], found[name], strict=True)]
            print(f"; without the drawing {told(alike)}", end="")
        print(flush=True)


def told(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7, help="measurements of each side")
    parser.add_argument("--seconds", type=float, default=1.0, help="of one measurement")
    parser.add_argument("--case", default="", help="only the cases whose name contains this")
    options = parser.parse_args()
    there = [name for name in PEERS if find_spec(name) is not None]
    if missing := [name for name in PEERS if name not in there]:
        print(f"not installed, and not measured: {', '.join(missing)}; how to install them:\n\n{__doc__}")
    if not there:
        raise SystemExit(1)
    torch.set_num_threads(1)
    kept = keep_freed_memory()  # as the project's workers do; it holds for the whole process, so for all sides
    print(
        f"torch {torch.__version__}, {', '.join(f'{name} {version(name)}' for name in there)}; "
        f"freed memory is kept: {kept}; load average before: {os.getloadavg()[0]:.2f}"
    )
    for case in CASES:
        if options.case in str(case):
            measure(case, there, options.turns, options.seconds)
    print(f"load average after: {os.getloadavg()[0]:.2f} (the benchmark itself is 1)")
    if missing:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
