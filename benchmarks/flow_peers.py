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

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.side_by_side import Ours, Training, asked, frame, size, timed
from dgm_models.method import build
from dgm_models.nn.coupling import SplitCoupling
from dgm_models.nn.flow import Flow
from dgm_models.nn.masked_flow import MaskedAutoregressive
from dgm_models.nn.maximum_likelihood import MaximumLikelihood
from dgm_models.nn.spline import UNIT
from dgm_models.protocols import DataSpec
from dgm_models.training.optim import Optim

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


def nll(peer: Any, x: Tensor) -> Tensor:
    found: Tensor = -peer.log_prob(x).mean()
    return found


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
    data, ready, rng = (torch.Generator().manual_seed(seed) for seed in (0, 1, 0))
    x = torch.randn(ROWS, case.dims, generator=data)
    trainer = Ours(model, MaximumLikelihood(), x, case.batch, OPTIM)
    batches = [torch.randn(case.batch, case.dims, generator=ready) for _ in range(READY)]
    steps: dict[str, Callable[[], object]] = {"ours": trainer.step}
    samples: dict[str, Callable[[], object]] = {"ours": lambda: model.sample(case.batch, rng)}
    for name in names:
        steps[name] = Training(peers[name].module, partial(nll, peers[name]), batches, OPTIM).step
        samples[name] = partial(peers[name].sample, case.batch)
    timed("step", steps, trainer, turns, length)
    with torch.no_grad():
        timed("sampling", samples, None, turns, length)


def main() -> None:
    options = asked(__doc__)
    with frame({name: name for name in PEERS}, __doc__) as there:
        for case in CASES:
            if options.case in str(case):
                measure(case, there, options.turns, options.seconds)


if __name__ == "__main__":
    main()
