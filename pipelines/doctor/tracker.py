"""MLflow: the tracking server, its registry and the root of its artifacts."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from pipelines import tracking
from pipelines.doctor.common import Finding, ask, clock_finding, probe_name, said
from pipelines.doctor.storage import Door, rights
from pipelines.params import Params


def tracking_server(params: Params) -> Iterator[Finding]:
    """The tracker answers, its registry too, and speaks the client's version. Reads only: MLflow's deletes are soft."""
    check, uri = "tracking", params.tracking.where
    database = re.fullmatch(r"sqlite:///([^?]+)(\?.*)?", uri)
    if database and not Path(database[1]).exists():
        yield Finding(check, "ok", f"{uri}: not made yet; the first run makes it")
        return
    mine, theirs, remote = metadata.version("mlflow"), None, uri.startswith(("http://", "https://"))
    down = "start the server (infra/README.md), or correct MLFLOW_TRACKING_URI or tracking.uri"
    if remote:
        try:
            answer = ask(f"{uri.rstrip('/')}/version")
        except OSError as error:  # asked first, in seconds: MLflow's client would try for a long time
            yield Finding(check, "bad", f"{uri} does not answer: {said(error)}", down)
            return
        yield clock_finding("clock (tracking)", answer.skew, answer.trip)
        theirs = answer.text.strip() if answer.status == 200 else None
    try:
        client = tracking.client(uri)
        client.search_experiments(max_results=1)
        client.search_registered_models(max_results=1)
    except Exception as error:  # MLflow's, SQLAlchemy's, requests'
        mend = down + "; 401 or 403: MLFLOW_TRACKING_USERNAME and _PASSWORD, and --allowed-hosts of the server"
        yield Finding(check, "bad", f"{uri}: experiments and models cannot be listed: {said(error)}", mend)
        return
    found = f"{uri}: lists experiments and models; client {mine}"
    found += f", server {theirs or 'does not tell its version'}" if remote else ""
    if theirs and theirs.split(".")[:2] != mine.split(".")[:2]:
        yield Finding(check, "warn", found, "run the server and the clients with one version of MLflow")
    else:
        yield Finding(check, "ok", found)


def artifact_rights(params: Params) -> Iterator[Finding]:
    """A real put, get, list and delete under MLflow's artifact root where clients write to S3 themselves."""
    check, uri = "mlflow artifacts", params.tracking.where
    root = tracking.artifact_root(uri)
    if root is None:
        try:
            ask(uri)
        except OSError:
            yield Finding(check, "unknown", "the tracking server does not answer", "see `tracking`")
            return
        known = tracking.client(uri).search_experiments(max_results=1)
        root = known[0].artifact_location if known else ""
    if not root.startswith("s3://"):
        door = "through the server" if root.startswith("mlflow-artifacts:") else "not on S3"
        yield Finding(check, "ok", f"{root or 'no experiment yet'}: {door}")
        return
    store, name = tracking.artifact_store(root), probe_name()
    with tempfile.TemporaryDirectory(prefix="dgm-doctor-") as folder:
        source, copy = Path(folder, "probe"), Path(folder, "copy")
        copy.mkdir()

        def put(content: bytes) -> None:
            source.write_bytes(content)
            store.log_artifact(str(source), name)

        yield rights(
            Door(
                check,
                root,
                put,
                get=lambda: Path(store.download_artifacts(f"{name}/probe", str(copy))).read_bytes(),
                listed=lambda: bool(store.list_artifacts(name)),
                delete=lambda: store.delete_artifacts(name),
            )
        )
