"""The run store: checkpoints and finished artifacts of every run, under the digest of its identity.

Layout: `<storage>/<digest>/step-00000500/` and `<storage>/<digest>/artifact/`. A folder counts only with a manifest
that its files match; on s3:// the manifest is uploaded last. Ray's own checkpoints are not used: what is reported to
Ray is not durable until its controller has polled, and a repeated run name there resumes whatever it finds.
"""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dgm_models.training import checkpoint

log = logging.getLogger("dgm.store")
_STEP = re.compile(r"step-(\d{8})")


class RunStore:
    """The folders of one run digest.

    Args:
        storage: a folder or s3://bucket/prefix (AWS_ENDPOINT_URL is honoured).
        digest: of the run's identity.
        keep: how many checkpoints stay.
    """

    def __init__(self, storage: str, digest: str, keep: int = 2) -> None:
        import pyarrow.fs as fs

        self.filesystem: Any
        if "://" in storage:
            self.filesystem, base = _remote(storage)
        else:
            self.filesystem, base = fs.LocalFileSystem(), str(Path(storage).absolute())
        self.base = f"{base.rstrip('/')}/{digest}"
        self.local = isinstance(self.filesystem, fs.LocalFileSystem)
        self.keep = keep

    def _steps(self) -> list[int]:
        import pyarrow.fs as fs

        found = self.filesystem.get_file_info(fs.FileSelector(self.base, allow_not_found=True))
        matches = (_STEP.fullmatch(info.base_name) for info in found if info.type == fs.FileType.Directory)
        return sorted(int(match[1]) for match in matches if match)

    @contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        """A verified local copy of one folder, for the time of the block. Raises checkpoint.Damaged."""
        import pyarrow.fs as fs

        if self.local:
            checkpoint.verify(Path(self.base, name))
            yield Path(self.base, name)
            return
        with tempfile.TemporaryDirectory(prefix="dgm-") as folder:
            try:
                fs.copy_files(f"{self.base}/{name}", folder, source_filesystem=self.filesystem)
            except FileNotFoundError as error:
                raise checkpoint.Damaged(f"{self.base}/{name}: not there") from error
            checkpoint.verify(Path(folder))
            yield Path(folder)

    @contextmanager
    def newest(self) -> Iterator[Path | None]:
        """The newest checkpoint that is intact; damaged ones are named in the log and passed over."""
        for step in reversed(self._steps()):
            name = f"step-{step:08d}"
            try:
                with self.fetched(name) as folder:
                    yield folder
                    return
            except checkpoint.Damaged as error:
                log.warning("passing over a damaged checkpoint: %s", error)
        yield None

    def has_artifact(self) -> bool:
        try:
            with self.fetched("artifact"):
                return True
        except checkpoint.Damaged:
            return False

    def publish(self, name: str, folder: Path) -> None:
        """Stores a sealed local folder under a name; readers see it whole or not at all."""
        import pyarrow.fs as fs

        if self.local:
            Path(self.base).mkdir(parents=True, exist_ok=True)
            temporary = Path(self.base, f".{name}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.copytree(folder, temporary)
            checkpoint.replace(temporary, Path(self.base, name))
            return
        target = f"{self.base}/{name}"
        for path in sorted(folder.iterdir(), key=lambda path: path.name == checkpoint.MANIFEST):  # the manifest last
            fs.copy_files(str(path), f"{target}/{path.name}", destination_filesystem=self.filesystem)

    def save(self, step: int, write: Any) -> None:
        """Lets `write(folder)` make a checkpoint, stores it, and drops the oldest beyond `keep`."""
        name = f"step-{step:08d}"
        if self.local:
            write(Path(self.base, name))
        else:
            with tempfile.TemporaryDirectory(prefix="dgm-") as folder:
                write(Path(folder, name))
                self.publish(name, Path(folder, name))
        for old in self._steps()[: -self.keep]:
            self.filesystem.delete_dir(f"{self.base}/step-{old:08d}")

    def drop_checkpoints(self) -> None:
        """A finished run needs its artifact alone."""
        for step in self._steps():
            self.filesystem.delete_dir(f"{self.base}/step-{step:08d}")


def _remote(uri: str) -> tuple[Any, str]:
    import os

    import pyarrow.fs as fs

    if not uri.startswith("s3://"):
        raise ValueError(f"cluster.storage: {uri!r} is neither a folder nor s3://bucket/prefix")
    options: dict[str, Any] = {"connect_timeout": 10, "request_timeout": 60}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        scheme, _, host = endpoint.partition("://")
        options |= {"endpoint_override": host, "scheme": scheme}
    return fs.S3FileSystem(**options), uri.removeprefix("s3://")
