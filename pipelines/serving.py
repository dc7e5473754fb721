"""Sampling over HTTP: a registered model behind Ray Serve. Same seed, same bytes, from every replica.

    serve run pipelines.serving:build model=models:/digits@champion
    curl -d '{"n": 64, "seed": 0}' http://127.0.0.1:8000/ > grid.png

Needs the extra `serve`. An alias is resolved once, when the application is deployed: replicas that start after a
promotion still serve the version of the others; deploying again moves all of them.
"""

from __future__ import annotations

import asyncio
import io
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dgm_models.construct import NonNegative, Positive, construct

if TYPE_CHECKING:
    from ray.serve import Application

MOST = 1024  # samples of one request
MOST_BYTES = 4096  # of a request's body
WAITING = 32  # requests that a replica keeps; Serve answers 503 to the next
TYPES = {"png": "image/png", "npy": "application/octet-stream"}


@dataclass(frozen=True)
class Ask:
    """What a request asks for.

    Args:
        n: how many samples, at most MOST.
        seed: of the list of samples.
        format: a grid as PNG, or numpy's array file in the stored type.
        label: of a model asked by label: for all samples; every label in turn without one.
        caption: of a model asked by caption: its words, for all samples.
    """

    n: Positive = 64
    seed: NonNegative = 0
    format: Literal["png", "npy"] = "png"
    label: NonNegative | None = None
    caption: str | None = None

    def __post_init__(self) -> None:
        if self.n > MOST:
            raise ValueError(f"n: {self.n}; at most {MOST} in one request")


class Sampler:
    """One replica: the model, fetched and verified once.

    Args:
        model: models:/<name>/<number>; a number, so that every replica holds the same version.
    """

    def __init__(self, model: str) -> None:
        import dgm_models
        from pipelines.registration import fetch

        self.model = model
        with tempfile.TemporaryDirectory(prefix="dgm-") as folder:
            self.method = dgm_models.load(fetch(model, Path(folder) / "artifact"))

    def about(self) -> dict[str, Any]:
        """What is served."""
        return {"model": self.model, "method": self.method.name, "run_digest": self.method.lineage.get("run_digest")}

    def draw(self, ask: Ask) -> bytes:
        """The samples as a file. Raises: ValueError when they have no picture."""
        import numpy as np

        import dgm_models
        from dgm_models.sampling import labelled
        from pipelines import pictures

        cond = labelled(self.method, ask.n, ask.label, ask.caption)
        x = dgm_models.sample(self.method, ask.n, ask.seed, cond=cond)
        if ask.format == "png":
            return pictures.grid(x, self.method.data)
        stream = io.BytesIO()
        np.save(stream, x.numpy())
        return stream.getvalue()

    async def __call__(self, request: Request) -> Response:
        """GET tells what is served, POST samples; 400 with {"error": ...} for what the client got wrong."""
        if request.method == "GET":
            return JSONResponse(self.about())
        if request.method != "POST":
            return JSONResponse({"error": f"{request.method}: GET or POST"}, 405, {"Allow": "GET, POST"})
        content = bytearray()
        async for part in request.stream():
            content += part
            if len(content) > MOST_BYTES:
                return JSONResponse({"error": f"the body has more than {MOST_BYTES} bytes"}, 413)
        try:
            ask = construct(Ask, json.loads(content or b"{}"), "request")
            found = await asyncio.to_thread(self.draw, ask)  # the replica goes on answering health checks
        except ValueError as error:  # ConfigError and JSON's errors too
            return JSONResponse({"error": str(error)}, 400)
        return Response(found, media_type=TYPES[ask.format], headers={"X-Model": self.model})


def build(args: dict[str, str]) -> Application:
    """The Serve application of {"model": "models:/<name>@<alias>" or "models:/<name>/<number>"}.

    Raises: ValueError when it names no version.
    """
    from pipelines import registration, tracking

    if set(args) != {"model"}:
        raise ValueError(f"arguments: {sorted(args)}; expected model=models:/<name>@<alias> alone")
    version = registration.resolve(tracking.client(), args["model"])
    from ray import serve

    # one at a time: sampling sets the number of threads of its process
    deployment = serve.deployment(Sampler, name="Sampler", max_ongoing_requests=1, max_queued_requests=WAITING)
    return deployment.bind(f"models:/{version.name}/{version.version}")
