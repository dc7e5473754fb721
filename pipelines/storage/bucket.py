"""A place that is a prefix in a bucket: a PUT is whole by itself, conditions decide between writers."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

from pipelines.storage.folder import whole
from pipelines.storage.interface import MANIFEST, OURS, Changed, Entry, Leftover, Place, StorageError, clean, for_each
from pipelines.storage.s3 import PARTS_AT_ONCE, Short, client, judge, persist

log = logging.getLogger("dgm.storage")
T = TypeVar("T")

PART = 16 << 20  # bytes; a larger file goes in parts of this size
PART_ATTEMPTS = 5  # of boto3, for a part of a file: a fault in one must not repeat the others
UNFINISHED = ".unfinished"  # stands in a folder on S3 from the first byte of `put_folder` until its manifest is there
WRITE_ID = "dgm-write"  # object metadata: which call wrote it


class Bucket(Place):
    """A place that is s3://bucket/prefix."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket, self.prefix = bucket, prefix
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")

    def _key(self, name: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": f"{self._root}{clean(name)}"}

    @property
    def _root(self) -> str:
        return f"{self.prefix}/" if self.prefix else ""

    def _do(self, name: str, operation: str, action: Callable[[], T]) -> T:
        return persist(f"{self.uri}/{name}" if name else self.uri, operation, action)

    def at(self, name: str) -> Place:
        return Bucket(self.bucket, f"{self._root}{clean(name)}")

    def _objects(self, prefix: str) -> Sequence[Any]:
        def listed() -> Sequence[Any]:
            pages = client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self._root + prefix)
            return [each for page in pages for each in page.get("Contents", ())]

        return self._do(prefix, "list", listed)

    def list(self, prefix: str = "") -> list[Entry]:
        found = [
            Entry(each["Key"].removeprefix(self._root), each["Size"], each["LastModified"].timestamp(), each["ETag"])
            for each in self._objects(prefix)
            if not each["Key"].endswith("/")  # the folders that consoles make
        ]
        found = [entry for entry in found if not OURS.fullmatch(entry.name.rpartition("/")[2])]
        return sorted(found, key=lambda entry: entry.name)

    def read_versioned(self, name: str) -> tuple[bytes, str]:
        def read() -> tuple[bytes, str]:
            answer = client().get_object(**self._key(name))
            with closing(answer["Body"]) as body:  # as a context manager it would give a stream that checks nothing
                content = body.read()  # botocore holds it to the checksum header when there is one
            if len(content) != answer["ContentLength"]:
                raise Short(f"{len(content)} bytes arrived, {answer['ContentLength']} were announced")
            return content, str(answer["ETag"])

        return self._do(name, "read", read)

    def write(self, name: str, content: bytes) -> str:
        def write() -> str:
            return str(client().put_object(**self._key(name), Body=content, ChecksumAlgorithm="SHA256")["ETag"])

        return self._do(name, "write", write)

    def _write_if(self, name: str, content: bytes, condition: dict[str, str]) -> str | None:
        """The new version, or None when the condition did not hold.

        A PUT that was applied and answered 500 is repeated and gets 412. So every call signs its object with
        an id, and a 412 is a loss only when the object carries another's.
        """
        from botocore.exceptions import ClientError  # type: ignore[import-untyped, unused-ignore]

        mine = uuid.uuid4().hex

        def write() -> str | None:
            try:
                answer = client().put_object(
                    **self._key(name), Body=content, ChecksumAlgorithm="SHA256", Metadata={WRITE_ID: mine}, **condition
                )
                return str(answer["ETag"])
            except ClientError as error:
                verdict = judge(error)
                gone = verdict.code == "NoSuchKey" and "IfMatch" in condition
                if verdict.status != 412 and not gone:
                    raise
            return written()

        def written() -> str | None:
            try:
                facts = client().head_object(**self._key(name))
            except ClientError as error:
                if judge(error).status == 404:
                    return None
                raise
            return str(facts["ETag"]) if facts["Metadata"].get(WRITE_ID) == mine else None

        return self._do(name, "conditional write", write)

    def write_new(self, name: str, content: bytes) -> str:
        version = self._write_if(name, content, {"IfNoneMatch": "*"})
        if version is None:
            raise FileExistsError(f"{self.uri}/{name}: there already")
        return version

    def swap(self, name: str, content: bytes, version: str) -> str:
        new = self._write_if(name, content, {"IfMatch": version})
        if new is None:
            raise Changed(f"{self.uri}/{name}: changed or removed by another writer since it was read; read it again")
        return new

    def get(self, name: str, target: Path) -> None:
        def get() -> None:
            with whole(target) as temporary:
                answer = client().get_object(**self._key(name))
                length = answer["ContentLength"]
                with closing(answer["Body"]) as body:  # as a context manager it would give a stream that checks nothing
                    if length <= PART:
                        with temporary.open("wb") as file:
                            for chunk in iter(lambda: body.read(1 << 20), b""):
                                file.write(chunk)
                if length > PART:  # in parts, several at once
                    client(PART_ATTEMPTS).download_file(**self._key(name), Filename=str(temporary), Config=_transfer())
                if temporary.stat().st_size != length:
                    raise Short(f"{temporary.stat().st_size} bytes arrived, {length} were announced")

        self._do(name, "get", get)

    def put(self, source: Path, name: str) -> None:
        if not source.is_file():
            raise FileNotFoundError(f"{source}: not there")
        checked = {"ChecksumAlgorithm": "SHA256"}  # the server compares: every part, or the whole

        def put() -> None:
            client(PART_ATTEMPTS).upload_file(str(source), **self._key(name), ExtraArgs=checked, Config=_transfer())

        self._do(name, "put", put)

    def put_folder(self, folder: Path, name: str, last: str = MANIFEST) -> None:
        below = self.at(name)
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        if last not in names:
            raise FileNotFoundError(f"{folder / last}: not there, and it must arrive last in {below.uri}")
        names.remove(last)
        below.write(UNFINISHED, b"")
        for_each(names, lambda each: below.put(folder / each, each))
        below.put(folder / last, last)
        try:
            below.delete(UNFINISHED)
        except StorageError as error:  # the folder is whole; `sweep` removes the mark
            log.warning("%s", error)

    def delete(self, name: str) -> None:
        own = f"{self._root}{clean(name)}"
        keys = [each["Key"] for each in self._objects(name) if each["Key"] == own or each["Key"].startswith(f"{own}/")]
        seals = [key for key in keys if key.rpartition("/")[2] == MANIFEST]  # first: what is left never looks whole
        rest = [key for key in keys if key not in set(seals)]
        for some in (seals, rest):
            for start in range(0, len(some), 1000):
                self._delete(name, some[start : start + 1000])

    def _delete(self, name: str, keys: Sequence[str]) -> None:
        from botocore.exceptions import ClientError  # type: ignore[import-untyped, unused-ignore]

        def delete() -> None:
            wanted = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
            for each in client().delete_objects(Bucket=self.bucket, Delete=wanted).get("Errors", ()):
                status = 403 if each.get("Code") == "AccessDenied" else 500
                raise ClientError({"Error": each, "ResponseMetadata": {"HTTPStatusCode": status}}, "DeleteObjects")

        self._do(name, "delete", delete)

    def leftovers(self) -> Sequence[Leftover]:
        def uploads() -> Sequence[Any]:
            pages = client().get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket, Prefix=self._root)
            return [each for page in pages for each in page.get("Uploads", ())]

        found = [
            Leftover(each["Key"].removeprefix(self._root), "upload", each["Initiated"].timestamp(), each["UploadId"])
            for each in self._do("", "list uploads", uploads)
        ]
        objects = {each["Key"].removeprefix(self._root): each["LastModified"].timestamp() for each in self._objects("")}
        for name in objects:
            folder, _, file = name.rpartition("/")
            if file == UNFINISHED:
                modified = max(time for each, time in objects.items() if each.startswith(f"{folder}/"))
                found.append(Leftover(folder, "folder", modified))
        return sorted(found, key=lambda leftover: leftover.name)

    def discard(self, leftover: Leftover) -> None:
        if leftover.kind == "folder":
            whole = any(each["Key"].endswith(f"/{MANIFEST}") for each in self._objects(f"{leftover.name}/{MANIFEST}"))
            self.delete(f"{leftover.name}/{UNFINISHED}" if whole else leftover.name)
            return

        def abort() -> None:
            client().abort_multipart_upload(**self._key(leftover.name), UploadId=leftover.upload)

        self._do(leftover.name, "abort upload", abort)


def _transfer() -> Any:
    from boto3.s3.transfer import TransferConfig  # type: ignore[import-untyped, unused-ignore]

    return TransferConfig(multipart_threshold=PART, multipart_chunksize=PART, max_concurrency=PARTS_AT_ONCE)
