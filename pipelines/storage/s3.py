"""S3's client, and the judgement of what it meets: tried again for a while, or raised with the way out."""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

from pipelines.storage.interface import FILES_AT_ONCE, Corrupted, StorageError

log = logging.getLogger("dgm.storage")
T = TypeVar("T")

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 60.0
CORRUPT_ATTEMPTS = 3  # bytes that differ from their checksum: in transit it passes, at rest it does not
PATIENCE_S = 120.0
PARTS_AT_ONCE = 4  # of one file


def endpoint() -> str | None:
    """The S3 endpoint that the environment names; None for AWS's own."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def client(attempts: int = 1) -> Any:
    """The boto3 client of this process for the environment's endpoint and credentials; the project's only one.

    Args:
        attempts: of boto3 for one request, the first included; 1 where the caller tries again itself.
    """
    settings = tuple(sorted((key, value) for key, value in os.environ.items() if key.startswith("AWS_")))
    with _making:
        return _client(os.getpid(), settings, attempts)


_making = threading.Lock()


@lru_cache(maxsize=8)
def _client(process: int, settings: tuple[tuple[str, str], ...], attempts: int) -> Any:
    # boto3 costs 0.3 s and only s3:// needs it
    import boto3  # type: ignore[import-untyped, unused-ignore]
    from botocore.config import Config  # type: ignore[import-untyped, unused-ignore]

    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        retries={"mode": "standard", "total_max_attempts": attempts},
        max_pool_connections=FILES_AT_ONCE * PARTS_AT_ONCE,
        s3={"addressing_style": "path" if endpoint() else "auto"},
    )
    # a session of its own: boto3's default session keeps the credentials that it saw first
    return boto3.session.Session().client("s3", config=config, endpoint_url=endpoint())


def _patience() -> float:
    text = os.environ.get("DGM_STORAGE_PATIENCE", str(PATIENCE_S))
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"DGM_STORAGE_PATIENCE: {text!r} is not a number of seconds") from error


_PASSING = {
    "InternalError", "SlowDown", "ServiceUnavailable", "RequestTimeout", "Throttling", "ThrottlingException",
    "RequestLimitExceeded", "BandwidthLimitExceeded",
    "ConditionalRequestConflict",  # two conditional writes met: asking again gives 412 or success
    "OperationAborted",
    "BadDigest", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch", "IncompleteBody",  # bytes hurt on the way
    "NoSuchUpload",  # a completed upload whose answer was lost is done again
}  # fmt: skip
_ADVICE = {
    "NoSuchBucket": "create the bucket, or correct the address",
    "PermanentRedirect": "set AWS_DEFAULT_REGION to the bucket's region",
    "AuthorizationHeaderMalformed": "set AWS_DEFAULT_REGION to the bucket's region",
    "RequestTimeTooSkewed": "set this machine's clock",
    "ExpiredToken": "renew the credentials",
    "NoCredentialsError": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the machine a role",
}


def _advice(code: str, status: int) -> str:
    if status == 403 and code not in _ADVICE:
        return "check the credentials (AWS_ACCESS_KEY_ID, AWS_PROFILE or the machine's role) and the bucket's policy"
    return _ADVICE.get(code, "check the address, AWS_ENDPOINT_URL and the credentials")


@dataclass(frozen=True)
class Verdict:
    """What the other side said, whether it may pass, its code and HTTP status."""

    said: str
    passes: bool
    code: str = ""
    status: int = 0


def judge(error: Exception) -> Verdict:
    """What the other side said, and whether it may pass."""
    from boto3.exceptions import (  # type: ignore[import-untyped, unused-ignore]
        RetriesExceededError,
        S3UploadFailedError,
    )
    from botocore import exceptions as known  # type: ignore[import-untyped, unused-ignore]

    if isinstance(error, known.ClientError):
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        passes = (status >= 500 and status != 501) or status in (408, 425, 429) or code in _PASSING
        message = str(error.response.get("Error", {}).get("Message", "")).strip()
        return Verdict(f"{status} {code}: {message}", passes, code, status)
    if isinstance(error, S3UploadFailedError) and isinstance(error.__context__, known.ClientError):
        return judge(error.__context__)  # boto3's uploads wrap what they met
    said = f"{type(error).__name__}: {error}"
    untrusted = isinstance(error, known.SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error)
    passing = (
        known.ConnectionError,
        known.HTTPClientError,
        known.IncompleteReadError,
        known.ResponseStreamingError,
        known.FlexibleChecksumError,
        RetriesExceededError,  # of a download in parts
        Short,
    )
    return Verdict(said, isinstance(error, passing) and not untrusted, type(error).__name__)


class Short(Exception):
    """Fewer or more bytes than announced."""


def persist(uri: str, operation: str, action: Callable[[], T]) -> T:
    """`action()`, again while what it meets may pass and patience lasts."""
    from boto3.exceptions import Boto3Error  # type: ignore[import-untyped, unused-ignore]
    from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped, unused-ignore]

    failed_at, tries, corrupt = 0.0, 0, 0
    while True:
        try:
            return action()
        except (BotoCoreError, ClientError, Boto3Error, Short) as met:
            verdict = judge(met)
        if verdict.code in ("NoSuchKey", "404"):
            raise FileNotFoundError(f"{uri}: not there")
        if not verdict.passes:
            advice = _advice(verdict.code, verdict.status)
            raise StorageError(f"{uri}: {operation} was refused by {_server()} ({verdict.said}); {advice}")
        tries += 1
        failed_at = failed_at or time.monotonic()
        corrupt += verdict.code == "FlexibleChecksumError"
        if corrupt >= CORRUPT_ATTEMPTS:
            raise Corrupted(f"{uri}: {operation}: {verdict.said}, {corrupt} times; the object is damaged")
        patience = _patience()
        left = patience - (time.monotonic() - failed_at)
        if left <= 0:
            raise StorageError(
                f"{uri}: {operation} failed {tries} times in {patience:g} s at {_server()} ({verdict.said}); "
                "is the endpoint (AWS_ENDPOINT_URL) right and up? DGM_STORAGE_PATIENCE (seconds) says how long to wait"
            )
        if tries == 1:
            log.warning("%s: %s: %s; trying again for up to %g s", uri, operation, verdict.said, patience)
        time.sleep(min(left, random.uniform(0.5, 1.0) * min(8.0, 0.1 * 2**tries)))


def _server() -> str:
    return endpoint() or "AWS"
