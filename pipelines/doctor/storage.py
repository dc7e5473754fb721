"""The run store and the DVC remote: every right proved by doing, and the clocks of their endpoints."""

from __future__ import annotations

import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipelines import paths
from pipelines.doctor.common import (
    ANSWER_S,
    Finding,
    clock_finding,
    default_remote,
    dvc_config,
    existing,
    probe_name,
    said,
    skew_of,
)
from pipelines.params import Params
from pipelines.storage import endpoint, place


@dataclass(frozen=True)
class Door:
    """One way into a bucket, by one small object.

    Attributes:
        check: the finding's name.
        where: the address.
        put: writes these bytes as the object.
        get: reads them.
        listed: whether a list has the object.
        delete: removes it.
        conditional: writes under conditions, and raises when they are not obeyed; None where nothing depends on it.
        advice: where this way's own settings are.
    """

    check: str
    where: str
    put: Callable[[bytes], Any]
    get: Callable[[], bytes]
    listed: Callable[[], bool]
    delete: Callable[[], Any]
    conditional: Callable[[], Any] | None = None
    advice: str = ""


def rights(door: Door) -> Finding:
    """Does one thing after the other with the object; the first that fails names the right that it needs."""
    content = uuid.uuid4().bytes

    def get() -> None:
        if door.get() != content:
            raise OSError("other bytes came back than were sent: do not keep anything there")

    def listed() -> None:
        if not door.listed():
            raise OSError("what was written is not in the list")

    acts = [("put", "s3:PutObject", lambda: door.put(content)), ("get", "s3:GetObject", get)]
    if door.conditional:
        right = "s3:PutObject and an endpoint that obeys If-None-Match and If-Match"
        acts.append(("conditional put", right, door.conditional))
    acts += [("list", "s3:ListBucket", listed), ("delete", "s3:DeleteObject", door.delete)]
    done = []
    try:
        for act, right, do in acts:
            try:
                do()
            except Exception as error:  # every client has exceptions of its own
                advice = f"; {door.advice}" if door.advice else ""
                mend = f"{act} needs {right} on {door.where}{advice}"
                return Finding(door.check, "bad", f"{door.where}: {act} failed: {said(error)}", mend)
            done.append(act)
    finally:
        if done and "delete" not in done:
            with suppress(Exception):  # without the right to delete it stays, and the finding says so
                door.delete()
    return Finding(door.check, "ok", f"{door.where}: {', '.join(done)}")


@contextmanager
def _short_patience() -> Iterator[None]:
    """A place tries for two minutes; here a few seconds must do."""
    before = os.environ.get("DGM_STORAGE_PATIENCE")
    os.environ["DGM_STORAGE_PATIENCE"] = "3"
    try:
        yield
    finally:
        os.environ.pop("DGM_STORAGE_PATIENCE")
        if before is not None:
            os.environ["DGM_STORAGE_PATIENCE"] = before


def storage_rights(params: Params) -> Iterator[Finding]:
    """A real put, get, conditional put, list and delete under cluster.storage."""
    check, uri, name = "storage rights", params.cluster.store, probe_name()
    if "://" not in uri:
        yield _folder_rights(check, Path(uri), "cluster.storage")
        return
    with _short_patience():
        there = place(uri)

        def conditional() -> None:
            with suppress(FileExistsError):
                there.write_new(name, b"second")
                raise OSError("a write with If-None-Match replaced what was there: two writers would lose each other's")
            there.swap(name, *there.read_versioned(name))

        def listed() -> bool:
            return [entry.name for entry in there.list(name)] == [name]

        def delete() -> None:
            there.delete(name)
            with suppress(FileNotFoundError):
                there.read(name)
                raise OSError("it is still there after it was deleted")

        def get() -> bytes:
            return there.read(name)

        yield rights(Door(check, uri, lambda content: there.write(name, content), get, listed, delete, conditional))


def _folder_rights(check: str, folder: Path, key: str) -> Finding:
    there = existing(folder)
    try:
        with tempfile.NamedTemporaryFile(prefix="dgm-doctor-", dir=there) as file:
            file.write(b"probe")
    except OSError as error:
        return Finding(check, "bad", f"{folder}: cannot be written ({said(error)})", f"chown it, or change {key}")
    return Finding(check, "ok", f"{folder}: a folder, writable" + ("" if there == folder else " (not made yet)"))


def dvc_rights(params: Params) -> Iterator[Finding]:
    """A real put, get, list and delete in DVC's default remote, through DVC's own client and settings."""
    check, default = "dvc remote rights", default_remote()
    if default is None:
        yield Finding(check, "ok", "no default remote")
        return
    name, url = default[0], str(default[1]["url"])
    if not url.startswith("s3://"):
        if "://" in url:
            yield Finding(check, "unknown", f"{url}: only s3:// and folders are probed", "`dvc push` shows it")
        else:
            yield _folder_rights(check, paths.root() / ".dvc" / url, f"the url of remote {name}")
        return
    from dvc.fs import get_cloud_fs  # type: ignore[import-untyped, unused-ignore]

    kind, settings, path = get_cloud_fs(dvc_config(), name=name)
    remote = kind(**{"connect_timeout": ANSWER_S, "read_timeout": ANSWER_S, **settings}).fs
    target = f"{path}/{probe_name()}"

    def listed() -> bool:
        remote.invalidate_cache()
        return any(each.endswith(target) for each in remote.find(path, prefix=Path(target).name))

    yield rights(
        Door(
            check,
            url,
            put=lambda content: remote.pipe_file(target, content),
            get=lambda: remote.cat_file(target),
            listed=listed,
            delete=lambda: remote.rm_file(target),
            advice=f"`dvc remote modify --local {name}` holds its endpointurl, profile and keys",
        )
    )


def s3_clock(params: Params) -> Iterator[Finding]:
    """The clocks of the S3 endpoints in use, by the Date header of an unsigned request: refusals have one too."""
    used: dict[str | None, str] = {}
    if params.cluster.storage.startswith("s3://"):
        used[endpoint()] = params.cluster.storage
    _, remote = default_remote() or ("", {})
    if str(remote.get("url", "")).startswith("s3://"):
        used.setdefault(remote.get("endpointurl") or endpoint(), str(remote["url"]))
    if not used:
        yield Finding("clock (S3)", "ok", "no s3:// in use")
    for server, uri in used.items():
        yield _s3_clock(server, urlsplit(uri).netloc)


def _s3_clock(server: str | None, bucket: str) -> Finding:
    import boto3  # type: ignore[import-untyped, unused-ignore]
    from botocore import UNSIGNED  # type: ignore[import-untyped, unused-ignore]
    from botocore.config import Config  # type: ignore[import-untyped, unused-ignore]
    from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped, unused-ignore]

    check = "clock (S3)" if server is None else f"clock ({urlsplit(server).netloc.rpartition('@')[2]})"
    config = Config(
        signature_version=UNSIGNED,
        connect_timeout=ANSWER_S,
        read_timeout=ANSWER_S,
        retries={"total_max_attempts": 1},
        s3={"addressing_style": "path" if server else "auto"},
    )
    client = boto3.session.Session().client("s3", config=config, endpoint_url=server)
    before = time.time()
    try:
        answer = client.head_bucket(Bucket=bucket)
    except ClientError as error:
        answer = error.response
    except BotoCoreError as error:
        mend = "is the endpoint up, and AWS_ENDPOINT_URL right?"
        return Finding(check, "bad", f"no answer: {said(error)}", mend)
    after = time.time()
    date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
    return clock_finding(check, skew_of(date, before, after), after - before)
