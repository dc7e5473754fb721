"""A VQ-VAE on grey MNIST with a prior over its codes: bits/dim of the two as one model, a bound.

The decoder's likelihood is a logistic that is integrated over each of the 256 levels' cells, so that p(x|codes) is a
probability of the stored image. Once the VQ-VAE is trained its nearest codes of every training image are data of
their own, and a gated PixelCNN is trained on them. Two bounds of log p(x) are told:

- by draws, as the evaluation stage tells them: an importance-weighted bound with soft codes;
- by the nearest codes c of an image: log p(x|c) + log p(c), one term of the sum over codes, in its two parts.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

import dgm_models
from dgm_models.likelihood import log_prob
from dgm_models.method import compose
from dgm_models.metrics.likelihood import bits_per_dim, mean_estimate
from dgm_models.nn.quantize import Quantized
from dgm_models.protocols import Density
from pipelines.data import shards
from pipelines.data.prepare import prepare
from pipelines.stages.encode import codes_of

VQ_VAE = {"width": 32, "blocks": 1, "halvings": 2, "codebook_size": 64, "code_dim": 16}
PRIOR = {"width": 32, "blocks": 4, "first_kernel": 5}
CHUNK = 250


@torch.no_grad()
def parts(method: dgm_models.Method, prior: dgm_models.Method, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log p(x|c) and log p(c) of the nearest codes c of stored x [N, 1, 28, 28]: [N] nats each."""
    model, law = method.model, prior.model
    assert isinstance(model, Quantized) and isinstance(law, Density)
    found = []
    for part in x.split(CHUNK):
        encoded, _ = model.codec.encode(part, torch.arange(len(part)))
        codes = model.codes(encoded)
        found.append(torch.stack([model.log_likelihood(encoded, codes), law.log_prob(codes, None)]).double())
    reconstruction, codes_nats = torch.cat(found, 1)
    return reconstruction, codes_nats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/mnist"), help="prepared MNIST; made if missing")
    parser.add_argument("--steps", type=int, default=1_500)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--prior-steps", type=int, default=1_500)
    parser.add_argument("--prior-lr", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--validate-every", type=int, default=500)
    parser.add_argument("--importance", type=int, nargs="*", default=[1, 32], help="draws of the bounds on test")
    parser.add_argument("--test", type=int, default=10_000, help="test rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", type=Path, help="folder that gets vq_vae/ and prior/")
    parser.add_argument("--log", type=Path, help="gets one JSON line")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not (options.data / "manifest.json").is_file():
        prepare({"name": "mnist"}, options.data)
    train, valid, test = (shards.load(options.data, split).x for split in ("train", "valid", "test"))
    test = test[: options.test]
    common = {"seed": options.seed, "batch_size": options.batch, "average": 0.99, "keep": "best",
              "validate_every": options.validate_every, "report_every": options.validate_every,
              "threads": options.threads,
              "report": lambda step, m: print(step, {k: round(v, 3) for k, v in m.items()}, flush=True)}  # fmt: skip

    started = time.time()
    method = dgm_models.build("vae/vq_vae", shards.read_manifest(options.data).spec(), seed=options.seed, **VQ_VAE)
    model = method.model
    assert isinstance(model, Quantized)
    size = sum(p.numel() for p in model.parameters())
    print(f"vae/vq_vae {VQ_VAE}, {type(model.likelihood).__name__}, {size:,} parameters", flush=True)
    optim = {"lr": options.lr, "schedule": "cosine"}
    dgm_models.fit(method, train, valid=valid[:2000], optim=optim, steps=options.steps, **common)
    vq_seconds = time.time() - started

    started = time.time()
    codes = {name: codes_of(model, x).to(torch.uint8) for name, x in {"train": train, "valid": valid[:2000]}.items()}
    prior = dgm_models.build("autoregressive/gated_pixel_cnn", model.code_spec, seed=options.seed, **PRIOR)
    size = sum(p.numel() for p in prior.model.parameters())
    print(f"autoregressive/gated_pixel_cnn {PRIOR} over {model.code_spec}, {size:,} parameters", flush=True)
    optim = {"lr": options.prior_lr, "schedule": "cosine"}
    dgm_models.fit(prior, codes["train"], valid=codes["valid"], optim=optim, steps=options.prior_steps, **common)
    prior_seconds = time.time() - started
    if options.save:
        dgm_models.save(method, options.save / "vq_vae")
        dgm_models.save(prior, options.save / "prior")

    torch.set_num_threads(options.threads)
    dims = method.data.dims
    line = {"seed": options.seed, "steps": options.steps, "prior_steps": options.prior_steps, "batch": options.batch,
            "lr": options.lr, "prior_lr": options.prior_lr, "vq_vae": VQ_VAE, "prior": PRIOR, "test_rows": len(test),
            "vq_vae_s": round(vq_seconds), "prior_s": round(prior_seconds)}  # fmt: skip

    def tell(name: str, nats: torch.Tensor) -> None:
        found = mean_estimate(bits_per_dim(-nats, dims))
        line[name] = [found.value, found.low, found.high]
        print(f"{name}: {found.value:.4f} [{found.low:.4f}, {found.high:.4f}] bits/dim", flush=True)

    for name, rows in {"valid": valid[:2000], "test": test}.items():
        reconstruction, codes_nats = parts(method, prior, rows)
        tell(f"{name}, nearest codes: image given codes", reconstruction)
        tell(f"{name}, nearest codes: codes", codes_nats)
        tell(f"{name}, nearest codes: both", reconstruction + codes_nats)
    whole = compose(prior, method)
    for draws in options.importance:
        nats, kind = log_prob(whole, test, importance=draws)
        tell(f"test, {kind} by {draws} draws", nats)
    if options.log:
        with options.log.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
