"""The only reader of params.yaml: YAML -> strict types, or an error that names the path, the value and what is allowed.

YAML is read as version 1.2, as DVC reads it: 1e-3 is a number, `no` is text, 010 is ten; a key given twice is refused.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dgm_models.construct import (
    ConfigError,
    Fraction,
    NonNegative,
    Positive,
    PositiveFloat,
    checked,
    construct,
    defaults,
    did_you_mean,
    plain,
)

if TYPE_CHECKING:
    from dgm_models.method import Method
    from dgm_models.protocols import DataSpec
    from dgm_models.training.optim import Optims
    from dgm_models.training.trainer import Train
    from pipelines.data.prepare import Section as DatasetSection
    from pipelines.promotion import Gate

Section = dict[str, Any]


@dataclass(frozen=True)
class Stream:
    """A dataset that is read shard by shard, not held in memory.

    Args:
        buffer: rows that are shuffled together, over all lanes; at least a batch.
        lanes: independent readers, each with its own rows of an epoch; they divide the batch. A number of workers that
            divides them reads every shard about once an epoch.
    """

    buffer: Positive = 8192
    lanes: Positive = 8


@dataclass(frozen=True)
class Run:
    """One training: what is modelled, how, and with which seed.

    Attributes:
        key: its name among the runs.
        dataset: a key of `datasets`.
        method: the method's name.
        arguments: the method's own parameters, and its network.
        train, optim: how it is trained.
        seed: of initial weights, shuffling and noise.
        section: the section as written, for the digest.
        stream: how the dataset is read when it is not held in memory.
    """

    key: str
    dataset: str
    method: str
    arguments: Section
    train: Train
    optim: Optims
    seed: int
    section: Section
    stream: Stream | None = None


@dataclass(frozen=True)
class Space:
    """One dimension of a search; exactly one of the three forms is given.

    Args:
        log_uniform: [low, high] of a number searched by its logarithm.
        uniform: [low, high] of a number.
        choice: a list of values of any kind: numbers, names, true and false, null, lists, sections.
    """

    log_uniform: tuple[PositiveFloat, PositiveFloat] | None = None
    uniform: tuple[float, float] | None = None
    choice: list[Any] | None = None

    def __post_init__(self) -> None:
        given = [form for form in (self.log_uniform, self.uniform, self.choice) if form is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of log_uniform, uniform, choice")
        interval = self.log_uniform or self.uniform
        if interval and not interval[0] < interval[1]:
            raise ValueError(f"{list(interval)} is not [low, high] with low < high")
        if self.choice is not None and not self.choice:
            raise ValueError("choice: an empty list")
        if len(set(self.texts())) < len(self.texts()):
            raise ValueError(f"choice: {self.choice!r} names a value twice")

    def ends(self) -> list[Any]:
        """The values to try for validity: both ends, or every choice."""
        return list(self.log_uniform or self.uniform or self.choice or ())

    def texts(self) -> list[str]:
        """Every choice as JSON, [] of an interval: what a sampler and a picture can hold, whatever the value is."""
        return [json.dumps(value) for value in self.choice or ()]

    def holds(self, value: Any) -> bool:
        """Whether the dimension contains a value."""
        if self.choice is not None:
            return json.dumps(value) in self.texts()
        low, high = self.ends()
        return isinstance(value, int | float) and low <= value <= high


@dataclass(frozen=True)
class Metric:
    """What a search may weigh.

    Attributes:
        better: which direction is.
        attempt: of the evaluation (`stages.evaluate.Rows.attempt`) that measures it.
        model: capabilities, of which the model needs one.
        data: what the dataset needs, all of it: a trained extractor ("classifier"; "extractor" allows raw coordinates),
            "labels", a finite number of "levels", known "factors".
    """

    better: Literal["lower", "higher"]
    attempt: str
    model: tuple[str, ...] = ("samples",)
    data: tuple[Literal["extractor", "classifier", "labels", "levels", "factors"], ...] = ("extractor",)

    @property
    def worst(self) -> float:
        return math.inf if self.better == "lower" else -math.inf


_LIKELIHOOD = ("density", "bound")
METRICS: dict[str, Metric] = {
    "fid": Metric("lower", "fid"),
    "kid": Metric("lower", "kid"),
    "inception_score": Metric("higher", "inception_score", data=("classifier",)),
    "precision": Metric("higher", "precision"),
    "recall": Metric("higher", "precision"),
    "density": Metric("higher", "density"),
    "coverage": Metric("higher", "density"),
    "c2st": Metric("lower", "c2st"),
    "modes": Metric("higher", "modes", data=("extractor", "labels")),
    "high_quality": Metric("higher", "modes", data=("extractor", "labels")),
    "copies": Metric("lower", "copies"),
    "nll": Metric("lower", "nll", _LIKELIHOOD, ()),
    "bits_per_dim": Metric("lower", "nll", _LIKELIHOOD, ("levels",)),
    "elbo": Metric("higher", "nll", ("bound",), ()),
    "mig/histogram": Metric("higher", "mig/histogram", ("latents",), ("factors",)),
    "mig/sampled": Metric("higher", "mig/sampled", ("bound",), ("factors",)),
    "dci/disentanglement": Metric("higher", "dci", ("latents",), ("factors",)),
    "dci/completeness": Metric("higher", "dci", ("latents",), ("factors",)),
    "dci/informativeness": Metric("higher", "dci", ("latents",), ("factors",)),
}


@dataclass(frozen=True)
class Search:
    """A search over one run's parameters.

    Args:
        run: the run that is varied; its own values are the first trial where the space contains them.
        space: dotted path in the run's section -> a dimension.
        objective: metric on valid -> weight. The weighted sum is minimised; what is better higher counts negative. A
            weight says how much of the others one unit of its metric is worth.
        also: metrics that are measured and shown, and decide nothing.
        trials: how many parameter sets are tried.
        rungs: how often a trial reports, and can be stopped, on its way.
        grace: the share of the steps that every trial is given. The metrics of a game swing while its players find
            their balance, and slow learning rates come late: a GAN deserves half of its steps, a VAE a quarter.
        reduction: ASHA keeps one in this many at each rung; 2 is milder than 3.
        finalists: how many of the best are retrained.
        seeds: fresh seeds with which finalists, and the run as written, are retrained.
        concurrent: trials at once.
        seed: of the search.
    """

    run: str
    space: dict[str, Space]
    objective: dict[str, PositiveFloat] = field(default_factory=lambda: {"fid": 1.0})
    also: list[str] = field(default_factory=list)
    trials: Positive = 8
    rungs: Positive = 4
    grace: Fraction = 0.25
    reduction: Positive = 3
    finalists: Positive = 1
    seeds: list[int] = field(default_factory=lambda: [101, 102, 103])
    concurrent: Positive = 2
    seed: NonNegative = 0

    def __post_init__(self) -> None:
        if not self.objective:
            raise ValueError("objective: empty; name at least one metric and its weight, such as {fid: 1.0}")
        for name in self.metrics:
            if self.metrics.count(name) > 1:
                raise ValueError(f"also: {name!r} is named twice; the metrics of `objective` are recorded anyway")

    @property
    def metrics(self) -> tuple[str, ...]:
        """Every metric that is measured, those of the objective first."""
        return (*self.objective, *self.also)

    @property
    def formula(self) -> str:
        """The objective in words, such as "fid + 2 bits_per_dim - 0.5 recall"."""
        text = ""
        for name, weight in self.objective.items():
            sign = "+" if METRICS[name].better == "lower" else "-"
            text += f" {sign} {'' if weight == 1 else f'{weight:g} '}{name}"
        return text.strip().removeprefix("+ ")

    def score(self, values: Mapping[str, float]) -> float:
        """The objective of measured metrics, lower is better; infinite where one is missing or not finite."""
        total = 0.0
        for name, weight in self.objective.items():
            value = values.get(name, math.nan)
            if not math.isfinite(value):
                return math.inf
            total += weight * (value if METRICS[name].better == "lower" else -value)
        return total


@dataclass(frozen=True)
class Coded:
    """A dataset that a trained run makes of its own: every row as that run's codes, or its latents.

    Args:
        run: whose method has codes.
        dataset: the run's, which dvc.yaml needs to name the stage's dependencies.
    """

    run: str
    dataset: str


@dataclass(frozen=True)
class Evaluation:
    """How trained models are measured.

    Args:
        max_samples: samples compared, at most; the smaller of this and the split's size is used by every row.
        importance: draws of the importance-weighted bound.
        ode_rows: rows whose likelihood is estimated by the probability-flow ODE of a diffusion model, beside its
            bound; 0 for none. All of them together take about 50 to 250 passes of the network forward and back.
        chains: of annealing from either end, for the bracket of log Z of a model with an energy; a multiple of 20.
        temperatures: of the annealing; with more of them the bracket is closer.
        seed: of sampling and of the bound's noise.
    """

    max_samples: Positive = 10000
    importance: Positive = 32
    ode_rows: NonNegative = 64
    chains: Positive = 100
    temperatures: Positive = 500
    seed: NonNegative = 0


@dataclass(frozen=True)
class Cluster:
    """Where work runs; no stage depends on it: another machine retrains nothing.

    Args:
        address: of a Ray cluster, null for this machine (RAY_ADDRESS overrides).
        storage: run store of checkpoints and artifacts: a folder or s3://bucket/prefix.
        workers: workers of a training, or [min, max] of an elastic one.
        cpus: CPUs of a worker.
        gpu: a GPU for every worker.
        shard: FSDP2: parameters, gradients and optimizer states divided among the workers (one-player methods).
        checkpoint_activations: recompute activations in the backward pass instead of keeping them.
        max_failures: worker failures that a training survives; -1 for any number.
        hours: wall-clock limit of one training.
    """

    address: str | None = None
    storage: str = ".dgm/store"
    workers: Positive | tuple[Positive, Positive] = 1
    cpus: PositiveFloat = 1.0
    gpu: bool = False
    shard: bool = False
    checkpoint_activations: bool = False
    max_failures: int = 3
    hours: PositiveFloat = 24.0

    @property
    def where(self) -> str | None:
        """The cluster that work goes to, by RAY_ADDRESS or `address`; None for this machine."""
        given = os.environ.get("RAY_ADDRESS") or self.address
        return None if given == "local" else given

    @property
    def store(self) -> str:
        """`storage` as an absolute folder, or a URI without a slash at the end."""
        from pipelines import paths

        return self.storage.rstrip("/") if "://" in self.storage else str((paths.root() / self.storage).absolute())


@dataclass(frozen=True)
class Tracking:
    """Args: uri: MLflow's tracking URI, null for SQLite in this folder (MLFLOW_TRACKING_URI overrides)."""

    uri: str | None = None

    @property
    def where(self) -> str:
        """Where MLflow is asked: MLFLOW_TRACKING_URI, `uri`, or sqlite beside the project."""
        from pipelines import tracking

        return tracking.tracking_uri(given=self.uri)


@dataclass(frozen=True)
class Params:
    """The whole of params.yaml, checked."""

    datasets: dict[str, DatasetSection]
    extractors: dict[str, Run]
    runs: dict[str, Run]
    searches: dict[str, Search]
    tuned: dict[str, str]
    evaluation: Evaluation
    promotion: Gate
    cluster: Cluster
    tracking: Tracking
    codes: dict[str, Coded] = field(default_factory=dict)

    def run(self, key: str) -> Run:
        """A run of `runs`. Raises ConfigError with the nearest name."""
        if key not in self.runs:
            raise ConfigError(f"runs.{key}: no such run{did_you_mean(key, [*self.runs, *self.tuned])}")
        return self.runs[key]

    @property
    def keys(self) -> tuple[str, ...]:
        """Every run, tuned ones last."""
        return (*self.runs, *self.tuned)

    def dataset_of(self, key: str) -> str:
        """The dataset that a run models, tuned or not: of a run on codes, what the codes are of."""
        return self.modelled(self.run(self.searches[self.tuned[key]].run if key in self.tuned else key).dataset)

    def modelled(self, dataset: str) -> str:
        """The dataset itself, or the one whose codes it holds."""
        return self.codes[dataset].dataset if dataset in self.codes else dataset


def read_yaml(path: Path) -> Section:
    """One YAML 1.2 file as plain values. Raises ConfigError naming the file and the line."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        found = YAML(typ="safe", pure=True).load(path.read_text())
    except (YAMLError, OSError) as error:
        raise ConfigError(f"{path.name}: {' '.join(str(error).split())}") from error
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise ConfigError(f"{path.name}: expected sections of keys at the top, found {found!r}")
    return dict(found)


def load(files: Iterable[Path] | None = None) -> Params:
    """Reads and checks params.yaml, and the zoo's runs beside it."""
    from pipelines import paths

    merged: Section = {}
    for path in paths.params_files() if files is None else files:
        prefix = paths.ZOO if path.parent.name == "zoo" else ""
        for top, section in read_yaml(path).items():
            into = merged.setdefault(top, {})
            for name, value in dict(section or {}).items():
                key = f"{prefix}{name}" if top == "runs" else name
                if key in into:
                    raise ConfigError(f"{path.parent.name}/{path.name}: {top}.{key} is given in two files")
                if prefix and top == "codes" and isinstance(value, Mapping) and "run" in value:
                    value = {**value, "run": f"{prefix}{value['run']}"}
                into[key] = value
    return parse(merged)


def parse(sections: Section) -> Params:
    """Checked types out of the sections of params.yaml."""
    from pipelines.data.prepare import Section as DatasetSection
    from pipelines.promotion import Gate

    known = (
        "datasets", "extractors", "runs", "codes", "searches", "tuned", "evaluation", "promotion", "cluster", "tracking"
    )  # fmt: skip
    for top in sections:
        if top not in known:
            raise ConfigError(f"{top}: unknown section{did_you_mean(top, known)}")

    def part(top: str) -> Section:
        return dict(sections.get(top) or {})

    datasets = {key: DatasetSection.of(section, f"datasets.{key}") for key, section in part("datasets").items()}
    extractors = {}
    for key, section in part("extractors").items():
        method = {"name": "extractor/classifier", **dict(section.get("method", {}))}
        whole = {**section, "dataset": key, "method": method}
        extractors[key] = parse_run(f"extractor-{key}", whole, f"extractors.{key}", datasets)
    codes = {key: construct(Coded, section, f"codes.{key}") for key, section in part("codes").items()}
    for key in codes.keys() & datasets.keys():
        raise ConfigError(f"codes.{key}: datasets.{key} has the same name; the codes need one of their own")
    sources = [*datasets, *codes]
    runs = {key: parse_run(key, section, f"runs.{key}", sources) for key, section in part("runs").items()}
    for key, coded in codes.items():
        _check_codes(key, coded, runs)
    searches = {}
    for key, section in part("searches").items():
        searches[key] = _search(construct(Search, section, f"searches.{key}"), f"searches.{key}", runs, datasets)
    tuned = {}
    for key, section in part("tuned").items():
        found = construct(_Tuned, section, f"tuned.{key}")
        dataset = runs[searches[found.search].run].dataset if found.search in searches else found.dataset
        if found.dataset != dataset:
            raise ConfigError(f"tuned.{key}.dataset: {found.dataset!r}; searches.{found.search} is on {dataset!r}")
        if found.search not in searches:
            raise ConfigError(f"tuned.{key}.search: no search {found.search!r}{did_you_mean(found.search, searches)}")
        if key in runs:
            raise ConfigError(f"tuned.{key}: runs.{key} has the same name; a leaderboard row needs one of its own")
        tuned[key] = found.search
    return Params(
        datasets, extractors, runs, searches, tuned,
        construct(Evaluation, part("evaluation"), "evaluation"), construct(Gate, part("promotion"), "promotion"),
        construct(Cluster, part("cluster"), "cluster"), construct(Tracking, part("tracking"), "tracking"), codes,
    )  # fmt: skip


def _check_codes(key: str, coded: Coded, runs: Mapping[str, Run]) -> None:
    """Raises ConfigError when no run can make these codes, or a run on them cannot model any."""
    from dgm_models import registry

    path = f"codes.{key}"
    if coded.run not in runs:
        raise ConfigError(f"{path}.run: no run {coded.run!r}{did_you_mean(coded.run, runs)}")
    source = runs[coded.run]
    if "codes" not in registry.row(source.method).capabilities:
        able = ", ".join(row.name for row in registry.ROWS if "codes" in row.capabilities)
        raise ConfigError(f"{path}.run: {coded.run} is a {source.method}, which has no codes; {able} have")
    if source.dataset != coded.dataset:
        raise ConfigError(f"{path}.dataset: {coded.dataset!r}; runs.{coded.run} is on {source.dataset!r}")
    latents = "latents" in registry.row(source.method).capabilities
    sort, words = ("codes:real", "real codes") if latents else ("codes:discrete", "whole codes")
    for run in runs.values():
        if run.dataset == key and sort not in registry.row(run.method).data:
            able = ", ".join(row.name for row in registry.ROWS if sort in row.data)
            raise ConfigError(f"runs.{run.key}.method.name: {run.method} does not model {words}; these do: {able}")


@dataclass(frozen=True)
class _Tuned:
    search: str
    dataset: str  # what dvc.yaml needs to name the stage's dependencies


@dataclass(frozen=True)
class _RunSection:
    dataset: str
    method: dict[str, Any]
    network: dict[str, Any] | None = None
    optim: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    stream: Stream | None = None
    seed: NonNegative = 0


def parse_run(key: str, section: Any, path: str, datasets: Iterable[str]) -> Run:
    """One run's section, checked down to the method's own parameters; nothing is built."""
    from dgm_models import registry
    from dgm_models.method import read_optims
    from dgm_models.training.trainer import Train

    form = construct(_RunSection, section, path)
    if form.dataset not in set(datasets):
        raise ConfigError(f"{path}.dataset: no dataset {form.dataset!r}{did_you_mean(form.dataset, datasets)}")
    if "name" not in form.method:
        raise ConfigError(f"{path}.method.name: missing{did_you_mean('', registry.METHODS)}")
    try:
        function = registry.builder(form.method["name"])
    except ConfigError as error:
        raise ConfigError(f"{path}.{error}") from error
    arguments = {name: value for name, value in form.method.items() if name != "name"}
    checked(function, arguments, f"{path}.method", {"data"})
    if form.network is not None:
        if "network" in arguments:
            raise ConfigError(f"{path}.method.network: the network has a section of its own: {path}.network")
        arguments["network"] = form.network
        try:
            checked(function, {"network": form.network}, path, {"data"})
        except ConfigError as error:
            raise ConfigError(str(error)) from error
    train = construct(Train, form.train, f"{path}.train")
    optim = read_optims(form.optim, f"{path}.optim")
    if form.stream:
        from pipelines.data.order import check_stream

        try:
            check_stream(form.stream.buffer, form.stream.lanes, train.batch_size)
        except ValueError as error:
            raise ConfigError(f"{path}.{error}") from error
    written = copy.deepcopy(dict(section))
    return Run(key, form.dataset, form.method["name"], arguments, train, optim, form.seed, written, form.stream)


def override(section: Section, values: Mapping[str, Any], path: str) -> Section:
    """A copy of a run's section with dotted paths replaced. Raises ConfigError for a path through a value."""
    changed = copy.deepcopy(section)
    for dotted, value in values.items():
        *parents, last = dotted.split(".")
        here = changed
        for name in parents:
            here = here.setdefault(name, {})
            if not isinstance(here, dict):
                raise ConfigError(f"{path}.{dotted}: {name!r} is a value, not a section")
        here[last] = value
    return changed


def _search(search: Search, path: str, runs: Mapping[str, Run], datasets: Iterable[str]) -> Search:
    from dgm_models import registry

    if search.run not in runs:
        raise ConfigError(f"{path}.run: no run {search.run!r}{did_you_mean(search.run, runs)}")
    if not search.space:
        raise ConfigError(f"{path}.space: empty; name at least one parameter of runs.{search.run}")
    base = runs[search.run]
    if base.dataset not in datasets:
        raise ConfigError(f"{path}.run: {search.run} models codes, and trials are compared as data; search another run")
    for dotted, space in search.space.items():
        for value in space.ends():  # both ends must be parameters that the run could have been written with
            changed = override(base.section, {dotted: value}, f"{path}.space")
            parse_run(base.key, changed, f"{path}.space.{dotted} -> runs.{search.run}", datasets)
    capabilities = registry.row(base.method).capabilities
    check_metrics(search, path, base.method, lambda metric: bool(set(metric.model) & set(capabilities)))
    return search


def check_metrics(search: Search, path: str, what: str, can: Callable[[Metric], bool]) -> None:
    """Raises: ConfigError for the first metric of a search that does not exist, or that `what` cannot have."""
    allowed = [name for name, metric in METRICS.items() if can(metric)]
    for section, names in (("objective", tuple(search.objective)), ("also", tuple(search.also))):
        for name in names:
            if name not in METRICS:
                raise ConfigError(f"{path}.{section}: {name!r} is no metric{did_you_mean(name, allowed)}")
            if name not in allowed:
                raise ConfigError(f"{path}.{section}: {what} has no {name!r}; allowed: {', '.join(allowed)}")


def written(run: Run) -> Section:
    """A run's section with every default filled, as JSON: what its dotted paths mean."""
    from dgm_models import registry

    function = registry.builder(run.method)
    path = f"runs.{run.key}.method"
    method = defaults(function, checked(function, run.arguments, path, {"data"}), {"data"})
    network = method.pop("network", None)
    players = {name: plain(optim) for name, optim in run.optim.players.items()}
    optim = {**plain(run.optim.default), **players}
    return {"method": {"name": run.method, **method}, "network": network, "optim": optim, "train": plain(run.train)}


def with_values(run: Run, values: Mapping[str, Any], key: str, datasets: Iterable[str], seed: int | None = None) -> Run:
    """The run with a search's values, under another name, and another seed where one is given."""
    section = override(run.section, values, f"runs.{run.key}")
    changed = parse_run(key, section, f"runs.{key}", datasets)
    return changed if seed is None else replace(changed, seed=seed)


def identity(run: Run) -> Section:
    """Everything of a run's params that changes its result, defaults filled, as JSON."""
    return {
        "method": run.method,
        "arguments": plain(run.arguments),
        "train": {name: value for name, value in plain(run.train).items() if name != "report_every"},
        "optim": plain(run.optim),
        "seed": run.seed,
        **({"stream": plain(run.stream)} if run.stream else {}),  # it decides the order of the examples
    }


def canonical_digest(value: Any) -> str:
    """sha256 of the canonical JSON of a value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def build_method(run: Run, data: DataSpec) -> Method:
    """The untrained method of a run."""
    from dgm_models.method import build

    return build(run.method, data, seed=run.seed, where=f"runs.{run.key}.method", **run.arguments)
