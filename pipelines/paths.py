"""The only place that spells a path of the project. Everything is relative to the project's root."""

from __future__ import annotations

import os
from pathlib import Path


def root() -> Path:
    """The nearest folder upwards that holds params.yaml, or DGM_ROOT.

    Raises: ValueError outside a project.
    """
    if os.environ.get("DGM_ROOT"):
        return Path(os.environ["DGM_ROOT"]).resolve()
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "params.yaml").is_file():
            return folder
    raise ValueError(f"{here}: no params.yaml here or above; change to the project's folder or set DGM_ROOT")


def code() -> Path:
    """The folder of the code that runs: where `dgm_models` and `pipelines` lie."""
    return Path(__file__).parents[1]


ZOO = "zoo/"  # a run of zoo/params.yaml is called zoo/<key>; its outputs lie under zoo/, apart from the root's graph


def _of(kind: str, run: str) -> Path:
    return root() / "zoo" / kind / run.removeprefix(ZOO) if run.startswith(ZOO) else root() / kind / run


def runs() -> list[str]:
    """Every evaluated run, the zoo's too, sorted."""
    found = []
    for prefix, folder in (("", root() / "evaluations"), (ZOO, root() / "zoo" / "evaluations")):
        if folder.is_dir():
            found += [f"{prefix}{path.name}" for path in folder.iterdir() if path.is_dir() and path.name[0] != "."]
    return sorted(found)


def receipts() -> list[Path]:
    """The receipts of all versions, the zoo's too."""
    return sorted([*(root() / "receipts").glob("*.json"), *(root() / "zoo" / "receipts").glob("*.json")])


def data(dataset: str) -> Path:
    return root() / "data" / dataset


def decoder(codes: str) -> Path:
    """What made a dataset of codes, and turns codes into data: an artifact."""
    return data(codes) / "decoder"


def extractor(dataset: str) -> Path:
    return root() / "extractors" / dataset


def artifact(run: str) -> Path:
    return _of("artifacts", run)


def samples(run: str) -> Path:
    return _of("samples", run)


def evaluation(run: str) -> Path:
    return _of("evaluations", run)


def receipt(run: str) -> Path:
    return _of("receipts", f"{run}.json")


def search(key: str) -> Path:
    return root() / "searches" / key


def comparison(key: str) -> Path:
    return root() / "comparisons" / f"{key}.json"


def promotion(dataset: str) -> Path:
    return root() / "promotions" / f"{dataset}.json"


def report() -> Path:
    return root() / "report"


def scratch() -> Path:
    """What is no output: spools, logs, local run stores."""
    return root() / ".dgm"


def ticket() -> Path:
    """What a job's submitter knows and the cluster cannot; there inside of a job alone."""
    return root() / "job.json"


def params_files() -> tuple[Path, ...]:
    """params.yaml, and the zoo's where there is one."""
    files = (root() / "params.yaml", root() / "zoo" / "params.yaml")
    return tuple(file for file in files if file.is_file())


def code_of(method_file: str) -> tuple[str, ...]:
    """What a run's code is, for its digest; dvc.yaml names the same: a test compares them."""
    return (
        method_file,
        "dgm_models/nn",
        "dgm_models/ops",
        "dgm_models/training",
        "dgm_models/codecs.py",
        "dgm_models/conditions.py",
        "dgm_models/noise.py",
        "dgm_models/objective.py",
        "dgm_models/protocols.py",
    )
