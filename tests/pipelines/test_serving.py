"""Sampling over HTTP: the same bytes for the same seed, and a 400 that names what is wrong."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from starlette.requests import Request
from starlette.responses import Response

import dgm_models
from dgm_models.protocols import DataSpec
from pipelines import registration, serving, tracking

URI = "models:/digits/1"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    method = dgm_models.build(
        "vae/vae", DataSpec("image", (1, 8, 8), levels=17),
        latent_dim=2, network={"name": "mlp", "width": 8, "depth": 1},
    )  # fmt: skip
    return dgm_models.save(method, tmp_path_factory.mktemp("serving") / "artifact", lineage={"run_digest": "d" * 32})


@pytest.fixture
def sampler(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> serving.Sampler:
    monkeypatch.setattr(registration, "fetch", lambda uri, into: artifact)
    return serving.Sampler(URI)


def ask(sampler: serving.Sampler, body: Any = b"", method: str = "POST") -> Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": content, "more_body": False}

    scope = {"type": "http", "method": method, "path": "/", "headers": [], "query_string": b""}
    return asyncio.run(sampler(Request(scope, receive)))


def test_serving_gives_the_same_bytes_for_the_same_seed(sampler: serving.Sampler) -> None:
    first, again, other = (ask(sampler, {"n": 4, "seed": seed, "format": "npy"}).body for seed in (7, 7, 8))
    assert first == again
    assert first != other


def test_serving_gives_what_sampling_gives(sampler: serving.Sampler) -> None:
    found = np.load(io.BytesIO(ask(sampler, {"n": 5, "seed": 3, "format": "npy"}).body))
    expected = dgm_models.sample(sampler.method, 5, 3).numpy()
    assert found.dtype == expected.dtype and np.array_equal(found, expected)


def test_serving_draws_a_picture_by_default(sampler: serving.Sampler) -> None:
    found = ask(sampler, {"n": 4})
    assert found.status_code == 200 and found.body.startswith(b"\x89PNG")
    assert found.headers["content-type"] == "image/png" and found.headers["x-model"] == URI
    assert ask(sampler).body == ask(sampler, {"n": 64, "seed": 0, "format": "png"}).body


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"n": 0}, 400, "request.n"),
        ({"n": -1}, 400, "request.n"),
        ({"n": serving.MOST + 1}, 400, f"at most {serving.MOST}"),
        ({"n": 2.5}, 400, "request.n"),
        ({"n": True}, 400, "request.n"),
        ({"n": "4"}, 400, "request.n"),
        ({"seed": -1}, 400, "request.seed"),
        ({"sead": 1}, 400, "did you mean"),
        ({"format": "pickle"}, 400, "request.format"),
        ([4], 400, "expected a section"),
        (b"{", 400, "Expecting"),
        (b" " * (serving.MOST_BYTES + 1), 413, str(serving.MOST_BYTES)),
    ],
)
def test_serving_refuses_and_names_what_is_wrong(sampler: serving.Sampler, body: Any, status: int, words: str) -> None:
    found = ask(sampler, body)
    assert found.status_code == status
    assert words in json.loads(bytes(found.body))["error"]


def test_serving_tells_what_it_serves(sampler: serving.Sampler) -> None:
    about = json.loads(bytes(ask(sampler, method="GET").body))
    assert about == {"model": URI, "method": "vae/vae", "run_digest": "d" * 32}
    assert ask(sampler, method="DELETE").status_code == 405


def test_serving_build_refuses_other_arguments() -> None:
    with pytest.raises(ValueError, match="modle"):
        serving.build({"modle": "models:/digits@champion"})


def test_serving_build_resolves_the_alias_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray.serve", reason="the extra `serve` is not installed", exc_type=ImportError)
    version = SimpleNamespace(name="digits", version="3")
    monkeypatch.setattr(registration, "resolve", lambda mlflow, uri: version)
    monkeypatch.setattr(tracking, "client", lambda: None)
    bound = serving.build({"model": "models:/digits@champion"})._bound_deployment
    assert bound.init_args == ("models:/digits/3",)
    assert bound.max_ongoing_requests == 1
