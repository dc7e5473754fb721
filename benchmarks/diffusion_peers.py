"""A U-Net's step and sampling against diffusers', flow matching against torchcfm's, energies against torchebm's.

The peers are no dependencies of the project. They go into a folder of their own, without what they ask for, and with
what diffusers and torchcfm import at once:

    pip install --no-deps --target /tmp/peers diffusers==0.42.1 huggingface_hub==2.4.0 hf-xet==1.8.0 httpx2==2.16.2 \
        httpcore2==2.16.2 truststore==0.10.5 torchcfm==1.0.7 POT==0.9.7.post1 torchebm==0.8.9
    PYTHONPATH=.:/tmp/peers python benchmarks/diffusion_peers.py

Both sides have the same network with the same weights, Adam, float32 and one thread, in one process. diffusers'
UNet2DModel is built with its own weights, which are copied into the project's U-Net; torchcfm and torchebm take any
network, and get a copy of the project's, whose input is scaled as the project scales it. Before anything is timed, the
loss of the first batch, with the same times and the same noise, must be that of the other side, and the samples of a
sampler from the same noise as well.

A peer's step is what its own examples do: its draws, its loss, the gradient and Adam on a batch that is ready in
memory. Ours is `Trainer.step` with everything in it, and beside it the same without the drawing of the batch. Times are
the processor's, of this process. Ratios are taken within a turn, in which the sides alternate; the median over the
turns is printed.

diffusers counts a chain's steps from 0 and the project from 1: its network is told the number plus 1, so that both
embed the same one. Its DDIM clips the guess of the data as ours does, and takes the noise from what was clipped.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.side_by_side import (
    Ours,
    Training,
    again,
    asked,
    frame,
    in_turns,
    measured,
    median,
    ratios,
    seconds,
    size,
    told,
)
from dgm_models.method import Method, build
from dgm_models.nn.unet import _Down, _Layer, _Up
from dgm_models.ops.mcmc import Langevin
from dgm_models.protocols import Batch, DataSpec
from dgm_models.training.optim import Optim

ROWS, READY = 4096, 20  # of the dataset; batches that a peer finds in memory
STEPS = 50  # of DDIM
MOVES, MOVE = 100, 0.01  # of Langevin chains
OPTIM = Optim(lr=1e-4)
CLOSE = 1e-5  # of losses: sums of float32 terms in another order
CLOSE_SAMPLES = 1e-3  # of samples, whose differences every step of 50 may double


@dataclass(frozen=True)
class Case:
    """A method of the project beside a peer: on what data, with how many examples a step and samples at once."""

    peer: str
    method: str
    data: DataSpec
    batch: int
    drawn: int
    params: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        network = self.params["network"]
        told = " ".join(str(value) for key, value in network.items() if key != "name")
        return f"{self.method} and {self.peer}, {' x '.join(map(str, self.data.shape))}, {network['name']} {told}"


UNET = {"name": "unet", "channels": 64, "multipliers": [1, 2, 2], "blocks": 2, "attention": [16], "head_dim": 32,
        "groups": 16}  # fmt: skip
CASES = [
    Case("diffusers", "diffusion/ddpm", DataSpec("image", (3, 32, 32), 256), 16, 4, {"network": UNET}),
    Case("torchcfm", "diffusion/flow_matching", DataSpec("vector", (2,)), 256, 256,
         {"network": {"name": "mlp", "width": 128}}),
    Case("torchcfm", "diffusion/flow_matching", DataSpec("vector", (64,)), 256, 256,
         {"network": {"name": "mlp", "width": 512}}),
    Case("torchebm", "energy/denoising_score_matching", DataSpec("vector", (2,)), 256, 256,
         {"network": {"name": "mlp", "width": 128, "depth": 3, "activation": "silu"}, "noise": 0.1}),
    Case("torchebm", "energy/denoising_score_matching", DataSpec("vector", (64,)), 256, 256,
         {"network": {"name": "mlp", "width": 512, "depth": 3, "activation": "silu"}, "noise": 0.1}),
]  # fmt: skip

# ---- the sides


def dataset(case: Case) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, *case.data.shape, generator=rng)
    return torch.randint(case.data.levels, x.shape, generator=rng).to(torch.uint8) if case.data.levels else x


class Diffusers:
    """UNet2DModel and DDIMScheduler; its weights go into our network."""

    samples = f"{STEPS}-step DDIM"

    def __init__(self, case: Case, method: Method) -> None:
        from diffusers import DDIMScheduler, UNet2DModel

        told = case.params["network"]
        widths = [told["channels"] * multiplier for multiplier in told["multipliers"]]
        heights = [case.data.shape[1] >> stage for stage in range(len(widths))]
        attends = ["Attn" if height in told["attention"] else "" for height in heights]
        self.module: Any = UNet2DModel(
            sample_size=heights[0], in_channels=case.data.shape[0], out_channels=case.data.shape[0],
            block_out_channels=tuple(widths), layers_per_block=told["blocks"], attention_head_dim=told["head_dim"],
            norm_num_groups=told["groups"], down_block_types=tuple(f"{each}DownBlock2D" for each in attends),
            up_block_types=tuple(f"{each}UpBlock2D" for each in attends[::-1]),
        )  # fmt: skip
        self.scheduler = DDIMScheduler(timestep_spacing="trailing")
        self.scheduler.set_timesteps(STEPS)
        copied(self.module, method.model.network)

    def loss(self, x: Tensor, t: Tensor | None = None, eps: Tensor | None = None) -> Tensor:
        """Of data x; t [B] in (0, 1] and eps are drawn unless given."""
        eps = torch.randn_like(x) if eps is None else eps
        drawn = torch.randint(0, 1000, (len(x),)) if t is None else (t * 1000).round().long() - 1
        noisy = self.scheduler.add_noise(x, eps, drawn)
        return F.mse_loss(self.module(noisy, drawn + 1).sample, eps)

    def sample(self, x: Tensor) -> Tensor:
        for t in self.scheduler.timesteps:
            eps = self.module(x, t + 1).sample
            x = self.scheduler.step(eps, t, x, use_clipped_model_output=True).prev_sample
        return x

    def ours(self, method: Method, x: Tensor) -> Tensor:
        """The same samples by the project."""
        model: Any = method.model
        found: Tensor = model.sampling(model.denoiser(None), model.path, x, torch.Generator())
        return found

    def scale(self, case: Case) -> float:
        """Our loss of an example is so many times the peer's: here the sum over what is there the mean."""
        return case.data.dims


class Torchcfm:
    """ConditionalFlowMatcher with a copy of our network, as a velocity from noise (t = 0) to data (t = 1)."""

    samples = None

    def __init__(self, case: Case, method: Method) -> None:
        from torchcfm.conditional_flow_matching import ConditionalFlowMatcher

        self.module = copy.deepcopy(method.model.network)
        self.matcher = ConditionalFlowMatcher(sigma=0.0)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        into = (t.square() + (1 - t).square()).rsqrt().reshape(-1, *[1] * (x.ndim - 1))
        found: Tensor = -self.module(into * x, 1000 * (1 - t))[:, 0]
        return found

    def loss(self, x: Tensor, t: Tensor | None = None, eps: Tensor | None = None) -> Tensor:
        start = torch.randn_like(x) if eps is None else eps
        time_, there, wanted = self.matcher.sample_location_and_conditional_flow(start, x, None if t is None else 1 - t)
        return (self.velocity(there, time_) - wanted).square().mean()

    def scale(self, case: Case) -> float:
        return case.data.dims


class Torchebm:
    """DenoisingScoreMatching and LangevinDynamics on a copy of our energy."""

    samples = f"{MOVES} moves of Langevin"

    def __init__(self, case: Case, method: Method) -> None:
        from torchebm.core import BaseModel
        from torchebm.losses import DenoisingScoreMatching
        from torchebm.samplers import LangevinDynamics

        class Energy(BaseModel):
            def __init__(self, model: Any) -> None:
                super().__init__()
                self.model = model

            def forward(self, x: Tensor) -> Tensor:
                found: Tensor = self.model.energy(x)
                return found

        self.module = Energy(copy.deepcopy(method.model))
        self.noise = case.params["noise"]
        self.matching = DenoisingScoreMatching(self.module, noise_scale=self.noise)
        self.chain = LangevinDynamics(self.module, step_size=MOVE / 2)

    def loss(self, x: Tensor, t: Tensor | None = None, eps: Tensor | None = None) -> Tensor:
        if eps is None:
            found: Tensor = self.matching(x)
            return found
        drawn = eps * self.noise
        self.matching.perturb_data, kept = (lambda x, generator=None: (x + drawn, drawn)), self.matching.perturb_data
        found = self.matching(x)
        self.matching.perturb_data = kept
        return found

    def sample(self, x: Tensor) -> Tensor:
        found: Tensor = self.chain.sample(x, n_steps=MOVES, generator=torch.Generator().manual_seed(0))
        return found

    def ours(self, method: Method, x: Tensor) -> Tensor:
        model: Any = method.model
        model.sampling = Langevin(steps=MOVES, step=MOVE)
        return model._fresh(model.energy, x, torch.Generator().manual_seed(0))

    def scale(self, case: Case) -> float:
        return self.noise**2


PEERS: dict[str, Callable[[Case, Method], Any]] = {
    "diffusers": Diffusers, "torchcfm": Torchcfm, "torchebm": Torchebm,
}  # fmt: skip


def copied(theirs: Any, network: Any) -> None:
    """The weights of diffusers' UNet2DModel into our network."""

    def take(mine: nn.Module, *sources: nn.Module) -> None:
        """One layer's weights, of several layers one below the other."""
        for name, parameter in mine.named_parameters():
            parameter.copy_(torch.cat([source.get_parameter(name) for source in sources]))

    def block(mine: _Layer, resnet: Any, attention: Any) -> None:
        pairs = [("norm_in", "norm1"), ("conv_in", "conv1"), ("told", "time_emb_proj"), ("norm_out", "norm2"),
                 ("conv_out", "conv2")]  # fmt: skip
        for name, other in pairs:
            take(mine.get_submodule(name), resnet.get_submodule(other))
        if resnet.conv_shortcut is not None:
            take(mine.past, resnet.conv_shortcut)
        if attention is not None:
            assert mine.attention is not None and mine.attention_norm is not None
            take(mine.attention_norm, attention.group_norm)
            take(mine.attention.inward, attention.to_q, attention.to_k, attention.to_v)
            take(mine.attention.outward, attention.to_out[0])

    def stages(parts: nn.ModuleList, blocks: Any, change: str) -> None:
        mine = iter(parts)
        for stage in blocks:
            attentions = getattr(stage, "attentions", [None] * len(stage.resnets))
            for resnet, attention in zip(stage.resnets, attentions, strict=True):
                layer = next(mine)
                assert isinstance(layer, _Layer)
                block(layer, resnet, attention)
            for changed in getattr(stage, change) or []:
                part = next(mine)
                assert isinstance(part, _Down | _Up)
                take(part.conv, changed.conv)
        assert next(mine, None) is None

    body = network.body
    with torch.no_grad():
        take(network.embedding.noise[0], theirs.time_embedding.linear_1)
        take(network.embedding.noise[2], theirs.time_embedding.linear_2)
        take(body.first, theirs.conv_in)
        stages(body.down, theirs.down_blocks, "downsamplers")
        block(body.middle[0], theirs.mid_block.resnets[0], theirs.mid_block.attentions[0])
        block(body.middle[1], theirs.mid_block.resnets[1], None)
        stages(body.up, theirs.up_blocks, "upsamplers")
        take(body.norm, theirs.conv_norm_out)
        take(body.last, theirs.conv_out)


# ---- both sides compute the same


def moved(method: Method) -> None:
    """Weights that begin at 0 are moved: a loss of zeros would say nothing."""
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in method.model.parameters():
            if not parameter.any():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=rng))


def same(case: Case, method: Method, peer: Any) -> tuple[float, float]:
    """The first losses of both sides, an example's. Raises SystemExit when they or the numbers of parameters differ."""
    model, objective = method.model, method.objective
    keys = torch.arange(case.batch)
    x = torch.randn(case.batch, *case.data.shape, generator=torch.Generator().manual_seed(1))
    batch = Batch(x, keys, keys)
    mine = float(objective.loss(model, batch).total.detach()) / case.batch  # type: ignore[operator]
    if case.peer == "torchebm":
        t, eps = None, batch.normal("eps", x.shape[1:])
    else:
        t, eps = objective.times(model, batch), objective.pair(model, batch)[1]  # type: ignore[operator]
        t = t if case.peer == "diffusers" else t.to(x.dtype)
    theirs = peer.scale(case) * float(peer.loss(x, t, eps).detach())
    if size(model) != size(peer.module) or abs(mine - theirs) > CLOSE * abs(mine):
        raise SystemExit(
            f"{case}: the sides are not the same: ours {size(model)} parameters and a first loss of {mine}, "
            f"{case.peer} {size(peer.module)} and {theirs}"
        )
    if peer.samples:
        with torch.no_grad():
            one, other = peer.ours(method, x[: case.drawn]), peer.sample(x[: case.drawn])
        if (one - other).abs().max() > CLOSE_SAMPLES * one.abs().max():
            raise SystemExit(f"{case}: samples from the same noise differ by {float((one - other).abs().max())}")
    return mine, theirs


# ---- the measurement


def measure(case: Case, turns: int, length: float) -> None:
    """Asserts that the sides are the same, then times them in turns."""
    torch.manual_seed(0)
    sampler = {"sampler": {"name": "ddim", "steps": STEPS}} if case.peer == "diffusers" else {}
    method = build(case.method, case.data, **case.params, **sampler)
    moved(method)
    peer = PEERS[case.peer](case, method)
    mine, theirs = same(case, method, peer)
    print(
        f"{case}; {size(method.model):,} parameters, batch {case.batch}, {torch.get_default_dtype()}, "
        f"{torch.get_num_threads()} thread\n  first loss {mine:.6f}, {case.peer} {theirs:.6f}",
        flush=True,
    )
    trainer = Ours(method.model, method.objective, dataset(case), case.batch, OPTIM)
    rng = torch.Generator().manual_seed(1)
    ready = [torch.randn(case.batch, *case.data.shape, generator=rng) for _ in range(READY)]
    training = Training(peer.module, peer.loss, ready, OPTIM)
    timed("step", trainer.step, training.step, trainer, turns, length)
    if peer.samples:
        x = torch.randn(case.drawn, *case.data.shape)
        with torch.no_grad():
            timed(
                f"{peer.samples}, {case.drawn} at once",
                partial(peer.ours, method, x),
                partial(peer.sample, x),
                None,
                turns,
                length,
            )


def timed(
    what: str, ours: Callable[[], object], theirs: Callable[[], object], trainer: Ours | None, turns: int, length: float
) -> None:
    runs = {"ours": again(ours), "peer": again(theirs)}
    times = {name: max(1, round(length / max(seconds(run, 1), 1e-6))) for name, run in runs.items()}
    found = in_turns(runs, times, turns, trainer)
    whole, alike = ratios(found, "peer")
    took = {name: median(found[name]) for name in runs}
    print(f"  {what}: ours {took['ours']:.3f} ms, peer {took['peer']:.3f} ms; ours / peer {told(whole)}", end="")
    print(f"; without the drawing {told(alike)}" if trainer else "", flush=True)


def main() -> None:
    options = asked(__doc__)
    with frame({name: name for name in PEERS}, __doc__) as there:
        for case in measured(CASES, there, options.case):
            measure(case, options.turns, options.seconds)


if __name__ == "__main__":
    main()
