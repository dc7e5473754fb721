"""One verb a function; nothing heavy is imported before a verb runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from dgm_models.method import Method
    from pipelines.params import Params

app = typer.Typer(
    name="dgm",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help=(
        "Every family of deep generative model on one road: prepare, train, evaluate, register, promote.\n\n"
        "`dvc repro` runs the verbs under 'Stages' in order, each only when what it depends on has changed. "
        "The verbs under 'Use' look at what is there, those under 'Clusters' at machines. All of them read params.yaml."
    ),
)

STAGES, USE, CLUSTER = "Stages", "Use", "Clusters"
StoreOnly = Annotated[bool, typer.Option("--store-only", hidden=True, help="Leave the result in the run store: a job.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")]
Target = Annotated[str, typer.Argument(help="A run, an artifact's folder, or models:/digits@champion.")]
Rows = Annotated[
    str,
    typer.Argument(help="A .npy, .csv, .parquet or image file, a folder of images, or a split such as digits/test."),
]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="A setting of the sampler, such as temperature=0.7; repeatable.")
]


def _params() -> Params:
    """Every verb's first act: params.yaml is right, or nothing starts."""
    from pipelines.params import load

    return load()


def _say(document: Any, as_json: bool, words: str) -> None:
    typer.echo(json.dumps(document, indent=1, sort_keys=True) if as_json else words)


def _key(kind: str, key: str, known: Any) -> None:
    from dgm_models.construct import ConfigError, did_you_mean

    if key not in known:
        raise ConfigError(f"{kind}.{key}: not in params.yaml{did_you_mean(key, known)}")


# ---- use


@app.command(rich_help_panel=USE)
def check(as_json: Json = False) -> None:
    """Check params.yaml: unknown keys, wrong types and impossible values are named with their path."""
    params = _params()
    sections = ("datasets", "extractors", "runs", "codes", "searches", "tuned")
    counts = {name: len(getattr(params, name)) for name in sections}
    _say({"ok": True, **counts}, as_json, "params.yaml: " + ", ".join(f"{n} {name}" for name, n in counts.items()))


@app.command(rich_help_panel=USE)
def models(as_json: Json = False) -> None:
    """List the methods: name, family, capabilities, data, paper."""
    from dgm_models.registry import ROWS

    rows = [
        {"name": row.name, "family": row.family, "capabilities": list(row.capabilities), "data": list(row.data),
         "paper": row.paper}
        for row in ROWS
    ]  # fmt: skip
    lines = [f"{row['name']:<36} {', '.join(row['capabilities']):<28} {row['paper']}" for row in rows]
    _say(rows, as_json, "\n".join(lines))


@app.command(rich_help_panel=USE)
def leaderboard(
    dataset: Annotated[str | None, typer.Option(help="Only this dataset.")] = None, as_json: Json = False
) -> None:
    """Show every evaluated run with its metrics and intervals, best FID first."""
    from pipelines import leaderboard as board

    rows = board.rows(dataset)
    if as_json:
        typer.echo(json.dumps(rows, indent=1, sort_keys=True))
    else:
        typer.echo(board.table(rows))


@app.command(rich_help_panel=USE)
def sample(
    target: Target,
    n: Annotated[int, typer.Option(min=1, help="How many samples.")] = 64,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
    out: Annotated[Path | None, typer.Option(help="A .png grid or a .npy array.")] = None,
    label: Annotated[int | None, typer.Option(help="Of a model asked by label: this one; every one in turn.")] = None,
    caption: Annotated[
        str | None, typer.Option(help="Of a model asked by caption: its words, such as 'small heart left top'.")
    ] = None,
    like: Annotated[
        str | None, typer.Option(help="Of a model asked by image: examples, as `likelihood` reads.")
    ] = None,
    set_: Set = None,
    stage: Annotated[bool, typer.Option(help="As the pipeline does: n and seed of the evaluation, parquet.")] = False,
) -> None:
    """Draw samples from a trained model."""
    from pipelines import paths, pictures
    from pipelines.stages import sample as stage_module

    if stage:
        if set_:
            raise ValueError("--set: the pipeline draws with the method's own settings; give --out in place of --stage")
        params = _params()
        _key("runs", target, params.keys)
        stage_module.sample_stage(target, paths.samples(target), params)
        return
    _picture_or_array(out)
    import dgm_models
    from dgm_models.sampling import labelled

    method = _method(target, set_)
    if like:
        x = stage_module.sample_like(method, like, seed)
    else:
        x = dgm_models.sample(method, n, seed, cond=labelled(method, n, label, caption))
    _write_samples(out, x, lambda: pictures.grid(x, method.data))
    evaluations = method.model.evaluations
    typer.echo(f"{out}: {len(x)} samples of {method.name}, seed {seed}, network evaluations for each: {evaluations}")


@app.command(rich_help_panel=USE)
def complete(
    target: Target,
    rows: Rows,
    known: Annotated[str, typer.Option(help="What is known: top:0.5, left:0.5, or a .npy mask of true and false.")],
    out: Annotated[Path, typer.Option(help="A .png of original, known part and draws, or a .npy [N, draws, ...].")],
    n: Annotated[int, typer.Option(min=1, help="The first so many rows.")] = 8,
    draws: Annotated[int, typer.Option(min=1, help="Completions of every row.")] = 4,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
    label: Annotated[int | None, typer.Option(help="Of a model asked by label: this one; the rows' own.")] = None,
    set_: Set = None,
) -> None:
    """Draw what is missing of examples from a model that can complete them; the known part stays as it is."""
    from dgm_models.sampling import labels_of
    from pipelines.stages import rows as reading
    from pipelines.stages import sample as stage_module

    _picture_or_array(out)
    method = _method(target, set_)
    x, labels = reading.read(rows, method)
    x, labels = x[:n], None if labels is None else labels[:n]
    if label is not None:
        labels = labels_of(method, len(x), label)
    mask = stage_module.known_part(known, method.data)
    drawn, mask = stage_module.completed(method, x, labels, mask[:n] if mask.ndim == x.ndim else mask, draws, seed)
    _write_samples(out, drawn, lambda: stage_module.completions(x, mask, drawn, method.data))
    typer.echo(
        f"{out}: {len(x)} rows, {draws} completions each by {method.name}, seed {seed}, "
        f"network evaluations for each: {method.model.evaluations}"
    )


@app.command(rich_help_panel=USE)
def restore(
    target: Target,
    file: Annotated[str, typer.Argument(help="An image file.")],
    task: Annotated[str, typer.Option(help="inpaint, super_resolve, colourise or denoise.")],
    out: Annotated[Path, typer.Option(help="A .png: the input and the draws; each draw goes beside it. Or a .npy.")],
    mask: Annotated[str | None, typer.Option(help="Of inpaint: an image, white where the picture is painted.")] = None,
    factor: Annotated[int | None, typer.Option(help="Of super_resolve: how many times larger.")] = None,
    noise: Annotated[float, typer.Option(help="Standard deviation of the pixels' noise, of 0 to 255.")] = 0.0,
    n: Annotated[int, typer.Option(min=1, help="How many draws.")] = 4,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
    label: Annotated[int | None, typer.Option(help="Of a model asked by label: this one; every one in turn.")] = None,
    rounds: Annotated[
        int | None, typer.Option(min=0, help="Backward passes an evaluation that spread what is seen; 0 for none.")
    ] = None,
    set_: Set = None,
) -> None:
    """Paint a hole, enlarge, colour or denoise your own picture with a trained model of such pictures."""
    from pipelines import files
    from pipelines.stages import restore as stage_module

    _picture_or_array(out)
    method = _method(target, set_)
    job = stage_module.job_of(method.data, file, task, mask, factor, noise)
    drawn = stage_module.restored(method, job, n, seed, label, rounds)
    if out.suffix == ".png":
        for path, content in stage_module.files_of(job, drawn, method.data, out).items():
            files.write_bytes(path, content)
    else:
        _write_samples(out, drawn, lambda: b"")
    typer.echo(
        f"{out}: {task} of {file}, {n} draws by {method.name}, seed {seed}, "
        f"network evaluations for each: {method.model.evaluations}"
    )


def _method(target: str, pairs: list[str] | None) -> Method:
    """The trained method, with the settings of its sampler that were given."""
    import tempfile

    import dgm_models
    from pipelines.stages.sample import locate, settings

    changed = settings(pairs or [])
    with tempfile.TemporaryDirectory(prefix="dgm-") as folder:
        method = dgm_models.load(locate(target, Path(folder)))
    return dgm_models.resampled(method, changed) if changed else method


def _picture_or_array(out: Path | None) -> None:
    """Raises: ValueError, before anything is loaded."""
    if out is None or out.suffix not in (".png", ".npy"):
        raise ValueError(f"--out: {out} is neither a .png nor a .npy file")


def _write_samples(out: Path | None, x: Tensor, picture: Callable[[], bytes]) -> None:
    import io

    import numpy as np

    from pipelines import files

    assert out is not None
    if out.suffix == ".png":
        content = picture()
    else:
        stream = io.BytesIO()
        np.save(stream, x.numpy())
        content = stream.getvalue()
    files.write_bytes(out, content)


@app.command(rich_help_panel=USE)
def likelihood(
    target: Target,
    rows: Rows,
    importance: Annotated[int, typer.Option(min=1, help="Draws of the bound, for models that have one.")] = 32,
    seed: Annotated[int, typer.Option(help="Of dequantisation and draws.")] = 0,
    ode: Annotated[
        bool, typer.Option(help="Of a diffusion model: the estimate by its probability-flow ODE, not its bound.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="A .csv of every row's log-likelihood and rank.")] = None,
    as_json: Json = False,
) -> None:
    """Say how probable rows are under a model: log p, bits/dim, and a rank among held-out rows."""
    from pipelines.stages import likelihood as stage_module

    found = stage_module.likelihood(target, rows, importance, seed, out, ode)
    _say(found, as_json, stage_module.words(found))


@app.command(rich_help_panel=USE)
def rollback(model: Annotated[str, typer.Argument(help="The registered model.")], as_json: Json = False) -> None:
    """Give the alias `champion` back to the version that had it before."""
    from dataclasses import asdict

    from pipelines import paths, promotion

    entry = promotion.rollback(model, receipt=paths.promotion(model), uri=_params().tracking.where)
    _say(asdict(entry), as_json, f"{model}: champion is version {entry.to.version} ({entry.to.run}) again")


@app.command(rich_help_panel=USE)
def sync(as_json: Json = False) -> None:
    """Make the MLflow server agree with the receipts: a lost database, another server, a fresh clone."""
    from pipelines import paths, registration

    uri, done, count = _params().tracking.where, [], 0
    promotions = [
        path for path in paths.promotion("x").parent.glob("*.json") if not path.name.endswith(".verdict.json")
    ]
    for home in (paths.root() / "zoo", paths.root()):  # promotions last: they may name a version of the zoo
        receipts = sorted((home / "receipts").glob("*.json")) + (promotions if home == paths.root() else [])
        done += registration.sync(receipts, home / "artifacts", home / "evaluations", uri=uri)
        count += len(receipts)
    _say(done, as_json, "\n".join(done) or f"{count} receipts: the server agrees")


# ---- clusters


@app.command(rich_help_panel=CLUSTER)
def repro(
    jobs: Annotated[int, typer.Option(min=1, help="Independent trainings at the same time.")] = 1,
    file: Annotated[str, typer.Argument(help="dvc.yaml, or zoo/dvc.yaml.")] = "dvc.yaml",
) -> None:
    """Run `dvc repro` with several trainings at once, on as many nodes as the cluster has."""
    from pipelines.repro import repro as run

    run(_params(), jobs, file)


@app.command(rich_help_panel=CLUSTER)
def doctor(as_json: Json = False) -> None:
    """Look at all that a run will need: versions, cluster, token, bucket rights, tracker, disk, clocks, git."""
    from dataclasses import asdict

    from pipelines import doctor as examination

    found = examination.examine(_params())
    _say([asdict(each) for each in found], as_json, "\n".join(map(examination.line, found)))
    if any(each.state == "bad" for each in found):
        raise typer.Exit(1)


@app.command(rich_help_panel=CLUSTER)
def plan(
    run: Annotated[str, typer.Argument(help="A key of `runs` or `tuned`.")],
    gpus: Annotated[int, typer.Option(help="Workers.")],
    device: Annotated[str | None, typer.Option(help="a100, h100, h200, or a YAML file of its numbers.")] = None,
    price: Annotated[float | None, typer.Option(help="Of one worker's hour, in your currency.")] = None,
    measure: Annotated[bool, typer.Option(help="Time real steps on this machine.")] = False,
    shard: Annotated[bool | None, typer.Option("--shard/--no-shard", help="Instead of cluster.shard.")] = None,
    checkpoint_activations: Annotated[
        bool | None, typer.Option("--checkpoint-activations/--no-checkpoint-activations", help="Likewise.")
    ] = None,
    as_json: Json = False,
) -> None:
    """What a run needs on N workers: memory, traffic, time, price; nothing is trained and nothing is rented."""
    import dataclasses

    from pipelines.plan import plan as planning
    from pipelines.stages.train import resolve

    params = _params()
    _key("runs", run, params.keys)
    given = {"shard": shard, "checkpoint_activations": checkpoint_activations}
    changes = {name: value for name, value in given.items() if value is not None}
    params = dataclasses.replace(params, cluster=dataclasses.replace(params.cluster, **changes))
    document = planning.plan(resolve(run, params), params, gpus, device_name=device, price=price, measure=measure)
    _say(document, as_json, planning.words(document))


@app.command(rich_help_panel=CLUSTER)
def drill(
    names: Annotated[list[str] | None, typer.Argument(help="Which; all by default.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Say what there is, and what must hold.")] = False,
    repeat: Annotated[int, typer.Option(min=1, help="The whole set so many times.")] = 1,
    short: Annotated[bool, typer.Option(help="Only the short set.")] = False,
    log: Annotated[Path | None, typer.Option(help="A file that gets one JSON line an attempt.")] = None,
    as_json: Json = False,
) -> None:
    """Make faults strike real trainings on this machine and hold the result to the undisturbed one."""
    from pipelines import drills

    if list_:
        rows = drills.listing()
        lines = [f"{row['name']:<20} {row['does']}; must hold: {row['holds']}" for row in rows]
        _say(rows, as_json, "\n".join(lines))
        return
    found = drills.run(names or (), repeat, short, log, say=lambda text: typer.echo(text, err=as_json))
    if as_json:
        typer.echo(json.dumps(found, indent=1, sort_keys=True))
    if not all(attempt["passed"] for attempt in found):
        raise typer.Exit(1)


@app.command(rich_help_panel=CLUSTER)
def sweep(
    hours: Annotated[float, typer.Option(min=0.0, help="Only what is older.")] = 24.0,
    dry: Annotated[bool, typer.Option(help="Only say what would be removed.")] = False,
    as_json: Json = False,
) -> None:
    """Remove from cluster.storage what unfinished writers left: uploads, temporaries, folders without a manifest."""
    from dataclasses import asdict

    from pipelines import storage

    where = storage.place(_params().cluster.store)
    found = (storage.abandoned if dry else storage.sweep)(where, hours * 3600)
    words = "\n".join(f"{each.kind:<10} {each.name}" for each in found) or "nothing was left"
    _say([asdict(each) for each in found], as_json, words)


@app.command(rich_help_panel=CLUSTER)
def submit(
    stage: Annotated[str, typer.Argument(help="train, extractor or tune.")],
    key: Annotated[str, typer.Argument(help="A key of `runs`, `tuned`, `extractors` or `searches`.")],
    as_json: Json = False,
) -> None:
    """Start a stage as a job on the cluster and return; the stage itself, run later, fetches the result."""
    from pipelines.cluster import submission
    from pipelines.stages import train as training
    from pipelines.stages import tune as tuning

    params = _params()
    known = {"train": params.keys, "extractor": tuple(params.extractors), "tune": tuple(params.searches)}
    if stage not in known:
        raise ValueError(f"stage {stage!r}; expected one of {', '.join(known)}")
    _key({"train": "runs", "extractor": "extractors", "tune": "searches"}[stage], key, known[stage])
    if stage == "tune":
        work = tuning.work_of(key, params)
    else:
        run = params.extractors[key] if stage == "extractor" else training.resolve(key, params)
        work = training.work_of(run, training.job_of(run, params), stage, params)
    id = submission.submit(work, params)
    _say({"id": id, "digest": work.digest}, as_json, id)


@app.command(rich_help_panel=CLUSTER)
def jobs(as_json: Json = False) -> None:
    """List the cluster's jobs of this project, newest first."""
    from pipelines.cluster import submission

    rows = submission.listing(_params().cluster)
    lines = [f"{row['state']:<10} {row['seconds'] or 0:>9.1f} s  {row['run']:<20} {row['id']}" for row in rows]
    _say(rows, as_json, "\n".join(lines) or "no jobs")


Job = Annotated[str, typer.Argument(help="A job's id, its beginning, or its run.")]


@app.command(rich_help_panel=CLUSTER)
def logs(job: Job, follow: Annotated[bool, typer.Option("--follow", "-f", help="Until it ends.")] = False) -> None:
    """Show a job's log."""
    from pipelines.cluster import submission

    submission.logs(_params().cluster, job, follow, lambda text: typer.echo(text, nl=False))


@app.command(rich_help_panel=CLUSTER)
def cancel(job: Job) -> None:
    """Stop a job; its checkpoints stay, so that the same stage resumes it."""
    from pipelines.cluster import submission

    typer.echo(submission.cancel(_params().cluster, job))


# ---- stages


@app.command(rich_help_panel=STAGES)
def prepare(dataset: Annotated[str, typer.Argument(help="A key of `datasets`.")]) -> None:
    """Raw bytes -> data/<dataset>/: parquet shards and a manifest."""
    from pipelines import paths
    from pipelines.data.prepare import prepare as run

    params = _params()
    _key("datasets", dataset, params.datasets)
    manifest = run(params.datasets[dataset], paths.data(dataset), params.cluster)
    typer.echo(f"{dataset}: {dict(manifest.rows)} rows of {manifest.kind} {list(manifest.shape)}")


@app.command(rich_help_panel=STAGES)
def encode(codes: Annotated[str, typer.Argument(help="A key of `codes`.")]) -> None:
    """A run with codes and its dataset -> data/<codes>/: every row as codes, and the decoder beside them."""
    from pipelines import paths
    from pipelines.data import shards
    from pipelines.stages.encode import encode_stage

    params = _params()
    _key("codes", codes, params.codes)
    manifest = encode_stage(codes, paths.data(codes), params)
    whole = shards.read_manifest(paths.data(params.codes[codes].dataset)).spec()
    sort = f"codes out of {manifest.levels}" if manifest.levels else "real codes"
    sizes = f"{manifest.spec().dims} for the {whole.dims} values of an example"
    typer.echo(f"{codes}: {dict(manifest.rows)} rows of {list(manifest.shape)} {sort}, {sizes}")


@app.command(rich_help_panel=STAGES)
def extractor(
    dataset: Annotated[str, typer.Argument(help="A key of `extractors`.")], store_only: StoreOnly = False
) -> None:
    """Train the classifier whose features compare samples, and measure the floor and the ceiling."""
    from pipelines import paths
    from pipelines.stages import train as training
    from pipelines.stages.evaluate import extractor_stage

    params = _params()
    _key("extractors", dataset, params.extractors)
    if store_only:
        training.ensure(params.extractors[dataset], params, "extractor")
        return
    found = extractor_stage(dataset, paths.extractor(dataset), params)
    typer.echo(f"{dataset}: accuracy {found['accuracy']['value']:.3f}, {found['feature_dim']} features")


@app.command(rich_help_panel=STAGES)
def tune(search: Annotated[str, typer.Argument(help="A key of `searches`.")], store_only: StoreOnly = False) -> None:
    """Search a run's parameters with Ray Tune; select on the valid split."""
    from pipelines import paths
    from pipelines.stages.tune import ensure, tune_stage

    params = _params()
    _key("searches", search, params.searches)
    if store_only:
        ensure(search, params)
        return
    best = tune_stage(search, paths.search(search), params)
    typer.echo(f"{search}: {best['chosen']}: {best['parameters'] or 'the run as it is'}")


@app.command(rich_help_panel=STAGES)
def compare(search: Annotated[str, typer.Argument(help="A key of `searches`.")]) -> None:
    """Hold a search's choice against the run as written, over fresh seeds, on the test split."""
    from pipelines import paths
    from pipelines.stages.tune import compare_stage

    params = _params()
    _key("searches", search, params.searches)
    found = compare_stage(search, paths.comparison(search), params)
    for row in found["rows"]:
        typer.echo(f"{row['side']:<11} seed {row['seed']}: {row['metric']} {row['value']:.3f}")


@app.command(rich_help_panel=STAGES)
def train(
    run: Annotated[str, typer.Argument(help="A key of `runs` or `tuned`.")], store_only: StoreOnly = False
) -> None:
    """Train a run with Ray Train; the same command resumes a killed one."""
    from pipelines import paths
    from pipelines.stages import train as stage

    params = _params()
    _key("runs", run, params.keys)
    if store_only:
        stage.ensure(stage.resolve(run, params), params)
        return
    lineage = stage.train(stage.resolve(run, params), paths.artifact(run), params)
    typer.echo(f"{run}: {lineage['steps']} steps, digest {lineage['run_digest'][:12]}")


@app.command(rich_help_panel=STAGES)
def evaluate(run: Annotated[str, typer.Argument(help="A key of `runs` or `tuned`.")]) -> None:
    """Measure a run against the test split: sample metrics and likelihoods with intervals."""
    from pipelines import paths
    from pipelines.stages.evaluate import evaluate_stage

    params = _params()
    _key("runs", run, params.keys)
    for row in evaluate_stage(run, paths.evaluation(run), params):
        typer.echo(f"{row['metric']:<24} {row['value']:10.4f}  [{row['low']:.4f}, {row['high']:.4f}]  {row['kind']}")


@app.command(rich_help_panel=STAGES)
def register(run: Annotated[str, typer.Argument(help="A key of `runs` or `tuned`.")]) -> None:
    """Make a version of the dataset's registered model; twice makes one."""
    from pipelines import paths, registration

    params = _params()
    _key("runs", run, params.keys)
    receipt = registration.register(
        paths.artifact(run),
        paths.evaluation(run),
        params.dataset_of(run),
        paths.receipt(run),
        uri=params.tracking.where,
    )
    typer.echo(f"{run}: version {receipt['version']} of {receipt['model']}")


@app.command(rich_help_panel=STAGES)
def promote(
    model: Annotated[str | None, typer.Argument(help="The registered model; all datasets' by default.")] = None,
    as_json: Json = False,
) -> None:
    """Move the alias `champion` to the best version, if the gate in params.yaml holds; say why."""
    from dataclasses import asdict

    from pipelines import files, paths, promotion

    params = _params()
    verdicts = {}
    receipts = paths.receipts()
    for name in [model] if model else sorted({files.read_json(path)["model"] for path in receipts}):
        _key("datasets", name, params.datasets)
        verdict = promotion.promote(
            name, params.promotion, receipt=paths.promotion(name), candidates=receipts, uri=params.tracking.where
        )
        files.write_bytes(paths.promotion(name).with_suffix(".verdict.json"), verdict.to_json().encode())
        verdicts[name] = asdict(verdict)
        if not as_json:
            typer.echo(f"{name}: {'promoted' if verdict.passed else 'not promoted'}: {verdict.challenger}")
            for reason in [*verdict.reasons, *verdict.others]:
                typer.echo(f"  {reason}")
    if as_json:
        typer.echo(json.dumps(verdicts, indent=1, sort_keys=True))


@app.command(rich_help_panel=STAGES)
def report() -> None:
    """Write report/index.html: leaderboard, intervals, samples, curves, searches, and why the champion serves."""
    from pipelines import paths
    from pipelines.stages.report import report as run

    _params()
    typer.echo(f"report: {run(paths.report())}")
