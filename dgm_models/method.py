"""Build, fit, save and load a method: the library without any cluster."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgm_models import registry
from dgm_models.construct import ConfigError, checked, construct, convert, defaults, plain
from dgm_models.nn.composite import Composite, composite
from dgm_models.objective import Objective
from dgm_models.protocols import Batch, Codes, DataSpec, Model, capabilities
from dgm_models.training import checkpoint
from dgm_models.training.optim import Optims
from dgm_models.training.runtime import Runtime
from dgm_models.training.source import ArraySource, Source
from dgm_models.training.trainer import Metrics, Train, Trainer


@dataclass
class Method:
    """A model and its objective, built from a name, data and params. Unpacks as `model, objective = build(...)`.

    Attributes:
        name: the registry's name.
        data: what it was built for.
        params: every parameter of the method's function, defaults filled, as JSON.
        lineage: what a saved artifact says of its training.
        decoder: of a composite, the method whose codes this one models; `data` and `model` are the whole's.
    """

    name: str
    data: DataSpec
    params: dict[str, Any]
    model: Model
    objective: Objective
    lineage: dict[str, Any] = field(default_factory=dict)
    history: list[tuple[int, Metrics]] = field(default_factory=list)
    decoder: Method | None = None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.objective))

    def __repr__(self) -> str:
        sizes = ", ".join(
            f"{name} {sum(p.numel() for p in player.parameters()):,}" for name, player in self.model.players().items()
        )
        shape = " x ".join(map(str, self.data.shape))
        params = ", ".join(f"{key}={value!r}" for key, value in self.params.items())
        last = f"\n  trained    step {self.history[-1][0]}: {_short(self.history[-1][1])}" if self.history else ""
        over = f" over the codes of {self.decoder.name}" if self.decoder else ""
        return (
            f"{self.name}{over} on {self.data.kind} {shape}, levels {self.data.levels}\n"
            f"  params     {params}\n"
            f"  parameters {sizes}\n"
            f"  can        {', '.join(capabilities(self.model))}{last}"
        )


def _short(metrics: Metrics) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def build(name: str, data: DataSpec, *, seed: int = 0, where: str = "method", **params: Any) -> Method:
    """The method called `name`, with weights drawn by `seed`.

    Args:
        name: a row of the registry, such as "gan/wgan_gp".
        data: what is to be modelled.
        seed: of the initial weights.
        where: the params stand, for messages.
        params: keyword parameters of the method's function; a network is a mapping with a `name`.
    Raises: ConfigError naming the parameter, the value and what is allowed.
    """
    row = registry.row(name)
    sort = f"{data.kind}:{'real' if data.levels is None else 'discrete'}"
    if sort not in row.data:
        raise ConfigError(f"{where}.name: {name} models {', '.join(row.data)}; this data is {sort}")
    function = registry.builder(name)
    arguments = checked(function, params, where, {"data"})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, objective = construct(function, params, where, data=data)
    return Method(name, data, defaults(function, arguments, {"data"}), model, objective)


def fit(
    method: Method,
    x: Tensor | Source,
    *,
    cond: Tensor | None = None,
    valid: Tensor | Source | None = None,
    optim: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str = "cpu",
    report: Callable[[int, Metrics], None] | None = None,
    **train: Any,
) -> Method:
    """Trains a method in this process and leaves the trained weights in it.

    Args:
        method: what `build` gave; its model is changed in place.
        x: [N, *event] as stored, or a Source.
        cond: [N] labels.
        valid: validation data, for `validate_every`.
        optim: {"lr": ..., "critic": {...}}: settings of all players and of single ones.
        seed: of shuffling and noise.
        device: "cpu" or "cuda".
        report: called with (step, metrics) at every interval.
        train: fields of `training.trainer.Train`, such as steps, batch_size, average.
    Returns: the method.
    """
    settings = construct(Train, train, "fit")

    def source(data: Tensor | Source, shuffled: bool) -> Source:
        if not isinstance(data, Tensor):
            return data
        return ArraySource(data, method.data, cond if shuffled else None, seed=seed if shuffled else None)

    trainer = Trainer(
        method.model, method.objective, source(x, True), settings, read_optims(optim or {}, "optim"), seed,
        Runtime(torch.device(device), precision=settings.precision), None if valid is None else source(valid, False),
    )  # fmt: skip

    trainer.run(report)
    method.history = trainer.history
    final = trainer.final()
    if final is not method.model:
        method.model.load_state_dict(final.state_dict())
    method.model.eval()
    return method


def read_optims(section: Mapping[str, Any], path: str) -> Optims:
    """`{name, lr, ..., <player>: {...}}` -> Optims; a player's section starts from the common settings."""
    from dgm_models.training.optim import Optim

    common = {key: value for key, value in section.items() if not isinstance(value, Mapping)}
    players = {key: value for key, value in section.items() if isinstance(value, Mapping)}
    default = construct(Optim, common, path)
    own = {name: construct(Optim, {**common, **mine}, f"{path}.{name}") for name, mine in players.items()}
    return Optims(default, own)


def compose(prior: Method, decoder: Method) -> Method:
    """A prior of codes and the method that made the codes, as one method of the original data (`nn/composite.py`).

    Raises: ValueError when the prior does not model the decoder's codes.
    """
    model = composite(prior.model, decoder.model).eval()
    return replace(prior, data=decoder.data, model=model, decoder=decoder)


def resampled(method: Method, settings: Mapping[str, Any]) -> Method:
    """The method with other settings of its sampler and the same weights, in a model of its own.

    Args:
        method: left as it is.
        settings: fields of `model.sampling`, such as {"temperature": 0.7}; the others keep their values. Where the
            sampler has a name, another name takes another sampler, with its own defaults.
    Raises: ConfigError when the sampler has no settings, or naming the setting, the value and what is allowed.
    """
    current = method.model.sampling
    if current is None:
        raise ConfigError(f"sampling: the sampler of {method.name} has no settings")
    told = plain(current)
    other = settings.get("name", told.get("name")) != told.get("name")
    found = convert(dict(settings) if other else {**told, **settings}, type(current), "sampling")
    model = copy.deepcopy(method.model)
    model.sampling = found
    return replace(method, model=model)


def fingerprint(method: Method) -> str:
    """sha256 of what a method computes: its name, data, params and weights."""
    told = [method.name, plain(asdict(method.data)), method.params]
    total = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name, tensor in sorted(method.model.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def save(method: Method, folder: str | Path, *, lineage: Mapping[str, Any] | None = None) -> Path:
    """Writes an artifact: `spec.json`, `weights.safetensors`, `manifest.json`, whole or not at all."""
    folder = Path(folder)
    spec = {
        "version": 1,
        "method": method.name,
        "data": plain(asdict(method.data)),
        "params": method.params,
        "capabilities": list(capabilities(method.model)),
        "lineage": dict(lineage or method.lineage),
    }
    if method.decoder:
        decoder = method.decoder
        assert isinstance(method.model, Composite)
        spec["decoder"] = {
            "codes": plain(asdict(method.model.prior.data)),
            "method": decoder.name,
            "params": decoder.params,
            "lineage": decoder.lineage,
            "sha256": fingerprint(decoder),
        }
    checkpoint.write(folder, {"weights": method.model.state_dict()}, {"spec": spec})
    return folder


def load(folder: str | Path) -> Method:
    """A trained method from its artifact: validated JSON and verified tensors, never code.

    Raises: checkpoint.Damaged when a file is not what the manifest says; ConfigError when spec or weights do not fit.
    """
    folder = Path(folder)
    checkpoint.verify(folder)
    spec = json.loads((folder / "spec.json").read_text())
    data = construct(DataSpec, spec["data"], "spec.data")
    if "decoder" in spec:
        told = spec["decoder"]
        decoder = build(told["method"], data, where="spec.decoder.params", **told["params"])
        decoder.lineage = told["lineage"]
        if not isinstance(decoder.model, Codes):
            raise ConfigError(f"spec.decoder.method: {told['method']} has no codes that a prior could model")
        codes = construct(DataSpec, told["codes"], "spec.decoder.codes")
        prior = build(spec["method"], codes, where="spec.params", **spec["params"])
        method = compose(prior, decoder)
    else:
        method = build(spec["method"], data, where="spec.params", **spec["params"])
    method.lineage = spec["lineage"]
    try:
        method.model.load_state_dict(checkpoint.read_tensors(folder, "weights"))
    except RuntimeError as error:
        commit = method.lineage.get("git_commit")
        raise ConfigError(
            f"{folder}: the weights do not fit {method.name} as it is built now; train it again, or load it with the "
            f"version of this package that trained it{f' (commit {commit})' if commit else ''}"
        ) from error
    method.model.eval()
    return method


def encoded(model: Model, x: Tensor, key: Tensor | None = None, labels: Tensor | None = None) -> Batch:
    """Stored x [B, *event] as a batch in model space; keys are 0..B-1 unless given."""
    key = torch.arange(len(x)) if key is None else key
    y, log_det = model.codec.encode(x, key)
    cond = model.conditions(x, labels, key) if model.condition else labels
    return Batch(y, key, torch.arange(len(x)), cond, log_det=log_det)
