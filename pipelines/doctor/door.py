"""The door of the cluster: its token, its address, its clock."""

from __future__ import annotations

import ipaddress
import os
import socket
import uuid
from collections.abc import Iterator
from urllib.parse import urlsplit

from pipelines.doctor.common import (
    NOT_CONFIGURED,
    Finding,
    State,
    ask,
    clock_finding,
    dashboard_url,
    ray_token,
    said,
)
from pipelines.params import Params

ENCRYPT = (
    "a token does not encrypt: reach the cluster through `ssh -N -L 8265:127.0.0.1:8265 <head>` and the address "
    "http://127.0.0.1:8265, or put TLS in front"
)


def token_mode(params: Params) -> Iterator[Finding]:
    """RAY_AUTH_MODE: explicit on every machine, or one of them decides otherwise."""
    mode = os.environ.get("RAY_AUTH_MODE", "")
    if params.cluster.where is None:
        yield Finding("token mode", "ok", NOT_CONFIGURED)
    elif mode.lower() == "token":
        yield Finding("token mode", "ok", "RAY_AUTH_MODE=token")
    else:
        state: State = "bad" if mode else "warn"
        found = f"RAY_AUTH_MODE={mode}" if mode else "RAY_AUTH_MODE is not set: whether a token is sent is left to Ray"
        yield Finding("token mode", state, found, "export RAY_AUTH_MODE=token, here and on every node")


def token_file(params: Params) -> Iterator[Finding]:
    """The token's file: readable by its owner alone (`ray get-auth-token --generate` writes it 0644)."""
    cluster = params.cluster.where is not None
    token, path = ray_token()
    if path is not None:
        mode = path.stat().st_mode & 0o777
        if mode & 0o077:
            found = f"{path} has mode {mode:04o}: others on this machine can read it"
            yield Finding("token file", "bad" if cluster else "warn", found, f"chmod 600 {path}")
        else:
            yield Finding("token file", "ok", f"{path} has mode {mode:04o}")
    elif token:
        yield Finding("token file", "ok", "none; the token is in RAY_AUTH_TOKEN")
    elif cluster:
        mend = "copy the head's ~/.ray/auth_token here, mode 0600, or set RAY_AUTH_TOKEN_PATH"
        yield Finding("token file", "bad", "no token on this machine", mend)
    else:
        yield Finding("token file", "ok", NOT_CONFIGURED)


def token_asked(params: Params) -> Iterator[Finding]:
    """The job server runs what it is sent: without a token it must answer 401, with a wrong one 403."""
    address = params.cluster.where
    if address is None:
        yield Finding("token asked for", "ok", NOT_CONFIGURED)
        return
    url, token = f"{dashboard_url(address)}/api/jobs/", ray_token()[0]
    try:
        none = ask(url).status
        wrong = ask(url, {"Authorization": f"Bearer {uuid.uuid4().hex}"}).status
        # ours is shown to nobody who does not ask for one
        ours = ask(url, {"Authorization": f"Bearer {token}"}).status if token and none == 401 else None
    except OSError as error:
        mend = "is the head up (`ray status` there), its port open to this machine, or the tunnel running?"
        yield Finding("token asked for", "bad", f"{url} does not answer: {said(error)}", mend)
        return
    found = f"{url}: {none} without a token, {wrong} with a wrong one"
    mend = "start the head and every node with RAY_AUTH_MODE=token and one token file"
    if none < 300 or wrong < 300:
        yield Finding("token asked for", "bad", f"{found}: whoever reaches it runs code on the cluster", mend)
    elif ours in (401, 403):
        mend = "copy the head's ~/.ray/auth_token here, mode 0600"
        yield Finding("token asked for", "bad", f"{found}, {ours} with this machine's", mend)
    elif (none, wrong) != (401, 403):
        found += "; Ray answers 401 and 403: something else stands in front, or it is no job server"
        yield Finding("token asked for", "warn", found, mend)
    else:
        yield Finding("token asked for", "ok", found + (f", {ours} with this machine's" if ours else ""))


def dashboard(params: Params) -> Iterator[Finding]:
    """The address of the job server: on this machine, in a private network, or open to the world."""
    address = params.cluster.where
    if address is None:
        yield Finding("dashboard address", "ok", NOT_CONFIGURED)
        return
    parts = urlsplit(dashboard_url(address))
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(parts.hostname, parts.port or 80)}
    except OSError as error:
        mend = "correct cluster.address, or RAY_ADDRESS where it is set"
        yield Finding("dashboard address", "bad", f"{parts.hostname} does not resolve: {said(error)}", mend)
        return
    resolved = [ipaddress.ip_address(str(each).split("%")[0]) for each in sorted(map(str, found))]
    text = f"{parts.hostname} is {', '.join(map(str, resolved))}"
    if any(each.is_global for each in resolved):
        mend = f"close the port to the world (security group, --dashboard-host=127.0.0.1); {ENCRYPT}"
        yield Finding("dashboard address", "warn", f"{text}: a public address", mend)
    elif all(each.is_loopback for each in resolved):
        yield Finding("dashboard address", "ok", f"{text}: this machine, or the end of a tunnel")
    else:
        plain = parts.scheme == "http"
        text += ": private; the token crosses the network unencrypted" if plain else ": private, TLS"
        yield Finding("dashboard address", "ok", text, ENCRYPT if plain else "")


def cluster_clock(params: Params) -> Iterator[Finding]:
    """The head's clock, by the Date header of the job server."""
    address = params.cluster.where
    if address is None:
        yield Finding("clock (cluster)", "ok", NOT_CONFIGURED)
        return
    try:
        answer = ask(f"{dashboard_url(address)}/api/version")
    except OSError as error:
        yield Finding("clock (cluster)", "unknown", f"no answer: {said(error)}", "see `token asked for`")
        return
    yield clock_finding("clock (cluster)", answer.skew, answer.trip)
