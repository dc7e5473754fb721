"""Model versions and their receipts: one version per run digest and evaluation, on whatever server there is.

A version holds the artifact's folder, the evaluation's folder and a card; `contents.json` lists the SHA-256 of every
file, and a tag of the version holds the SHA-256 of that list. Nothing here moves an alias: see `promotion`.

What identifies a version is (run digest, SHA-256 of evaluation.json), never its number: numbers differ between
servers. A receipt's number is the one of the server that registered first. `register` leaves a receipt alone that
differs from what it would write in nothing but the number, and `sync` never writes receipts, so that another server
does not make DVC's outs change.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import tracking
from pipelines.files import read_json, write_json
from pipelines.tracking import RUN_DIGEST

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

EVALUATION = "dgm.evaluation_sha256"
CONTENTS = "dgm.contents_sha256"
LEDGER = "dgm.ledger"  # tag of the registered model: the run whose params are the history of promotions
CONTENTS_FILE = "contents.json"
_LINEAGE = ("run", "run_digest", "data_digest", "git_commit", "git_dirty", "dataset", "seed")

_SAMPLER = '''"""Runs where dgm_models is importable: load_model(...).predict(None, params={"n": 16, "seed": 0})."""

import mlflow
import numpy as np
from mlflow.pyfunc import PythonModel


class Sampler(PythonModel):
    def load_context(self, context):
        import dgm_models

        self.method = dgm_models.load(context.artifacts["artifact"])

    def predict(self, context, model_input: np.ndarray, params=None):  # there is no input: pass None
        from dgm_models.sampling import labelled, sample

        params = params or {}
        n, label = int(params.get("n", 16)), int(params.get("label", -1))  # -1: every label in turn
        cond = labelled(self.method, n, None if label < 0 else label)
        return sample(self.method, n, int(params.get("seed", 0)), cond=cond).numpy()


mlflow.models.set_model(Sampler())
'''


# ---------------------------------------------------------------- what is registered


@dataclass(frozen=True)
class Package:
    """A trained run and its evaluation, read and verified: all that a version says, on any server.

    Attributes:
        files: "artifact/..." and "evaluation/..." -> {"bytes": int, "sha256": hex}.
    """

    model: str
    artifact: Path
    evaluation: Path
    spec: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    files: Mapping[str, Mapping[str, Any]]

    @property
    def lineage(self) -> Mapping[str, Any]:
        return self.spec["lineage"]  # type: ignore[no-any-return]

    @property
    def run_digest(self) -> str:
        return str(self.lineage["run_digest"])

    @property
    def evaluation_sha256(self) -> str:
        return str(self.files["evaluation/evaluation.json"]["sha256"])

    @property
    def extractors(self) -> str:
        return ",".join(sorted({row["extractor_sha256"] for row in self.rows if row.get("extractor_sha256")}))

    def tags(self) -> dict[str, str]:
        """The tags of the version, and but for the evaluation's those of the run."""
        lineage = {f"dgm.{name}": str(self.lineage[name]) for name in _LINEAGE}
        own = {"dgm.method": str(self.spec["method"]), "dgm.extractor": self.extractors}
        return {**lineage, **own, EVALUATION: self.evaluation_sha256}

    def receipt(self, version: str) -> dict[str, Any]:
        """What must be known to make the version again elsewhere; all but the number is the same on every server."""
        facts = {name: self.lineage[name] for name in _LINEAGE}
        return {
            "kind": "version",
            "model": self.model,
            "version": version,
            "method": self.spec["method"],
            **facts,
            "evaluation_sha256": self.evaluation_sha256,
            "files": self.files,
            "folders": {"artifact": self.artifact.name, "evaluation": self.evaluation.name},
        }


def read_package(artifact: Path, evaluation: Path, model: str) -> Package:
    """Reads and verifies both folders.

    Raises:
        ValueError: naming the file that is missing, damaged or incomplete.
    """
    from dgm_models.training import checkpoint

    artifact, evaluation = Path(artifact), Path(evaluation)
    checkpoint.verify(artifact)
    spec = read_json(artifact / "spec.json")
    for name in ("method", "data", "lineage"):
        if name not in spec:
            raise ValueError(f"{artifact}/spec.json: {name!r} is missing")
    for name in _LINEAGE:
        if name not in spec["lineage"]:
            raise ValueError(f"{artifact}/spec.json: 'lineage.{name}' is missing")
    rows = read_json(evaluation / "evaluation.json")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "metric" in row for row in rows):
        raise ValueError(f"{evaluation}/evaluation.json: expected a list of rows with a 'metric'")
    files = {**_listing(artifact, "artifact"), **_listing(evaluation, "evaluation")}
    return Package(model, artifact, evaluation, spec, rows, files)


def _listing(folder: Path, prefix: str) -> dict[str, dict[str, Any]]:
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path}: is a link or no plain file")
        if path.is_file():
            name = f"{prefix}/{path.relative_to(folder).as_posix()}"
            found[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- register and sync


def register(
    artifact: Path,
    evaluation: Path,
    model_name: str,
    receipt: Path,
    *,
    experiment: str | None = None,
    uri: str | None = None,
) -> dict[str, Any]:
    """Makes one model version of a run and its evaluation, however often it is called, and writes its receipt.

    Args:
        artifact: `artifacts/<run>`.
        evaluation: `evaluations/<run>`.
        model_name: the registered model; one a dataset.
        receipt: the JSON file to write, whole or not at all.
        experiment: where the training's curves are; by default the model's name.
        uri: the tracker.

    Returns:
        the receipt, with the version's number on this server.

    Raises:
        ValueError: a folder is damaged or incomplete, or the registered model was not made here.
        mlflow.exceptions.MlflowException: the tracker is down; nothing was written to `receipt`.
    """
    package = read_package(artifact, evaluation, model_name)
    version, _ = _put(tracking.client(uri), package, experiment or model_name)
    document = json.loads(json.dumps(package.receipt(str(version.version))))
    if not (receipt.exists() and {**_read_or_empty(receipt), "version": document["version"]} == document):
        write_json(receipt, document)
    return document  # type: ignore[no-any-return]


def _read_or_empty(path: Path) -> dict[str, Any]:
    try:
        document = read_json(path)
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def sync(
    receipts: Iterable[Path], artifacts: Path, evaluations: Path, *, experiment: str | None = None,
    uri: str | None = None,
) -> list[str]:  # fmt: skip
    """Makes a server agree with the receipts: a lost database, another server, a fresh clone.

    Missing versions are made again in the order of their numbers, damaged ones are uploaded again. A promotion
    receipt's history is appended to the server's ledger if it continues it, and the aliases follow the ledger. A ledger
    that tells another story is left alone: its promotions passed a gate that this receipt knows nothing of.

    Args:
        receipts: files written by `register`, `promote` and `rollback`, in any order.
        artifacts, evaluations: the folders that hold the runs' folders.
        experiment, uri: as `register`.

    Returns:
        one line for each thing done, or not done and why; empty when all agreed.
    """
    from pipelines import promotion  # above this module: it ranks what this one registers

    documents = [read_receipt(path) for path in receipts]
    made = [each for each in documents if each["kind"] == "version"]
    mlflow = tracking.client(uri)
    done = []
    for each in sorted(made, key=lambda each: (each["model"], int(each["version"]))):
        folders = (artifacts / each["folders"]["artifact"], evaluations / each["folders"]["evaluation"])
        title = f"{each['model']}: run {each['run']}"
        try:
            package = read_package(*folders, each["model"])
        except ValueError as error:
            done.append(f"{title}: not done: {error}")
            continue
        other = sorted(
            name for name in {*package.files, *each["files"]} if package.files.get(name) != each["files"].get(name)
        )
        if other:
            done.append(f"{title}: not done: {', '.join(other)} differ(s) from the receipt")
            continue
        version, what = _put(mlflow, package, experiment or each["model"])
        if what:
            done.append(f"{title}: version {version.version} {what}")
    promoted = [each for each in documents if each["kind"] == "promotion"]
    for each in sorted(promoted, key=lambda each: len(each["history"])):
        done += promotion.follow(mlflow, each)
    for model in sorted({each["model"] for each in documents}):
        try:
            done += promotion.settle(mlflow, model)
        except ValueError as error:
            done.append(f"{model}: aliases not done: {error}")
    return done


def read_receipt(path: Path) -> dict[str, Any]:
    """A receipt of either kind.

    Raises:
        ValueError: the file is no receipt.
    """
    document = read_json(path)
    if not isinstance(document, dict) or document.get("kind") not in ("version", "promotion"):
        raise ValueError(f"{path}: is no receipt of a version or a promotion")
    return document


def _put(mlflow: MlflowClient, package: Package, experiment: str) -> tuple[ModelVersion, str]:
    """The version of a package and what was done for it: "" when it was there and whole."""
    ledger_run(mlflow, package.model, create=True)
    found = find(mlflow, package.model, package.run_digest, package.evaluation_sha256)
    if found and _is_whole(mlflow, found):
        return found, ""
    lineage = package.lineage
    run_tags = {name: value for name, value in package.tags().items() if name != EVALUATION}
    run = tracking.digest_run(mlflow, experiment, package.run_digest, str(lineage["run"]), run_tags)
    run_id, path = str(run.info.run_id), f"versions/{package.evaluation_sha256[:16]}"
    if found and found.run_id:
        run_id = str(found.run_id)
    _log_run(mlflow, run_id, package, run_tags)
    with tempfile.TemporaryDirectory(prefix="dgm-register-") as work:
        folder, contents = _stage(package, Path(work))
        mlflow.log_artifacts(run_id, str(folder), artifact_path=path)
    tags = {**package.tags(), CONTENTS: contents}
    source = f"{mlflow.get_run(run_id).info.artifact_uri}/{path}"
    found = found or _untagged(mlflow, package.model, source)
    if found:
        for name, value in tags.items():
            mlflow.set_model_version_tag(package.model, str(found.version), name, value)
        return mlflow.get_model_version(package.model, str(found.version)), "mended"
    text = f"{package.spec['method']} on {lineage['dataset']}, run {lineage['run']}"
    made = mlflow.create_model_version(package.model, source, run_id, tags=tags, description=text)
    first = find(mlflow, package.model, package.run_digest, package.evaluation_sha256)
    assert first is not None
    if int(first.version) != int(made.version):  # two registered at once: the lower number stays
        mlflow.delete_model_version(package.model, str(made.version))
    return first, "created"


def ledger_run(mlflow: MlflowClient, model: str, create: bool = False) -> str:
    """The id of the run whose params are the model's history of promotions.

    The registered model carries it from birth: creating a model by name is atomic in every store, so that of several
    first registrations one decides which run it is, and a stop in between leaves no model without a ledger.

    Raises:
        ValueError: there is no such model, or it was not made by `register`.
    """
    from mlflow.exceptions import MlflowException

    if not re.fullmatch(r"[\w.-]+", model):
        raise ValueError(f"model: {model!r} is no name of letters, digits, '_', '-' and '.'")
    for _ in range(2):
        try:
            tags = mlflow.get_registered_model(model).tags
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        else:
            if LEDGER not in tags:
                raise ValueError(f"the registered model {model!r} was not made by `register` (it has no tag {LEDGER})")
            return str(tags[LEDGER])
        if not create:
            raise ValueError(f"there is no registered model {model!r}: register a run first")
        place = tracking.experiment_id(mlflow, f"{model}/promotions")
        run_id = mlflow.create_run(place, run_name="promotions", tags={"dgm.model": model}).info.run_id
        mlflow.set_terminated(run_id)
        try:
            mlflow.create_registered_model(model, tags={LEDGER: run_id})
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            mlflow.delete_run(run_id)
    raise ValueError(f"the registered model {model!r} is deleted and created by others all the time")


def versions(mlflow: MlflowClient, model: str) -> list[ModelVersion]:
    """The versions that `register` made, in the order of their numbers."""
    needed = {RUN_DIGEST, EVALUATION, CONTENTS, "dgm.run"}
    return [each for each in _all_versions(mlflow, model) if needed <= set(each.tags)]


def find(mlflow: MlflowClient, model: str, run_digest: str, evaluation_sha256: str) -> ModelVersion | None:
    """The version of a run and an evaluation; of several the one with the lowest number."""
    for each in versions(mlflow, model):
        if (each.tags[RUN_DIGEST], each.tags[EVALUATION]) == (run_digest, evaluation_sha256):
            return each
    return None


def _all_versions(mlflow: MlflowClient, model: str) -> list[ModelVersion]:
    found, token = [], None
    while True:
        page = mlflow.search_model_versions(f"name='{model}'", page_token=token)
        found += list(page)
        token = page.token
        if not token:
            return sorted(found, key=lambda each: int(each.version))


def _untagged(mlflow: MlflowClient, model: str, source: str) -> ModelVersion | None:
    """A version with our files but without its tags: whoever made it was stopped before it could set them."""
    from mlflow.exceptions import MlflowException

    for each in _all_versions(mlflow, model):
        if each.source == source and CONTENTS not in each.tags:
            try:  # one that is being deleted is listed without tags, too
                again = mlflow.get_model_version(model, str(each.version))
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
            else:
                if CONTENTS not in again.tags:
                    return again
    return None


def _is_whole(mlflow: MlflowClient, version: ModelVersion) -> bool:
    with tempfile.TemporaryDirectory(prefix="dgm-check-") as work:
        try:
            _contents(mlflow, version, Path(work))
        except ValueError:
            return False
    return True


def _log_run(mlflow: MlflowClient, run_id: str, package: Package, tags: Mapping[str, str]) -> None:
    """Curves, final metrics and tags on the training's run, as far as they are not there."""
    from mlflow.entities import Metric, RunTag

    curves = [json.loads(line) for line in _lines(package.artifact / "metrics.jsonl")]
    tracking.send_rows(mlflow, run_id, curves, gaps=True)
    run = mlflow.get_run(run_id)
    if not run.data.params:
        tracking.send_params(mlflow, run_id, {"method": package.spec["method"], **package.spec.get("params", {})})
    step = max((int(row["step"]) for row in curves), default=0)
    now = int(run.info.start_time)
    finals = {name: value for name, value in final_metrics(package.rows).items() if run.data.metrics.get(name) != value}
    items = [Metric(name, value, now, step) for name, value in finals.items()]
    mlflow.log_batch(run_id, metrics=items, tags=[RunTag(name, value) for name, value in tags.items()])
    if run.info.status == "RUNNING":  # a training whose end the tracker missed
        mlflow.set_terminated(run_id)


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()] if path.exists() else []


def final_metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`<metric>`, `<metric>.low` and `<metric>.high`; `<metric>/<split>` where one metric has several rows."""
    often = Counter(row["metric"] for row in rows)
    found = {}
    for row in rows:
        name = row["metric"] if often[row["metric"]] == 1 else f"{row['metric']}/{row.get('split')}"
        for key, end in (("value", ""), ("low", ".low"), ("high", ".high")):
            if row.get(key) is not None:
                found[name + end] = float(row[key])
    return found


# ---------------------------------------------------------------- the version's files


def _stage(package: Package, work: Path) -> tuple[Path, str]:
    """The folder that is uploaded and the SHA-256 of its list of contents."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.pyfunc import save_model
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    (work / "sampler.py").write_text(_SAMPLER, encoding="utf-8")
    for name, folder in (("artifact", package.artifact), ("evaluation", package.evaluation)):
        shutil.copytree(folder, work / name)
    levels, shape = package.spec["data"].get("levels"), package.spec["data"]["shape"]
    stored = np.dtype("float32" if levels is None else "uint8" if levels <= 256 else "int32")
    signature = ModelSignature(
        outputs=Schema([TensorSpec(stored, (-1, *shape))]),
        params=ParamSchema([ParamSpec("n", "long", 16), ParamSpec("seed", "long", 0), ParamSpec("label", "long", -1)]),
    )
    folder = work / "model"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it wants type hints and an input example; there is no input
        save_model(
            str(folder),
            python_model=str(work / "sampler.py"),
            artifacts={name: str(work / name) for name in ("artifact", "evaluation")},
            signature=signature,
            pip_requirements=_requirements(),  # inferring them would cost 6 s
        )
    (folder / "card.md").write_text(card(package), encoding="utf-8")
    listing = {
        **_listing(folder / "artifacts" / "artifact", "artifact"),
        **_listing(folder / "artifacts" / "evaluation", "evaluation"),
    }
    changed = [name for name in package.files if listing.get(name) != package.files[name]]
    if changed or len(listing) != len(package.files):
        raise ValueError(f"{package.artifact}, {package.evaluation}: changed while being registered: {changed}")
    listing["card.md"] = {"bytes": (folder / "card.md").stat().st_size, "sha256": _sha256(folder / "card.md")}
    write_json(folder / CONTENTS_FILE, listing)
    return folder, _sha256(folder / CONTENTS_FILE)


def _requirements() -> list[str]:
    from importlib.metadata import version

    names = ("mlflow", "torch", "numpy", "safetensors")
    return [f"{name}=={version(name).split('+')[0]}" for name in names]


def card(package: Package) -> str:
    """The model card: what the files say and nothing else."""
    spec, lineage = package.spec, package.lineage
    curves = [json.loads(line) for line in _lines(package.artifact / "metrics.jsonl")]
    lines = [f"# {lineage['run']}: {spec['method']} on {lineage['dataset']}", "", "## Method", ""]
    lines += [f"- method: `{spec['method']}`"]
    lines += [f"- {name}: `{json.dumps(value, sort_keys=True)}`" for name, value in spec.get("params", {}).items()]
    lines += ["", "## Data", ""]
    lines += [f"- {name}: `{json.dumps(value)}`" for name, value in spec["data"].items()]
    lines += ["", "## Training", "", f"- seed: {lineage['seed']}"]
    if curves:
        last = ", ".join(f"{name} {value:.4g}" for name, value in curves[-1]["metrics"].items())
        lines += [f"- last logged step: {curves[-1]['step']} ({last})"]
    lines += ["", "## Results", "", "| metric | value | interval | n | unit | kind | split |", "|" + "---|" * 7]
    for row in package.rows:
        ends = [row.get("low"), row.get("high")]
        interval = "" if None in ends else f"[{ends[0]:.4g}, {ends[1]:.4g}]"
        value = "" if row.get("value") is None else f"{row['value']:.4g}"
        cells = (row["metric"], value, interval, *(row.get(name, "") for name in ("n", "unit", "kind", "split")))
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    lines += ["", "## Lineage", ""] + [f"- {name}: `{lineage[name]}`" for name in _LINEAGE]
    lines += [f"- extractor: `{name}`" for name in package.extractors.split(",") if name]
    lines += ["", "## Limits", ""] + [f"- {text}" for text in _limits(package)]
    return "\n".join(lines) + "\n"


def _limits(package: Package) -> list[str]:
    rows = package.rows
    found = []
    if package.lineage["git_commit"] is None:
        found.append("The commit of the code is not known.")
    if package.lineage["git_dirty"]:
        found.append("The code was not exactly that of the commit: there were changes that were not committed.")
    if package.extractors:
        found.append("Feature metrics compare only at the same extractor, the same n and the same data.")
    for kind, text in (("bound", "a bound, not the value itself"), ("estimate", "an estimate")):
        names = sorted({row["metric"] for row in rows if row.get("kind") == kind})
        if names:
            found.append(f"{', '.join(names)}: {text}.")
    bare = sorted({row["metric"] for row in rows if row.get("low") is None and row.get("kind") != "exact"})
    if bare:
        found.append(f"{', '.join(bare)}: without an interval.")
    other = sorted({str(row["split"]) for row in rows if row.get("split") not in (None, "test")})
    if other:
        found.append(f"Some rows were measured on {', '.join(other)}, not on test.")
    return found or ["The files name none."]


# ---------------------------------------------------------------- fetching without running anything


def fetch(uri: str, into: Path, *, part: str = "artifact", tracker: str | None = None) -> Path:
    """Downloads a version's artifact, verifies every file, and runs no code of the registry.

    MLflow's own `load_model` runs what it finds in the registry; this reads bytes, and `dgm_models.load(folder)` reads
    safetensors and JSON.

    Args:
        uri: models:/<name>@<alias> or models:/<name>/<number>.
        into: the folder to make; one that holds this very artifact already is left as it is.
        part: "artifact" or "evaluation".
        tracker: the MLflow server's URI.

    Returns:
        `into`.

    Raises:
        ValueError: the URI names no version, a file differs from its SHA-256, or `into` holds something else.
    """
    if part not in ("artifact", "evaluation"):
        raise ValueError(f"part: {part!r} is neither 'artifact' nor 'evaluation'")
    mlflow = tracking.client(tracker)
    return fetch_part(mlflow, resolve(mlflow, uri), part, Path(into))


def resolve(mlflow: MlflowClient, uri: str) -> ModelVersion:
    """The version that `models:/name@alias` or `models:/name/number` means.

    Raises:
        ValueError: it means none.
    """
    from mlflow.exceptions import MlflowException

    match = re.fullmatch(r"models:/([^/@:]+)(?:@([\w-]+)|/(\d+))", uri)
    if not match or match[2] == "latest":  # MLflow answers to @latest, which is no alias but the highest number
        raise ValueError(f"{uri!r}: expected models:/<name>@<alias> or models:/<name>/<number>")
    name, alias, number = match.groups()
    try:
        return mlflow.get_model_version_by_alias(name, alias) if alias else mlflow.get_model_version(name, number)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise ValueError(f"{uri}: there is no such version ({error.message})") from error
        raise


def fetch_part(mlflow: MlflowClient, version: ModelVersion, part: str, into: Path) -> Path:
    """Downloads and verifies the folder "artifact" or "evaluation" of a version; see `fetch`."""
    into.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{into.name}.", dir=into.parent) as work:
        listing = _contents(mlflow, version, Path(work))
        wanted = {name: facts for name, facts in listing.items() if name.startswith(f"{part}/")}
        if into.exists():
            if _listing(into, part) != wanted:
                raise ValueError(f"{into}: holds something else than {version.name} version {version.version}")
            return into
        folder = _download(mlflow, version, f"artifacts/{part}", Path(work))
        found = _listing(folder, part)
        for name in sorted({*found, *wanted}):
            if found.get(name) != wanted.get(name):
                what = "missing" if name not in found else "not listed" if name not in wanted else "changed"
                raise ValueError(f"{version.name} version {version.version}: {name} is {what}")
        if part == "artifact":
            from dgm_models.training import checkpoint

            checkpoint.verify(folder)
        os.replace(folder, into)
    return into


def fetch_documents(mlflow: MlflowClient, version: ModelVersion, *names: str) -> list[Any]:
    """Verified JSON files of a version, such as "evaluation/evaluation.json"."""
    found = []
    with tempfile.TemporaryDirectory(prefix="dgm-fetch-") as work:
        listing = _contents(mlflow, version, Path(work))
        for name in names:
            path = _download(mlflow, version, f"artifacts/{name}", Path(work) / "files")
            if name not in listing or _sha256(path) != listing[name]["sha256"]:
                raise ValueError(f"{version.name} version {version.version}: {name} is changed or not listed")
            found.append(read_json(path))
    return found


def _contents(mlflow: MlflowClient, version: ModelVersion, work: Path) -> dict[str, dict[str, Any]]:
    if CONTENTS not in version.tags:
        raise ValueError(f"{version.name} version {version.version}: was not made by `register` (no tag {CONTENTS})")
    path = _download(mlflow, version, CONTENTS_FILE, work)
    if _sha256(path) != version.tags[CONTENTS]:
        raise ValueError(f"{version.name} version {version.version}: {CONTENTS_FILE} is changed")
    return read_json(path)  # type: ignore[no-any-return]


def _download(mlflow: MlflowClient, version: ModelVersion, path: str, into: Path) -> Path:
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    into.mkdir(parents=True, exist_ok=True)
    try:
        found = download_artifacts(
            artifact_uri=f"{version.source}/{path}", dst_path=str(into), tracking_uri=mlflow.tracking_uri
        )
    except (MlflowException, OSError) as error:
        raise ValueError(f"{version.name} version {version.version}: {path} cannot be read ({error})") from error
    return Path(found)
