"""RealNVP and Glow of images against normflows', MADE, PixelCNN and NADE against public forms, side by side in one run.

The peers are no dependencies of the project. They go into a folder of their own, without what they ask for:

    pip install --no-deps --target /tmp/peers normflows==1.7.3 nflows==0.14 pythae==0.1.2
    PYTHONPATH=.:/tmp/peers python benchmarks/likelihood_peers.py

Both sides have the same network with the same weights, Adam, float32 and one thread, in one process. Before anything
is timed, the other side's loss on the first batch and the norm of its gradient must be ours, and for flows what its
sampler makes of our latents of that batch must be the batch. A peer's step is its loss, the gradient and torch's Adam
as it is by default (the project's asks for its fused form) on an encoded batch that is ready in memory. Ours is
`Trainer.step` with everything in it, and beside it the same without the drawing of the batch, in which levels are
encoded: for flows with noise, and RealNVP's with a logit. Sampling is one call without gradient. Times are the
processor's, of this process. Ratios are taken within a turn, in which the sides alternate; the median over the turns is
printed.

What a peer is:

normflows: a `MultiscaleFlow` of its `Squeeze`, `ActNorm`, `Invertible1x1Conv` (LU), `AffineCouplingBlock` and
`MaskedAffineFlow`, with standard normal bases without parameters. Its couplings and ActNorms are turned by its
`Reverse`, for its flows map latents to data by z exp(s) + t and ours data to latents. The couplings' networks are
copies of ours. Glow's outputs reach normflows by a view; RealNVP's bounded scale is computed as ours, and stacked along
the channels, where normflows expects it, in place of a last axis. A checkerboard is a `MaskedAffineFlow`, which asks
for the scale and then for the shift: both are of one pass of the network, as ours. (normflows' own checkerboard split
gives the network half-width images, which is another model.) Its `sample` also computes the density of what it draws.

nflows: its `MADE` without residual blocks, with our masks in place of its own, and a Bernoulli cross-entropy.

pythae: its `MaskedConv2d`, which multiplies the mask into the weights in every forward, in our network: its own
PixelCNN, all of it k x k convolutions with batch normalisation, cannot have our blocks. 1 x 1 convolutions of one
channel have no mask and are torch's. Its kernels have rows below the pixel, which the mask leaves out and ours do not
have: these weights are stated as spare, and Adam walks over them.

loop, sums: NADE in plain torch, written here, its gradient torch's. The loop adds a dimension's product to the hidden
sums and reads the next output, dimension after dimension; sums takes the cumulative sums
of all dimensions at once.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.side_by_side import Ours, Training, asked, frame, measured, size, timed
from dgm_models.autoregressive.nade import Nade
from dgm_models.autoregressive.pixel_cnn import PixelCnn
from dgm_models.flows.glow import InvertibleConvolution
from dgm_models.flows.real_nvp import Bounded
from dgm_models.method import Method, build
from dgm_models.nn.coupling import Coupling, SplitCoupling
from dgm_models.nn.flow import Chain, Flow
from dgm_models.nn.image_flow import MultiScale, Squeeze
from dgm_models.nn.masked import MaskedAutoregression
from dgm_models.nn.normalisation import ActNorm
from dgm_models.protocols import Batch, DataSpec
from dgm_models.training.optim import Optim

ROWS, READY = 4096, 20  # of the dataset; batches that a peer finds in memory
SMALL = 0.02  # weights that begin at 0 are moved by so much: a network that gives 0 would not show in the loss
OPTIM = Optim(lr=1e-4)
CLOSE, CLOSE_NORM = 1e-5, 1e-4  # of losses and gradients: sums of float32 terms in another order
CLOSE_SAMPLES = 1e-3


@dataclass(frozen=True)
class Case:
    """A method of the project beside a peer: on what data, with how many examples a step and samples at once."""

    peer: str
    method: str
    data: DataSpec
    batch: int
    params: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        told = ", ".join(f"{name} {value}" for name, value in self.params.items())
        shape = " x ".join(map(str, self.data.shape))
        return f"{self.method} and {self.peer}, {shape}, {self.data.levels} levels, {told}"


BINARY, GREY = DataSpec("image", (1, 28, 28), 2), DataSpec("image", (1, 28, 28), 256)
COLOUR = DataSpec("image", (3, 32, 32), 256)
CASES = [
    Case("normflows", "flows/real_nvp", GREY, 32, {"channels": 16, "blocks": 1}),
    Case("normflows", "flows/real_nvp", COLOUR, 16, {"channels": 16, "blocks": 1}),
    Case("normflows", "flows/glow", GREY, 32, {"channels": 64, "steps": 4}),
    Case("normflows", "flows/glow", COLOUR, 16, {"channels": 64, "steps": 4}),
    Case("nflows", "autoregressive/made", BINARY, 128, {"width": 500, "depth": 1}),
    Case("nflows", "autoregressive/made", BINARY, 128, {"width": 500, "depth": 2}),
    Case("pythae", "autoregressive/pixel_cnn", BINARY, 16, {"width": 32, "blocks": 5}),
    Case("pythae", "autoregressive/pixel_cnn", GREY, 16, {"width": 32, "blocks": 5}),
    Case("loop", "autoregressive/nade", BINARY, 64, {"width": 500}),
    Case("sums", "autoregressive/nade", BINARY, 64, {"width": 500}),
]

# ---- image flows


class Layout(nn.Module):
    """A copy of Glow's network [..., size] whose outputs are channels (t, h, t, h, ...): a view, no copy."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.network(x, None)
        return found.movedim(-1, 2).flatten(1, 2)


class Limited(nn.Module):
    """A copy of RealNVP's network, with the scales that `Bounded` makes of its outputs."""

    def __init__(self, bounded: Bounded) -> None:
        super().__init__()
        self.network = copy.deepcopy(bounded.network)
        self.scale = nn.Parameter(bounded.scale.detach().clone())

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Shifts and log-scales."""
        t, s = self.network(x, None).unbind(-1)
        return t, self.scale * torch.tanh(s)

    def forward(self, x: Tensor) -> Tensor:
        """Channels (t, s, t, s, ...)."""
        return torch.stack(self.parts(x), 2).flatten(1, 2)


class Scale(nn.Module):
    """The log-scales; the shifts of the same pass are kept for `Shift`."""

    def __init__(self, bounded: Bounded) -> None:
        super().__init__()
        self.limited = Limited(bounded)
        self.shifts = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        self.shifts, scales = self.limited.parts(x)
        return scales


class Shift(nn.Module):
    """The shifts of the pass that `Scale` made just before."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        self.kept = [scale]  # a list: no module of its own

    def forward(self, x: Tensor) -> Tensor:
        return self.kept[0].shifts


class Normflows:
    """A MultiscaleFlow, its levels in the order of latents to data."""

    spare = 0

    def __init__(self, case: Case, method: Method) -> None:
        import normflows as nf

        model = method.model
        assert isinstance(model, Flow) and isinstance(model.transform, MultiScale)
        self.shapes = model.transform.shapes[::-1]
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it calls torch.lu, which is deprecated
            levels = [
                [nf.flows.base.Composite([self._converted(nf, part) for part in reversed(list(_parts(scale)))])]
                for scale in reversed(model.transform.scales)
            ]
        bases = [nf.distributions.DiagGaussian(shape, trainable=False) for shape in self.shapes]
        merges = [nf.flows.Merge("channel") for _ in levels[1:]]
        self.module: Any = nf.MultiscaleFlow(bases, levels, merges, class_cond=False)

    @staticmethod
    def _converted(nf: Any, part: nn.Module) -> Any:
        turned = nf.flows.base.Reverse
        if isinstance(part, Squeeze):
            return nf.flows.Squeeze()
        if isinstance(part, ActNorm):
            norm = nf.flows.ActNorm((len(part.bias), 1, 1))
            norm.s.copy_(part.log_scale.reshape(norm.s.shape))
            norm.t.copy_(part.bias.reshape(norm.t.shape))
            norm.data_dep_init_done.fill_(1.0)
            return turned(norm)
        if isinstance(part, InvertibleConvolution):
            mixing = nf.flows.Invertible1x1Conv(len(part.order), use_lu=True)
            for mine, theirs in (
                (torch.eye(len(part.order))[part.order], mixing.P), (part.sign, mixing.sign_S), (part.lower, mixing.L),
                (part.upper, mixing.U), (part.log_scale, mixing.log_S),
            ):  # fmt: skip
                theirs.copy_(mine)
            return mixing
        if isinstance(part, Coupling):
            assert isinstance(part.network, Bounded)
            scale = Scale(part.network)
            return turned(nf.flows.MaskedAffineFlow(part.mask.float(), Shift(scale), scale))
        assert isinstance(part, SplitCoupling)
        half = "channel" if int(part.kept[0]) == 0 else "channel_inv"
        if isinstance(part.network, Bounded):
            return turned(nf.flows.AffineCouplingBlock(Limited(part.network), scale_map="exp", split_mode=half))
        return turned(nf.flows.AffineCouplingBlock(Layout(part.network), scale_map="sigmoid_inv", split_mode=half))

    def loss(self, x: Tensor) -> Tensor:
        found: Tensor = self.module.forward_kld(x)
        return found

    def sample(self, n: int) -> Tensor:
        found: Tensor = self.module.sample(n)[0]
        return found

    def decode(self, z: Tensor) -> Tensor:
        """What it makes of our latents [B, D], which begin with those of the scale of the data."""
        sizes = [torch.Size(shape).numel() for shape in self.shapes]
        parts = torch.split(z, sizes[::-1], 1)[::-1]
        found: Tensor = self.module.forward_and_log_det(
            [part.reshape(-1, *shape) for part, shape in zip(parts, self.shapes, strict=True)]
        )[0]
        return found


def _parts(scale: nn.Module) -> nn.ModuleList:
    assert isinstance(scale, Chain)
    return scale.parts


# ---- autoregressive models


class Nflows:
    """MADE with our masks."""

    spare = 0

    def __init__(self, case: Case, method: Method) -> None:
        from nflows.transforms.made import MADE, MaskedLinear

        model = method.model
        assert isinstance(model, MaskedAutoregression)
        network, degrees = model.network, model.degrees
        self.module: nn.Module = MADE(
            case.data.dims, case.params["width"], num_blocks=case.params["depth"] - 1, use_residual_blocks=False
        )
        between = [degrees.order, *degrees.hidden, degrees.order]
        layers: list[Any] = [*network.layers, network.last]
        theirs = [part for part in self.module.modules() if isinstance(part, MaskedLinear)]
        with torch.no_grad():
            for i, (layer, other) in enumerate(zip(layers, theirs, strict=True)):
                other.weight.copy_(layer.weight)
                other.bias.copy_(layer.bias)
                above = torch.gt if layer.strict else torch.ge
                other.mask.copy_(above(between[i + 1][:, None], between[i]))

    def loss(self, x: Tensor) -> Tensor:
        return cross_entropy(self.module(x.flatten(1)), x)


class Block(nn.Module):
    """A residual block of PixelCNN with pythae's masked convolution."""

    def __init__(self, width: int, kernel: int, masked: Any) -> None:
        super().__init__()
        self.down = nn.Conv2d(2 * width, width, 1)
        self.look = masked("B", width, width, kernel, 1, kernel // 2)
        self.up = nn.Conv2d(width, 2 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.up(F.relu(self.look(F.relu(self.down(F.relu(x))))))
        return out


class Pythae:
    """Our PixelCNN of pythae's masked convolutions."""

    def __init__(self, case: Case, method: Method) -> None:
        from pythae.models.normalizing_flows.pixelcnn.utils import MaskedConv2d

        model = method.model
        assert isinstance(model, PixelCnn) and model.channels == 1
        self.levels, width = case.data.levels or 0, case.params["width"]
        first, kernel = method.params["first_kernel"], method.params["kernel"]
        self.module = nn.Sequential(
            MaskedConv2d("A", 2, 2 * width, first, 1, first // 2),
            *(Block(width, kernel, MaskedConv2d) for _ in range(case.params["blocks"])),
            nn.ReLU(), nn.Conv2d(2 * width, 2 * width, 1), nn.ReLU(), nn.Conv2d(2 * width, model.num_outputs, 1),
        )  # fmt: skip
        mine, theirs = (
            [part for part in module.modules() if isinstance(part, nn.Conv2d)] for module in (model, self.module)
        )
        self.spare = 0
        with torch.no_grad():
            for layer, other in zip(mine, theirs, strict=True):
                other.weight[:, :, : layer.weight.shape[2]] = layer.weight
                assert layer.bias is not None and other.bias is not None
                other.bias.copy_(layer.bias)
                self.spare += other.weight.numel() - layer.weight.numel()

    def loss(self, x: Tensor) -> Tensor:
        inputs = F.pad(x * (2 / (self.levels - 1)) - 1, (0, 0, 0, 0, 0, 1), value=1.0)
        outputs = self.module(inputs)
        if self.levels == 2:
            return cross_entropy(outputs, x)
        return F.cross_entropy(outputs, x[:, 0].long(), reduction="sum") / len(x)


class Plain(nn.Module):
    """NADE of binary dimensions."""

    def __init__(self, model: Nade) -> None:
        super().__init__()
        self.incoming, self.hidden_bias, self.outgoing, self.bias = (
            nn.Parameter(p.detach().clone())
            for p in (model.incoming[:, 0], model.hidden_bias, model.outgoing[:, 0], model.bias)
        )


class Loop(Plain):
    def forward(self, x: Tensor) -> Tensor:
        """The logits [B, D] of x [B, D]."""
        sums, logits = self.hidden_bias.expand(len(x), -1), []
        for d in range(x.shape[1]):
            logits.append(F.linear(sums.sigmoid(), self.outgoing[d : d + 1], self.bias[d : d + 1]))
            sums = sums + x[:, d : d + 1] @ self.incoming[d : d + 1]
        return torch.cat(logits, 1)


class Sums(Plain):
    def forward(self, x: Tensor) -> Tensor:
        """The logits [B, D] of x [B, D]."""
        terms = x[:, :-1, None] * self.incoming[:-1]
        sums = torch.cat([self.hidden_bias.expand(len(x), 1, -1), self.hidden_bias + terms.cumsum(1)], 1)
        return (sums.sigmoid() * self.outgoing).sum(-1) + self.bias


class PlainNade:
    spare = 0

    def __init__(self, kind: type[Plain], case: Case, method: Method) -> None:
        assert isinstance(method.model, Nade)
        self.module = kind(method.model)

    def loss(self, x: Tensor) -> Tensor:
        return cross_entropy(self.module(x.flatten(1)), x)


def cross_entropy(logits: Tensor, x: Tensor) -> Tensor:
    """Of binary x, an example's."""
    return F.binary_cross_entropy_with_logits(logits, x.reshape(logits.shape), reduction="sum") / len(x)


PACKAGES = ["normflows", "nflows", "pythae"]
PEERS: dict[str, Callable[[Case, Method], Any]] = {
    "normflows": Normflows, "nflows": Nflows, "pythae": Pythae, "loop": partial(PlainNade, Loop),
    "sums": partial(PlainNade, Sums),
}  # fmt: skip

# ---- both sides compute the same


def encoded(case: Case, method: Method, seed: int) -> Batch:
    """A batch in model space."""
    x = levels(case, case.batch, seed)
    keys = torch.arange(case.batch)
    return Batch(method.model.codec.encode(x, keys)[0], keys, keys)


def levels(case: Case, rows: int, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(case.data.levels or 2, (rows, *case.data.shape), generator=rng).to(torch.uint8)


def moved(method: Method, batch: Batch) -> None:
    """Takes the first batch's moments into ActNorms, and moves weights that begin at 0."""
    method.objective.initialize(method.model, batch)
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in method.model.parameters():
            if not parameter.any():
                parameter.copy_(SMALL * torch.randn(parameter.shape, generator=rng))


def first(loss: Tensor, module: nn.Module) -> tuple[float, float]:
    """The loss and the norm of its gradient."""
    gradients = torch.autograd.grad(loss, list(module.parameters()))
    return float(loss.detach()), float(torch.nn.utils.get_total_norm(gradients))


def same(case: Case, method: Method, peer: Any, batch: Batch) -> tuple[tuple[float, float], tuple[float, float]]:
    """The first loss and gradient of both sides, an example's. Raises SystemExit where the sides differ."""
    model, objective = method.model.train(), method.objective
    mine = first(objective.turns()[0].loss(model, batch).total / case.batch, model)
    theirs = first(peer.loss(batch.x.float()), peer.module)
    numbers = size(model), size(peer.module) - peer.spare
    if numbers[0] != numbers[1] or any(
        abs(a - b) > close * abs(a) for a, b, close in zip(mine, theirs, (CLOSE, CLOSE_NORM), strict=True)
    ):
        raise SystemExit(
            f"{case}: the sides are not the same: ours {numbers[0]} parameters, a first loss and gradient of {mine}, "
            f"{case.peer} {numbers[1]} and {theirs}"
        )
    if hasattr(peer, "decode"):
        assert isinstance(model, Flow)
        with torch.no_grad():
            apart = float((peer.decode(model.encode(batch.x)) - batch.x).abs().max() / batch.x.abs().max())
        if apart > CLOSE_SAMPLES:
            raise SystemExit(f"{case}: samples of the same latents differ by {apart} of the largest value")
    return mine, theirs


# ---- the measurement


def measure(case: Case, turns: int, length: float) -> None:
    """Asserts that the sides are the same, then times them in turns."""
    torch.manual_seed(0)
    method = build(case.method, case.data, **case.params)
    batch = encoded(case, method, 1)
    moved(method, batch)
    peer = PEERS[case.peer](case, method)
    mine, theirs = same(case, method, peer, batch)
    spare = f" ({peer.spare:,} more are spare in {case.peer})" if peer.spare else ""
    print(
        f"{case}; {size(method.model):,} parameters{spare}, batch {case.batch}, {torch.get_default_dtype()}, "
        f"{torch.get_num_threads()} thread\n  first loss {mine[0]:.6f}, {case.peer} {theirs[0]:.6f}; "
        f"its gradient's norm {mine[1]:.6f}, {case.peer} {theirs[1]:.6f}",
        flush=True,
    )
    trainer = Ours(method.model, method.objective, levels(case, ROWS, 0), case.batch, OPTIM)
    ready = [encoded(case, method, seed).x.float() for seed in range(1, 1 + READY)]
    training = Training(peer.module, peer.loss, ready, OPTIM)
    timed("step", {"ours": trainer.step, case.peer: training.step}, trainer, turns, length)
    if hasattr(peer, "sample"):
        model: Any = method.model
        rng = torch.Generator().manual_seed(0)
        samples = {"ours": lambda: model.sample(case.batch, rng), case.peer: lambda: peer.sample(case.batch)}
        with torch.no_grad():
            timed(f"sampling, {case.batch} at once", samples, None, turns, length)


def main() -> None:
    options = asked(__doc__)
    with frame({name: name for name in PACKAGES}, __doc__) as there:
        plain = [name for name in PEERS if name not in PACKAGES]
        for case in measured(CASES, [*there, *plain], options.case):
            measure(case, options.turns, options.seconds)


if __name__ == "__main__":
    main()
