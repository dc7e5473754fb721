"""A finding, what several checks ask, and the mask over secrets."""

from __future__ import annotations

import os
import re
import ssl
import time
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError
from urllib.parse import urlsplit, urlunsplit

from pipelines import paths
from pipelines.params import Params

State = Literal["ok", "warn", "bad", "unknown"]

ANSWER_S = 5.0  # for one HTTP answer
SKEW_WARN_S, SKEW_BAD_S = 5.0, 300.0  # S3 refuses signatures that are 15 minutes off, some stand-ins 5
GIB = 1 << 30
NOT_CONFIGURED = "not configured (no cluster.address, no RAY_ADDRESS)"


@dataclass(frozen=True)
class Finding:
    """What one check saw.

    Attributes:
        check: what was looked at.
        state: ok; warn (works, with a risk); bad (will fail, or is open to others); unknown (could not be seen).
        found: what is there.
        mend: what to do about it; may be empty when the state is ok.
    """

    check: str
    state: State
    found: str
    mend: str = ""


def said(error: object) -> str:
    """The words of an error, on one line."""
    return " ".join(str(error).split())[:400]


def dashboard_url(address: str) -> str:
    """The HTTP address of the job server: the address itself, or Ray's own port on the same host."""
    if address.startswith(("http://", "https://")):
        return address.rstrip("/")
    host = "127.0.0.1" if address == "auto" else urlsplit(address if "://" in address else f"//{address}").hostname
    return f"http://{f'[{host}]' if host and ':' in host else host}:8265"


def probe_name() -> str:
    """Of a probe object: nobody else's."""
    return f"dgm-doctor-{uuid.uuid4().hex}"


def dvc_config() -> Mapping[str, Any]:
    """DVC's settings; empty sections where there is no DVC repository."""
    if not (paths.root() / ".dvc").is_dir():
        return {"core": {}, "remote": {}, "cache": {}}
    from dvc.config import Config  # type: ignore[import-untyped, unused-ignore]

    found: Mapping[str, Any] = Config(str(paths.root() / ".dvc"))
    return found


def default_remote() -> tuple[str, Mapping[str, Any]] | None:
    """The name and the settings of the remote that `dvc push` takes, None when there is none."""
    config = dvc_config()
    name = config["core"].get("remote")
    return (name, config["remote"][name]) if name in config["remote"] else None


def existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    return next(each for each in (path, *path.parents) if each.exists())


@dataclass(frozen=True)
class Answer:
    """What an HTTP server answered, and how long it took, in seconds."""

    status: int
    text: str
    skew: float | None  # the server's clock minus this one's, seconds; None without a Date header
    trip: float


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """A redirect is an answer: a token must not follow it to another host."""


def bounds(workers: int | tuple[int, int]) -> tuple[int, int]:
    """The least and the most workers of `cluster.workers`."""
    return (workers, workers) if isinstance(workers, int) else workers


def ask(url: str, headers: Mapping[str, str] | None = None) -> Answer:
    """One GET, whatever the status. Raises: OSError when nobody answers."""
    parts = urlsplit(url)
    bare = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    trust = ssl.create_default_context(cafile=os.environ.get("REQUESTS_CA_BUNDLE"))  # what `requests` obeys
    opener = urllib.request.build_opener(_Stay, urllib.request.HTTPSHandler(context=trust))
    before = time.time()
    try:
        response = opener.open(urllib.request.Request(bare, headers=dict(headers or {})), timeout=ANSWER_S)
    except HTTPError as error:
        response = error
    after = time.time()
    with response:
        text = response.read(1 << 16).decode(errors="replace")
        date = response.headers.get("Date")
    return Answer(response.status, text, skew_of(date, before, after), after - before)


def skew_of(date: str | None, before: float, after: float) -> float | None:
    """A Date header against this clock at half the round trip; it has whole seconds, so half of one is added."""
    if date is None:
        return None
    return parsedate_to_datetime(date).timestamp() + 0.5 - (before + after) / 2


def clock_finding(check: str, skew: float | None, trip: float, grain: float = 0.5) -> Finding:
    """Judges a clock.

    Args:
        check: the finding's name.
        skew: seconds, None when it could not be seen.
        trip: seconds of the round trip that it was measured over.
        grain: seconds that the other clock's words may be off.
    """
    if skew is None:
        return Finding(check, "unknown", "the answer has no Date header", "compare `date -u` on both machines")
    off = max(0.0, abs(skew) - grain - trip / 2)  # what is certain
    found = f"{skew:+.1f} s against this machine (within {grain + trip / 2:.1f} s)"
    if off <= SKEW_WARN_S:
        return Finding(check, "ok", found)
    mend = "let both machines keep time by NTP (`timedatectl set-ntp true`, or chrony)"
    if off <= SKEW_BAD_S:
        return Finding(check, "warn", found, mend)
    return Finding(check, "bad", found, f"S3 refuses requests signed at another time: {mend}")


def size(count: float) -> str:
    """Bytes in words."""
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / (1 << 20):.1f} MiB"


# ---------------------------------------------------------------- secrets


def ray_token() -> tuple[str | None, Path | None]:
    """The token that Ray would send, and the file that it stands in. Raises: OSError when the file cannot be read."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"].strip(), None
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return (path.read_text().strip() or None, path) if path.is_file() else (None, None)


_SECRET_NAME = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|ACCESS_KEY|API_KEY|SAS)(_ID)?$", re.IGNORECASE)
_IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+@")
_IN_QUERY = re.compile(
    r"([?&][^=&\s]*(?:secret|token|password|key|credential|signature)[^=&\s]*=)[^&\s]+", re.IGNORECASE
)


def mask_of(params: Params) -> Callable[[str], str]:
    """A function that replaces every secret this process can know of, and passwords in addresses, by ***."""
    secrets = {value for name, value in os.environ.items() if _SECRET_NAME.search(name)}
    with suppress(OSError):
        secrets.add(ray_token()[0] or "")
    with suppress(Exception):  # a broken DVC configuration is the business of another check
        for remote in dvc_config()["remote"].values():
            secrets |= {str(value) for name, value in remote.items() if _SECRET_NAME.search(name)}
    for address in (params.cluster.where or "", params.tracking.where, params.cluster.storage):
        with suppress(ValueError):
            secrets.add(urlsplit(address).password or "")
    known = sorted((each.strip() for each in secrets if len(each.strip()) >= 4), key=len, reverse=True)

    def mask(text: str) -> str:
        for secret in known:
            text = text.replace(secret, "***")
        return _IN_QUERY.sub(r"\1***", _IN_ADDRESS.sub("***@", text))

    return mask
