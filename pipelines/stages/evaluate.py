"""evaluate: samples, a model and held-out data -> `evaluations/<run>/`. Dispatches on capability; knows no family."""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from dgm_models import noise
from dgm_models.codecs import Standardized
from dgm_models.likelihood import Kind, log_prob, ode_log_prob, unnormalised_log_prob
from dgm_models.method import resampled
from dgm_models.metrics import coverage, disentanglement, frechet, inception, kernel, likelihood, modes, two_sample
from dgm_models.metrics.estimate import Estimate
from dgm_models.nn.diffusion import Diffusion
from dgm_models.nn.tempering import Tempering
from dgm_models.protocols import Bound, Bracketed, DataSpec, Density, DiagonalPosterior, Features, Latents
from dgm_models.sampling import conditions, sample
from pipelines import files, paths, pictures
from pipelines.params import Evaluation, Params

if TYPE_CHECKING:
    from dgm_models.method import Method
    from pipelines.data import shards as stored

RAW_DIMS = 64  # up to here data without an extractor are compared in their own coordinates
CHUNK = 256
CODED = 10_000  # rows whose codes are compared with their factors
DRAWN = 2_000  # the first of them, for mig/sampled: its time grows with their square
LOOKED = 500  # rows whose codes order the traversals
SHOWN = 12  # traversals, at most
PAIRS = 6  # of examples, in the picture of interpolations
STEPS = tuple(step / 2 for step in range(-4, 5))  # of a traversal, in standard deviations of its code
TEMPERATURES = (0.5, 0.7, 0.85, 1.0)  # of the rows of a picture
ACROSS, POINTS = 9, 500  # samples at each of them: pictures, or points in a plot
ASKED, DRAWS = 6, 4  # examples whose conditions are shown, and samples for each


@dataclass(frozen=True)
class Extractor:
    """The coordinates in which samples are compared.

    Attributes:
        name: stands in every metric's key.
        sha256: of its weights, or of the rule for raw coordinates.
        method: the classifier, or None for raw coordinates.
    """

    name: str
    sha256: str
    method: Method | None

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Stored x [N, *event] -> features [N, d] float64 and class probabilities [N, classes] or None."""
        if self.method is None:
            return x.flatten(1).double(), None
        model = self.method.model
        assert isinstance(model, Features)
        encoded = (model.codec.encode(part, torch.zeros(len(part), dtype=torch.int64))[0] for part in x.split(CHUNK))
        found = [model.features(part) for part in encoded]
        return torch.cat([f for f, _ in found]).double(), torch.cat([p for _, p in found]).double()


def compared(dataset: str, settings: Evaluation, split: str = "test", data: Path | None = None) -> int:
    """How many samples every row of a dataset compares."""
    from pipelines.data import shards

    return min(shards.read_manifest(data or paths.data(dataset)).rows[split], settings.max_samples)


def drawn(method: Method, dataset: str, settings: Evaluation, split: str = "test", data: Path | None = None) -> Tensor:
    """The samples [N, *event] that are compared with a split, by the evaluation's seed.

    A model with a condition is asked for what the split's rows are, one by one.
    """
    from pipelines.data import shards

    there, n = shards.load(data or paths.data(dataset), split), compared(dataset, settings, split, data)
    labels = None if there.cond is None else there.cond[:n]
    cond = conditions(method, there.x[:n], labels, settings.seed)
    return sample(method, n, settings.seed, cond=cond)


def extractor_of(dataset: str, dims: int) -> Extractor | None:
    """The dataset's trained classifier; raw coordinates for small vectors; None when there is neither."""
    import dgm_models
    from dgm_models.training import checkpoint

    folder = paths.extractor(dataset)
    if folder.is_dir():
        digest = checkpoint.file_sha256(folder / "weights.safetensors")
        return Extractor(dataset, digest, dgm_models.load(folder))
    return Extractor("raw", "raw-coordinates", None) if dims <= RAW_DIMS else None


def in_units(data: DataSpec, x: Tensor) -> Tensor:
    """Stored x [N, *event] as it is compared: a table's columns in units of their own spread, all else as it is."""
    if not isinstance(data.scale, tuple):
        return x
    return Standardized(data).encode(x, torch.zeros(len(x), dtype=torch.int64))[0]


@dataclass
class Rows:
    """The rows of one evaluation.json, and what was refused; `wanted`: only these attempts are made, None for all."""

    extractor_sha256: str | None
    split: str
    seed: int
    wanted: frozenset[str] | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    refused: list[dict[str, str]] = field(default_factory=list)

    def add(
        self, metric: str, estimate: Estimate, unit: str, kind: Literal["exact", "bound", "estimate"], features: bool
    ) -> None:
        self.rows.append(
            {"metric": metric, **asdict(estimate), "unit": unit, "kind": kind, "split": self.split,
             "extractor_sha256": self.extractor_sha256 if features else None, "seed": self.seed}
        )  # fmt: skip

    def attempt(self, metric: str, measure: Callable[[], None]) -> None:
        """A metric that cannot be computed honestly is refused with its reason, not printed."""
        if self.wanted is not None and metric not in self.wanted:
            return
        try:
            measure()
        except ValueError as error:
            self.refused.append({"metric": metric, "reason": str(error)})


def compare(
    rows: Rows, extractor: Extractor, real: Tensor, fake: Tensor, train: Tensor, labels: Tensor | None
) -> dict[str, Tensor]:
    """Sample metrics of stored fakes against stored reals, into `rows`; modes where the reals have labels.

    Returns: both sets of features.
    """
    name = extractor.name
    real_features, _ = extractor(real)
    fake_features, probabilities = extractor(fake)

    def fid() -> None:
        rows.add(f"fid/{name}", frechet.frechet(real_features, fake_features), "distance^2", "estimate", True)

    def kid() -> None:
        rows.add(f"kid/{name}", kernel.kernel_distance(real_features, fake_features), "mmd^2", "estimate", True)

    def score() -> None:
        if probabilities is None:
            raise ValueError("raw coordinates have no class probabilities")
        rows.add(f"inception_score/{name}", inception.inception_score(probabilities), "classes", "estimate", True)

    def precision() -> None:
        found = coverage.precision_recall(real_features, fake_features)
        rows.add(f"precision/{name}", found.precision, "share", "estimate", True)
        rows.add(f"recall/{name}", found.recall, "share", "estimate", True)

    def density() -> None:
        found = coverage.density_coverage(real_features, fake_features)
        rows.add(f"density/{name}", found.density, "ratio", "estimate", True)
        rows.add(f"coverage/{name}", found.coverage, "share", "estimate", True)

    def told_apart() -> None:
        found = two_sample.classifier_two_sample(real_features, fake_features)
        rows.add(f"c2st/{name}", found, "accuracy", "estimate", True)

    def covered() -> None:
        if labels is None:
            return
        found = modes.modes(real_features, labels, fake_features)
        rows.add(f"modes/{name}", found.covered, "modes", "estimate", True)
        rows.rows[-1]["of"] = len(found.shares)
        rows.add(f"high_quality/{name}", found.quality, "share", "estimate", True)

    def copying() -> None:
        found = coverage.copies(train.flatten(1).double(), real.flatten(1).double(), fake.flatten(1).double())
        rows.add("copies", found.share, "share", "estimate", False)
        rows.rows[-1]["flag"] = found.copied

    for metric, measure in {
        "fid": fid, "kid": kid, "inception_score": score, "precision": precision, "density": density,
        "c2st": told_apart, "modes": covered, "copies": copying,
    }.items():  # fmt: skip
        rows.attempt(metric, measure)
    return {"real": real_features.float(), "fake": fake_features.float()}


def likelihoods(rows: Rows, method: Method, x: Tensor, labels: Tensor | None, settings: Evaluation) -> None:
    """Negative log-likelihood, bits/dim and ELBO of stored x, each labelled by what it is, into `rows`.

    A model with a condition is given each example's own. Those are other numbers than log p(x): they are rows
    such as "nll_given/label". Estimates by the probability-flow ODE, of the first rows, are rows such as "nll/ode":
    a bound and an estimate never share a name.
    """
    model = method.model
    given = f"_given/{model.condition.name}" if model.condition else ""

    def add(nats: Tensor, kind: Kind, how: str = "") -> None:
        rows.add(f"nll{given}{how}", likelihood.mean_estimate(-nats), "nats", kind, False)
        if method.data.levels is not None:
            bits = likelihood.mean_estimate(likelihood.bits_per_dim(-nats, method.data.dims))
            rows.add(f"bits_per_dim{given}{how}", bits, "bits/dim", kind, False)

    def told() -> None:
        if isinstance(model, Bound) and not isinstance(model, Density):
            elbo, kind = log_prob(method, x, labels, 1, settings.seed)
            rows.add(f"elbo{given}", likelihood.mean_estimate(elbo), "nats", kind, False)
        add(*log_prob(method, x, labels, settings.importance, settings.seed))

    def by_ode() -> None:
        first = None if labels is None else labels[: settings.ode_rows]
        add(*ode_log_prob(method, x[: settings.ode_rows], first, seed=settings.seed), "/ode")

    if isinstance(model, Density | Bound):
        rows.attempt("nll", told)
    if isinstance(model, Diffusion) and settings.ode_rows:
        rows.attempt("nll/ode", by_ode)


def bracketed(rows: Rows, method: Method, x: Tensor, settings: Evaluation) -> None:
    """Bounds of log Z, and with them of the likelihood of stored x, into `rows`: never one number.

    "lower" is a stochastic bound; the lower NLL is the flattering side. "upper" is an estimate of one: its chains start
    at samples of the model, and it is too low by at most the divergence of these from the model.
    """
    model, dims = method.model, method.data.dims
    assert isinstance(model, Bracketed)
    rng = torch.Generator().manual_seed(noise.digest("log_z", settings.seed))
    found = model.bracket_log_z(settings.chains, settings.temperatures, rng)
    energy = likelihood.mean_estimate(-unnormalised_log_prob(method, x, settings.seed))
    sides: dict[str, tuple[Tensor, Kind]] = {"lower": (found.lower, "bound"), "upper": (found.upper, "estimate")}
    for side, (groups, kind) in sides.items():
        log_z = replace(likelihood.mean_estimate(groups), n=settings.chains)
        half = math.hypot(energy.high - energy.value, log_z.high - log_z.value)  # two independent errors
        value = energy.value + log_z.value
        nll = Estimate(value, value - half, value + half, energy.n)
        bits = Estimate(*(each / (dims * math.log(2)) for each in (nll.value, nll.low, nll.high)), nll.n)
        told = {"log_z": (log_z, "nats"), "nll": (nll, "nats"), "bits_per_dim": (bits, "bits/dim")}
        for metric, (estimate, unit) in told.items():
            if metric != "bits_per_dim" or method.data.levels is not None:
                rows.add(f"{metric}/{side}", estimate, unit, kind, False)
                rows.rows[-1] |= {"chains": settings.chains, "temperatures": settings.temperatures}


def accuracy(method: Method, x: Tensor, labels: Tensor) -> Estimate:
    """The share of stored x [N, *event] whose label is the most probable one to a model that classifies."""
    _, probabilities = Extractor("", "", method)(x)
    assert probabilities is not None
    return likelihood.mean_estimate((probabilities.argmax(1) == labels).double())


@torch.no_grad()
def posteriors(method: Method, x: Tensor, labels: Tensor | None, seed: int) -> tuple[Tensor, Tensor | None]:
    """Codes [N, D] of stored x and their posteriors' log-variances, None for a model without diagonal posteriors.

    Raises: ValueError when the codes are no vectors.
    """
    model, cond, found = method.model, conditions(method, x, labels, seed), []
    assert isinstance(model, Latents)
    keys = noise.fold(torch.arange(len(x)), "latents", seed)
    for start in range(0, len(x), CHUNK):
        part = slice(start, start + CHUNK)
        y, _ = model.codec.encode(x[part], keys[part])
        given = None if cond is None else cond[part]
        found.append(
            model.posterior(y, given) if isinstance(model, DiagonalPosterior) else (model.encode(y, given), None)
        )
    codes = torch.cat([mean for mean, _ in found]).detach()
    if codes.ndim != 2:
        raise ValueError(f"{method.name} has codes of shape {tuple(codes.shape[1:])}; expected vectors")
    variances = [log_variance.detach() for _, log_variance in found if log_variance is not None]
    return codes, torch.cat(variances) if variances else None


def disentangled(rows: Rows, method: Method, there: stored.Rows, manifest: stored.Manifest) -> None:
    """How far single codes tell single factors of the first `CODED` rows, into `rows`.

    A row's own key "factors" tells each factor's gap, or R^2, in their order. Factors of one value are left out.
    """
    from pipelines.data import shards

    there = there[:CODED]
    known = shards.factors_at(there.id, manifest.factors)
    varied = [number for number, factor in enumerate(manifest.factors) if factor.size > 1]
    known, names = known[:, varied], [manifest.factors[number].name for number in varied]
    coded = functools.cache(lambda: posteriors(method, there.x, there.cond, rows.seed))

    def add(metric: str, estimate: Estimate, unit: str, each: list[float] | None = None) -> None:
        rows.add(metric, estimate, unit, "estimate", False)
        if each is not None:
            rows.rows[-1]["factors"] = list(map(list, zip(names, each, strict=True)))

    def histogram() -> None:
        found = disentanglement.mig_histogram(coded()[0], known)
        add("mig/histogram", found.score, "share", [gap.value for gap in found.factors])

    def sampled() -> None:
        means, log_variances = (part if part is None else part[:DRAWN] for part in coded())
        if means is None or log_variances is None:
            raise ValueError(f"{method.name} has no posterior to draw from")
        eps = noise.normal(noise.fold(torch.arange(len(means)), "mig", rows.seed), "posterior", means.shape[1:])
        found = disentanglement.mig_sampled(means, log_variances, known[:DRAWN], eps)
        add("mig/sampled", found.score, "share", [gap.value for gap in found.factors])

    def dci() -> None:
        found = disentanglement.dci(coded()[0], known)
        add("dci/disentanglement", found.disentanglement, "share")
        add("dci/completeness", found.completeness, "share")
        add("dci/informativeness", found.informativeness, "R^2", found.told.tolist())

    for metric, measure in {"mig/histogram": histogram, "mig/sampled": sampled, "dci": dci}.items():
        rows.attempt(metric, measure)


@torch.no_grad()
def latents(method: Method, x: Tensor, labels: Tensor | None, seed: int) -> dict[str, bytes]:
    """What a model's codes do, as files: latents.json; traversal.png and interpolation.png where examples are pictures.

    The codes are ordered by their KL to the prior, the mean over the first rows, or by their variance where a model has
    no diagonal posterior. A traversal decodes the first example with one code moved through `STEPS`, in standard
    deviations of that code around its mean over the rows. An interpolation goes in a straight line from the code of
    one example to that of another; the outer columns are the two examples. A model with a condition is given that of
    the first example, or of the left one.

    Args:
        x, labels: stored rows, at least 2.
        seed: of what is drawn.
    """
    x, labels = x[:LOOKED], None if labels is None else labels[:LOOKED]
    codes, log_variances = posteriors(method, x, labels, seed)
    own = torch.zeros_like(codes) if log_variances is None else log_variances.exp()
    kl = None if log_variances is None else (0.5 * (codes**2 + own - log_variances - 1)).mean(0)
    spread = codes.var(0, correction=0)  # of the means: a code is active where it is above 0.01
    order = (spread if kl is None else kl).argsort(descending=True, stable=True)
    shown = order[:SHOWN]
    told = [
        {"code": code, "kl": None if kl is None else float(kl[code]), "variance": float(spread[code])}
        for code in order.tolist()
    ]
    given = method.model.condition.name if method.model.condition else None
    document = {"rows": len(x), "codes": told, "shown": len(shown), "steps": STEPS, "given": given}
    found = {"latents.json": (json.dumps(document, indent=1) + "\n").encode()}
    if pictures.tile(method.data) is None:
        return found
    deviation, steps = (spread + own.mean(0)).sqrt(), torch.tensor(STEPS)
    moved = codes[0].repeat(len(shown), len(STEPS), 1)  # [R, steps, D]
    for row, code in zip(moved, shown.tolist(), strict=True):
        row[:, code] = codes[:, code].mean() + steps * deviation[code]
    pairs = min(PAIRS, len(x) // 2)
    first, second = codes[:pairs, None], codes[pairs : 2 * pairs, None]
    between = first + (second - first) * torch.linspace(0, 1, len(STEPS))[:, None]  # [pairs, steps, D]
    cond = conditions(method, x, labels, seed)
    decode = functools.partial(_decoded, method)
    traversal = decode(moved, None if cond is None else cond[:1].expand(len(moved), *cond.shape[1:]))
    line = decode(between, None if cond is None else cond[:pairs])
    line = torch.cat([x[:pairs, None], line, x[pairs : 2 * pairs, None]], 1)
    found["traversal.png"] = pictures.table(traversal.flatten(0, 1), method.data, traversal.shape[1])
    found["interpolation.png"] = pictures.table(line.flatten(0, 1), method.data, line.shape[1])
    return found


def _decoded(method: Method, z: Tensor, cond: Tensor | None) -> Tensor:
    """Codes [R, C, D] and a condition for each of the R rows -> stored examples [R, C, *event]."""
    model, flat = method.model, z.flatten(0, 1)
    assert isinstance(model, Latents)
    y = model.decode(flat, None if cond is None else cond.repeat_interleave(z.shape[1], 0))
    return model.codec.decode(y).reshape(*z.shape[:2], *method.data.shape)


def temperatures(method: Method, x: Tensor, labels: Tensor | None, seed: int) -> dict[str, bytes]:
    """temperature.png: samples at each of `TEMPERATURES`, drawn with one seed, a row or a panel each.

    Nothing for a sampler without a temperature, and for samples that have no picture. A model with a condition is asked
    for what the first rows are.

    Args:
        x, labels: stored rows.
        seed: of the samples.
    """
    pictured = pictures.tile(method.data) is not None
    if not isinstance(method.model.sampling, Tempering) or not (pictured or pictures.plotted(method.data)):
        return {}
    n = min(ACROSS if pictured else POINTS, len(x))
    cond = conditions(method, x[:n], None if labels is None else labels[:n], seed)
    sets = [sample(resampled(method, {"temperature": each}), n, seed, cond=cond) for each in TEMPERATURES]
    return {"temperature.png": pictures.series(sets, [f"{each:g}" for each in TEMPERATURES], method.data)}


def asked_for(method: Method, x: Tensor, labels: Tensor | None, seed: int) -> dict[str, bytes]:
    """conditions.png: a row an example: the condition, samples that were asked by it, and the example itself.

    Nothing for a model whose condition is no image. Where a condition has one channel more than the data, that says
    what of an example it shows.

    Args:
        x, labels: stored rows.
        seed: of the samples, and of conditions that are drawn.
    """
    condition, data = method.model.condition, method.data
    if condition is None or condition.spec(data).kind != "image" or data.levels is None:
        return {}
    x = x[:ASKED]
    cond = conditions(method, x, None if labels is None else labels[:ASKED], seed)
    assert cond is not None
    samples = sample(method, len(x) * DRAWS, seed, cond=cond.repeat_interleave(DRAWS, 0))
    channels = data.shape[0]
    shown = ((cond[:, :channels] + 1) * ((data.levels - 1) / 2)).round().clamp(0, data.levels - 1).to(x.dtype)
    rows = torch.cat([shown.expand_as(x)[:, None], samples.unflatten(0, (len(x), DRAWS)), x[:, None]], 1)
    hidden = torch.zeros(rows.shape, dtype=torch.bool)
    if cond.shape[1] > channels:
        hidden[:, 0] = cond[:, channels:] < 0
    return {"conditions.png": pictures.table(rows.flatten(0, 1), data, rows.shape[1], hidden.flatten(0, 1))}


def evaluate(
    method: Method, fake: Tensor, dataset: str, settings: Evaluation, split: str = "test", data: Path | None = None,
    wanted: frozenset[str] | None = None,
) -> tuple[Rows, dict[str, Tensor]]:  # fmt: skip
    """Everything that can be said of a model against one split.

    Args:
        method: the trained method.
        fake: [N, *event] stored samples.
        dataset: the prepared dataset's key.
        settings: seeds and sizes.
        split: "test" for the reported row, "valid" for searches.
        data: the prepared dataset's folder where it is not the project's.
        wanted: the only attempts to make ("fid", "nll"; `Rows.attempt`), None for all.
    Returns: the rows, and the features (empty without an extractor).
    """
    from pipelines.data import shards

    folder = data or paths.data(dataset)
    there = shards.load(folder, split)
    held_out = there.x
    train = shards.load(folder, "train").x if wanted is None or "copies" in wanted else held_out[:0]
    extractor = extractor_of(dataset, method.data.dims)
    rows = Rows(extractor.sha256 if extractor else None, split, settings.seed, wanted)
    n = min(len(held_out), settings.max_samples, len(fake))
    features: dict[str, Tensor] = {}
    if extractor:
        labels = None if there.cond is None else there.cond[:n]
        real, made, known_rows = (in_units(method.data, each) for each in (held_out[:n], fake[:n], train))
        features = compare(rows, extractor, real, made, known_rows, labels)
    else:
        reason = f"{dataset} has no extractor, and {method.data.dims} raw dimensions are more than {RAW_DIMS}"
        rows.refused.append({"metric": "fid", "reason": reason})
    likelihoods(rows, method, held_out, there.cond, settings)
    normalised = isinstance(method.model, Density) and not method.model.estimated
    if isinstance(method.model, Bracketed) and not normalised:
        rows.attempt("log_z", lambda: bracketed(rows, method, held_out, settings))
    known = there.cond
    if isinstance(method.model, Features) and known is not None:
        rows.attempt(
            "accuracy",
            lambda: rows.add("accuracy", accuracy(method, held_out, known), "share", "estimate", False),
        )
    manifest = shards.read_manifest(folder)
    if isinstance(method.model, Latents) and manifest.factors:
        disentangled(rows, method, there, manifest)
    return rows, features


def evaluate_stage(run: str, out: Path, params: Params) -> list[dict[str, Any]]:
    """Writes evaluation.json, metrics.json (flat, for `dvc metrics`), features.safetensors, grid.png, refused.json.

    Also what `latents`, `temperatures` and `asked_for` give.
    """
    import shutil

    from safetensors.torch import save_file

    import dgm_models
    from pipelines.data import shards
    from pipelines.stages import sample as sampling

    started = time.time()
    method = dgm_models.load(paths.artifact(run))
    fake = sampling.read(paths.samples(run), method.data.shape)
    dataset = params.dataset_of(run)
    rows, features = evaluate(method, fake, dataset, params.evaluation)
    rows.rows += bounds(dataset)
    count = files.read_json(paths.samples(run) / "samples.json")["evaluations"]
    each = Estimate(count, count, count, len(fake))
    rows.add("evaluations_per_sample", each, "network evaluations", "exact", False)
    shown: dict[str, bytes] = {}
    test = shards.load(paths.data(dataset), "test")
    for name, draw in {"latents": latents, "temperature": temperatures, "conditions": asked_for}.items():
        if name != "latents" or isinstance(method.model, Latents):
            made = functools.partial(draw, method, test.x, test.cond, params.evaluation.seed)
            rows.attempt(name, lambda made=made: shown.update(made()))
    with files.whole(out) as folder:
        for name, content in shown.items():
            files.write_bytes(folder / name, content)
        files.write_json(folder / "evaluation.json", rows.rows)
        files.write_json(folder / "metrics.json", {row["metric"]: row["value"] for row in rows.rows})
        files.write_json(folder / "refused.json", rows.refused)
        files.write_json(folder / "timing.json", {"seconds": round(time.time() - started, 2)})
        if features:
            save_file(features, folder / "features.safetensors")
        shutil.copy(paths.samples(run) / "grid.png", folder / "grid.png")
    return rows.rows


def reference(dataset: str, params: Params) -> list[dict[str, Any]]:
    """The floor (valid against test: both unseen by the extractor) and the ceiling (noise), with the n of every row."""
    from pipelines.data import shards

    folder = paths.data(dataset)
    manifest = shards.read_manifest(folder)
    test, valid, train = (shards.load(folder, split).x for split in ("test", "valid", "train"))
    labels = shards.load(folder, "test").cond
    extractor = extractor_of(dataset, manifest.spec().dims)
    assert extractor is not None
    n = min(len(test), params.evaluation.max_samples, len(valid))
    rng = torch.Generator().manual_seed(noise.digest("ceiling", params.evaluation.seed))
    uniform = torch.randint(manifest.levels or 256, test[:n].shape, generator=rng).to(test.dtype)
    found = []
    for name, fake in (("floor", valid[:n]), ("ceiling", uniform)):
        rows = Rows(extractor.sha256, "test", params.evaluation.seed)
        compare(rows, extractor, test[:n], fake, train, None if labels is None else labels[:n])
        found += [{"run": name, **row} for row in rows.rows]
    return found


def bounds(dataset: str) -> list[dict[str, Any]]:
    """The dataset's floor and ceiling as rows "<metric>/floor" and "<metric>/ceiling" of any evaluation."""
    file = paths.extractor(dataset) / "reference.json"
    if not file.is_file():
        return []
    return [
        {name: value for name, value in row.items() if name != "run"} | {"metric": f"{row['metric']}/{row['run']}"}
        for row in files.read_json(file)
        if row["metric"].startswith("fid/")
    ]


def extractor_stage(dataset: str, out: Path, params: Params) -> dict[str, Any]:
    """Trains the dataset's classifier, measures its accuracy, and writes the floor and the ceiling beside it."""
    import dgm_models
    from pipelines.data import shards
    from pipelines.stages.train import train

    train(params.extractors[dataset], out, params, "extractor")
    method = dgm_models.load(out)
    test = shards.load(paths.data(dataset), "test")
    assert test.cond is not None
    right = accuracy(method, test.x, test.cond)
    with files.whole(out) as folder:
        for path in paths.extractor(dataset).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        told = {"accuracy": asdict(right), "feature_dim": method.params["feature_dim"]}
        files.write_json(folder / "accuracy.json", told)
        files.write_json(folder / "reference.json", reference(dataset, params))
    return told
