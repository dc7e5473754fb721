"""A training step of the VAE against pythae's and of the WGAN-GP against torch-mimicry's, side by side in one run.

The peers are no dependencies of the project. They go into a folder of their own, without what they ask for: the
project's environment has all that their training steps import.

    pip install --no-deps --target /tmp/peers pythae==0.1.2 torch-mimicry==0.1.16
    PYTHONPATH=.:/tmp/peers python benchmarks/peers.py

Both sides have the same network with the same weights, the same batch size, Adam, float32 and one thread, in one
process. A peer's step is its own code on batches that are ready in memory: pythae's `BaseTrainer.train_step` without
callbacks, torch-mimicry's `netD.train_step` and `netG.train_step` in the order of its `Trainer.train`. Its loader,
logs and checkpoints are left out. Ours is `Trainer.step` with everything in it, the drawing of the batch included; the
time without the drawing (`Source.batch` and the codec) is stated beside it and is what compares with the peers' step.

Before anything is timed both sides take three steps with the same batches and the same draws: ours are kept, and
`torch.randn`, `torch.randn_like` and `torch.rand` give them to the peer. Every loss that is differentiated must agree.

What the same network means: pythae's encoder maps its input from [0, 1] to [-1, 1] first, as ours does, and its
decoder ends in a sigmoid, since its loss takes probabilities. torch-mimicry's penalty is written for three channels.
torchgan is no side: it takes the Wasserstein loss and the penalty as two optimizer updates, and its penalty is of the
norm over the whole batch with one mixing weight, so that no loss of it could equal ours.
"""

from __future__ import annotations

import copy
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks import side_by_side
from benchmarks.side_by_side import asked, frame, in_turns, measured, median, ratios, size, told
from dgm_models.method import Method, build
from dgm_models.protocols import Batch, DataSpec
from dgm_models.training.optim import Optim
from dgm_models.training.source import Source

ROWS = 20_000  # of the dataset
READY = 60  # batches that a peer finds in memory, and walks again and again
CHECKED = 3  # steps whose losses must agree
# a loss is a sum of about 10^5 float32 terms, taken in another order, and Adam carries the rounding on
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    method: str
    peer: str
    data: DataSpec
    network: dict[str, Any]
    batch: int
    optim: Optim

    def __str__(self) -> str:
        shape = " x ".join(map(str, self.data.shape))
        return f"{self.method}, {shape}, {' '.join(map(str, self.network.values()))}"


VAE = ("vae/vae", "pythae")
WGAN_GP = ("gan/wgan_gp", "torch-mimicry")
BINARY = DataSpec("image", (1, 28, 28), 2)
COLOUR, SMALL = DataSpec("image", (3, 32, 32), 256), DataSpec("image", (3, 8, 8), 256)
MLP = {"name": "mlp", "width": 512, "depth": 2}
CONV = {"name": "conv", "channels": 32, "stages": 2}
CASES = [
    Case(*VAE, BINARY, MLP, 128, Optim(lr=1e-3)),
    Case(*VAE, BINARY, CONV, 128, Optim(lr=1e-3)),
    Case(*WGAN_GP, SMALL, MLP, 64, Optim(lr=1e-4, betas=(0.0, 0.9))),
    Case(*WGAN_GP, COLOUR, CONV, 64, Optim(lr=1e-4, betas=(0.0, 0.9))),
]


class Side(Protocol):
    def steps(self, number: int) -> None:
        """Takes so many training steps."""
        ...


class Ours(side_by_side.Ours):
    """Keeps the first batches that it drew."""

    def __init__(self, case: Case, method: Method) -> None:
        rng = torch.Generator().manual_seed(0)
        x = torch.randint(case.data.levels or 2, (ROWS, *case.data.shape), generator=rng).to(torch.uint8)
        super().__init__(method.model, method.objective, x, case.batch, case.optim, time.perf_counter)
        self.drawn: list[Tensor] = []  # in model space

    def _fetch(self, source: Source, start: int, stop: int, *path: int | str) -> Batch:
        batch = super()._fetch(source, start, stop, *path)
        if path == ("train",) and len(self.drawn) < READY:
            self.drawn.append(batch.x)
        return batch

    def steps(self, number: int) -> None:
        for _ in range(number):
            self.step()
        self.metrics()  # a report


class Ready(list[Any]):
    """Batches in memory, where pythae's trainer expects a loader."""

    dataset: tuple[()] = ()


class Pythae:
    """pythae's trainer with a VAE of the same networks; Bernoulli decoder (its loss "bce")."""

    def __init__(self, case: Case, method: Method, folder: Path) -> None:
        from pythae.data.datasets import BaseDataset, DatasetOutput
        from pythae.models import VAE, VAEConfig
        from pythae.models.base.base_utils import ModelOutput
        from pythae.models.nn import BaseDecoder, BaseEncoder
        from pythae.trainers import BaseTrainer, BaseTrainerConfig
        from pythae.trainers.training_callbacks import CallbackHandler

        model: Any = copy.deepcopy(method.model)

        class Encoder(BaseEncoder):
            def __init__(self) -> None:
                super().__init__()
                self.network = model.encoder

            def forward(self, x: Tensor) -> Any:
                mean, log_variance = self.network(x * 2.0 - 1.0).chunk(2, dim=1)
                return ModelOutput(embedding=mean, log_covariance=log_variance)

        class Decoder(BaseDecoder):
            def __init__(self) -> None:
                super().__init__()
                self.network = model.decoder

            def forward(self, z: Tensor) -> Any:
                return ModelOutput(reconstruction=self.network(z).sigmoid())

        config = VAEConfig(case.data.shape, model.latent_dim, reconstruction_loss="bce")
        settings = BaseTrainerConfig(
            str(folder), case.batch, learning_rate=case.optim.lr, no_cuda=True,
            optimizer_params={"betas": case.optim.betas, "eps": case.optim.eps},
        )  # fmt: skip
        logging.disable()  # its trainer says that it passed a check
        some = BaseDataset(torch.zeros(2, *case.data.shape), torch.zeros(2))
        self.trainer = BaseTrainer(VAE(config, Encoder(), Decoder()), some, training_config=settings)
        self.trainer.set_optimizer()
        self.trainer.callback_handler = CallbackHandler([], self.trainer.model)
        self.wrapped = DatasetOutput
        self.ready: list[Any] = []
        self.position = 0

    def take(self, batches: list[Tensor]) -> None:
        self.ready, self.position = [self.wrapped(data=x.float()) for x in batches], 0

    def steps(self, number: int) -> None:
        self.trainer.train_loader = Ready(
            self.ready[(self.position + i) % len(self.ready)] for i in range(number)
        )  # fmt: skip
        self.position += number
        self.trainer.train_step(epoch=1)


class Mimicry:
    """torch-mimicry's WGAN-GP of the same networks, taken through the step of its trainer."""

    def __init__(self, case: Case, method: Method, folder: Path) -> None:
        # the packages' own __init__ import tensorflow, tensorboard and torchvision, for metrics and pictures
        for name in ("torch_mimicry", "torch_mimicry.training"):
            if name not in sys.modules:
                found, package = find_spec(name), ModuleType(name)
                assert found and found.submodule_search_locations
                package.__path__ = list(found.submodule_search_locations)
                sys.modules[name] = package
        from torch_mimicry.nets.wgan_gp import wgan_gp_base
        from torch_mimicry.training import metric_log, scheduler

        model: Any = copy.deepcopy(method.model)

        class Generator(wgan_gp_base.WGANGPBaseGenerator):
            def __init__(self) -> None:
                super().__init__(nz=model.latent_dim, ngf=0, bottom_width=0)
                self.network = model.generator

            def forward(self, z: Tensor) -> Tensor:
                return self.network(z)

        class Discriminator(wgan_gp_base.WGANGPBaseDiscriminator):
            def __init__(self) -> None:
                super().__init__(ndf=0, gp_scale=method.params["penalty"])
                self.network = model.critic

            def forward(self, x: Tensor) -> Tensor:
                return self.network(x)

        self.net_g, self.net_d = Generator(), Discriminator()
        self.opt_g, self.opt_d = (
            torch.optim.Adam(net.parameters(), lr=case.optim.lr, betas=case.optim.betas, eps=case.optim.eps)
            for net in (self.net_g, self.net_d)
        )
        self.critic_steps = method.params["critic_steps"]
        self.log = metric_log.MetricLog
        self.scheduler = scheduler.LRScheduler(None, self.opt_d, self.opt_g, num_steps=10**9)
        self.ready: list[tuple[Tensor, Tensor]] = []
        self.position = 0

    def take(self, batches: list[Tensor]) -> None:
        self.ready, self.position = [(x, torch.zeros(len(x))) for x in batches], 0

    def steps(self, number: int) -> None:
        device = torch.device("cpu")
        for step in range(number):
            log = self.log()
            for _ in range(self.critic_steps):
                batch = self.ready[self.position % len(self.ready)]
                self.position += 1
                log = self.net_d.train_step(
                    real_batch=batch, netG=self.net_g, optD=self.opt_d, log_data=log, global_step=step, device=device,
                    scaler=None,
                )  # fmt: skip
            log = self.net_g.train_step(
                real_batch=batch, netD=self.net_d, optG=self.opt_g, log_data=log, global_step=step, device=device,
                scaler=None,
            )  # fmt: skip
            self.scheduler.step(log_data=log, global_step=step + 1)


PEERS: dict[str, tuple[str, Callable[[Case, Method, Path], Any]]] = {
    "pythae": ("pythae", Pythae),
    "torch-mimicry": ("torch_mimicry", Mimicry),
}

# ---- both sides compute the same


@contextmanager
def differentiated() -> Iterator[list[float]]:
    """The value of every loss that is differentiated."""
    losses: list[float] = []
    backward = torch.Tensor.backward

    def kept(loss: Tensor, *arguments: Any, **options: Any) -> None:
        losses.append(float(loss.detach()))
        backward(loss, *arguments, **options)  # type: ignore[no-untyped-call]

    with patch.object(torch.Tensor, "backward", kept):
        yield losses


@contextmanager
def kept_draws() -> Iterator[list[Tensor]]:
    """Every draw of a batch, in order, flattened to [B, n]."""
    draws: list[Tensor] = []

    def keeping(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def kept(*arguments: Any) -> Tensor:
            draws.append(draw(*arguments).flatten(1))
            return draw(*arguments)

        return kept

    with patch.object(Batch, "normal", keeping(Batch.normal)), patch.object(Batch, "uniform", keeping(Batch.uniform)):
        yield draws


@contextmanager
def given(draws: list[Tensor]) -> Iterator[None]:
    """torch's generators give these draws, one a call."""
    rest = iter(draws)

    def following(*arguments: Any, **options: Any) -> Tensor:
        return next(rest)

    with patch.multiple(torch, randn=following, randn_like=following, rand=following):
        yield
    if next(rest, None) is not None:
        raise SystemExit("the peer took fewer draws than the project")


def compared(ours: Ours, peer: Any, case: Case) -> tuple[list[float], list[float]]:
    """The losses of the first steps of both sides; of the batches drawn the peer gets all but a generator's own.

    Raises: SystemExit when they differ.
    """
    with differentiated() as mine, kept_draws() as draws:
        ours.steps(CHECKED)
    each = len(mine) // CHECKED
    seen = ours.drawn if each == 1 else [x for i, x in enumerate(ours.drawn) if i % each != each - 1]
    peer.take(seen)
    with differentiated() as theirs, given(draws):
        peer.steps(CHECKED)
    mine = [loss / case.batch for loss in mine]  # ours are sums
    if len(mine) != len(theirs) or any(apart(a, b) > TOLERANCE for a, b in zip(mine, theirs, strict=True)):
        raise SystemExit(f"{case}: the sides do not compute the same: ours {mine}, {case.peer} {theirs}")
    return mine, theirs


def apart(a: float, b: float) -> float:
    return abs(a - b) / max(1.0, abs(a))


# ---- the measurement


def seconds(side: Side, steps: int) -> float:
    """Of one step."""
    return side_by_side.seconds(side.steps, steps, time.perf_counter)


def measure(case: Case, turns: int, length: float, folder: Path) -> None:
    method = build(case.method, case.data, network=case.network)
    peer = PEERS[case.peer][1](case, method, folder)  # a copy of the weights
    ours = Ours(case, method)
    mine, theirs = compared(ours, peer, case)
    seconds(ours, 5)
    peer.take(ours.drawn)
    seconds(peer, 5)
    steps = max(3, round(length / seconds(ours, 5)))
    runs = {"ours": ours.steps, "peer": peer.steps}
    found = in_turns(runs, dict.fromkeys(runs, steps), turns, ours, time.perf_counter)
    report(case, method, mine, theirs, found, steps)


def report(
    case: Case, method: Method, mine: list[float], theirs: list[float], found: dict[str, list[float]], steps: int
) -> None:
    whole, alike = ratios(found, "peer")
    step, drawing, peer = (median(found[name]) for name in ("ours", "drawing", "peer"))
    print(
        f"{case}; {size(method.model):,} parameters, batch {case.batch}, {torch.get_default_dtype()}, "
        f"{torch.get_num_threads()} thread, {len(whole)} turns of {steps} steps"
    )
    print(
        f"  first loss {mine[0]:.6f}, {case.peer} {theirs[0]:.6f}; the {len(mine)} losses of the first {CHECKED} steps "
        f"differ by at most {max(map(apart, mine, theirs)):.1e} of their size"
    )
    print(f"  a step {step:.3f} ms, of it {drawing:.3f} ms drawing the batch; {case.peer} {peer:.3f} ms")
    for name, each in (("with the drawing   ", whole), ("without the drawing", alike)):
        print(f"  ours / {case.peer}, {name}: {told(each, 'turns ')}", flush=True)


def main() -> None:
    options = asked(__doc__.splitlines()[0], 11, 2.0)
    modules = {peer: module for peer, (module, _) in PEERS.items()}
    with frame(modules, __doc__) as there, tempfile.TemporaryDirectory(prefix="dgm-bench-") as folder:
        for case in measured(CASES, there, options.case):
            measure(case, options.turns, options.seconds, Path(folder))


if __name__ == "__main__":
    main()
