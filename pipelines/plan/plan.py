"""A plan: memory, traffic, time and price of a run on N workers, and every assumption that went into it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch

from dgm_models.construct import ConfigError
from dgm_models.protocols import DataSpec
from pipelines import paths
from pipelines.data.manifest import Manifest, read_manifest
from pipelines.params import Params, Run, Section
from pipelines.plan import cost
from pipelines.plan.devices import Assumptions, Device, device
from pipelines.plan.dry import Dry, run_dry

KEPT_CHECKPOINTS = 2  # what the run store keeps
MEASURED_STEPS = 5


def plan(
    run: Run,
    params: Params,
    gpus: int,
    *,
    device_name: str | None = None,
    price: float | None = None,
    measure: bool = False,
    assumed: Assumptions | None = None,
) -> Section:
    """What `run` will need on `gpus` workers, as a JSON document; its data must be prepared.

    Args:
        run: what is trained.
        params: `cluster` says whether parameters are sharded and activations computed again.
        gpus: workers; each has one accelerator, or is a process on a CPU where no device is named.
        device_name: a row of `devices.DEVICES`, or a YAML file with the keys of `Device`.
        price: of one worker's hour, in the user's own currency.
        measure: time some real steps of a worker's share here, instead of the roofline.
        assumed: what the data sheet does not say.
    Raises: ValueError or ConfigError that names the key and the way out.
    """
    cluster, assumed = params.cluster, assumed or Assumptions()
    found = device(device_name) if device_name else None
    if price is not None and not price >= 0:
        raise ValueError(f"--price: {price!r} is not a price of one worker's hour")
    if measure and found:
        raise ValueError("--measure: times steps on this machine, which is not the --device; give one of the two")
    manifest = read_manifest(paths.data(run.dataset))
    settings = {"shard": cluster.shard, "checkpoint_activations": cluster.checkpoint_activations}
    dry = dry_run(run, manifest.spec(), gpus, gpu=found is not None or cluster.gpu, **settings)
    measured = _measured(run, manifest.spec(), gpus) if measure else None
    return {
        "run": run.key,
        "workers": gpus,
        "nodes": math.ceil(gpus / found.per_node) if found else None,
        "device": {"name": device_name, **asdict(found)} if found else None,
        "settings": settings | {"batch_size": run.train.batch_size, "accumulate": run.train.accumulate,
                                "precision": run.train.precision},
        "parameters": dry.parameters,
        "memory": _memory(run, manifest, gpus, dry, found, assumed, settings),
        **_work(run, manifest, gpus, dry, found, assumed, price, measured),
        "data": _data(run, manifest, gpus, dry),
        "checkpoints": _checkpoints(run, dry),
        "assumptions": _assumptions(run, gpus, found, assumed, measure, cluster.gpu),
    }  # fmt: skip


def dry_run(
    run: Run,
    spec: DataSpec,
    gpus: int,
    *,
    shard: bool = False,
    checkpoint_activations: bool = False,
    gpu: bool = False,
) -> Dry:
    """`run_dry`, with the errors that a plan can name by their path."""
    if isinstance(gpus, bool) or not isinstance(gpus, int) or gpus < 1:
        raise ValueError(f"--gpus: {gpus!r} is not a whole number above 0; give the number of workers, such as 8")
    batch, parts = run.train.batch_size, run.train.accumulate
    if batch < gpus * parts:
        raise ConfigError(
            f"runs.{run.key}.train.batch_size: {batch} examples do not fill {gpus} workers x {parts} micro-batches; "
            f"raise it to {gpus * parts}, or plan at most {batch // parts} workers"
        )
    with _named(f"runs.{run.key}"):
        return run_dry(
            run, spec, gpus, shard=shard, checkpoint_activations=checkpoint_activations, foreach=gpu
        )  # fmt: skip


@contextmanager
def _named(path: str) -> Iterator[None]:
    """The trainer's own refusals say the key; a plan says of which run."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


# ---- memory


def _memory(
    run: Run, manifest: Manifest, world: int, dry: Dry, found: Device | None, assumed: Assumptions, settings: Section
) -> Section:
    tensors = sum(dry.peak.values())
    document: Section = {
        "tensors": tensors,
        "split": {kind: size for kind, size in dry.peak.items() if size},
        "host": {
            "construction": dry.construction,
            "rows": _rows_held(run, manifest, world) * _row_bytes(manifest),
            "snapshot": dry.state_bytes,
        },
    }
    if found is None:
        return document
    needed = _on_device(tensors, assumed)
    document |= {"needed": needed, "available": int(found.memory), "fits": needed <= found.memory}
    if not document["fits"]:
        document["remedies"] = remedies(run, manifest.spec(), world, found, assumed, **settings)
    return document


def _rows_held(run: Run, manifest: Manifest, world: int) -> int:
    """Rows in a worker's memory: all of them, or of each of its lanes the window in use, the next one and a shard."""
    if run.stream is None:
        return manifest.rows["train"] + (manifest.rows["valid"] if run.train.validate_every else 0)
    lanes = math.ceil(run.stream.lanes / world)
    shard = max(part.rows for part in manifest.parts if part.split == "train")
    return lanes * (2 * run.stream.buffer // run.stream.lanes + shard)


def _on_device(tensors: float, assumed: Assumptions) -> int:
    return int(tensors * (1 + assumed.fragmentation) + assumed.context)


def remedies(
    run: Run, spec: DataSpec, world: int, found: Device, assumed: Assumptions, shard: bool, checkpoint_activations: bool
) -> list[Section]:
    """Settings that need less memory, each planned anew; smallest change first. Those that do not fit are said too."""
    tried = []
    for change in _changes(run, world, shard, checkpoint_activations):
        accumulate = change.get("accumulate", run.train.accumulate)
        changed = replace(run, train=replace(run.train, accumulate=accumulate))
        settings = {"shard": shard, "checkpoint_activations": checkpoint_activations}
        settings |= {name: value for name, value in change.items() if name in settings}
        try:
            dry = dry_run(changed, spec, world, gpu=True, **settings)
        except ValueError:  # a game is not sharded; an objective that couples examples takes one micro-batch
            continue
        needed = _on_device(sum(dry.peak.values()), assumed)
        tried.append({"change": change, "needed": needed, "fits": needed <= found.memory})
    return tried


def _changes(run: Run, world: int, shard: bool, checkpoint_activations: bool) -> list[Section]:
    single: list[Section] = []
    if not checkpoint_activations:
        single.append({"checkpoint_activations": True})
    if not shard and world > 1:
        single.append({"shard": True})
    most = run.train.batch_size // world  # micro-batches of one example
    micro = [factor * run.train.accumulate for factor in (2, 8) if factor * run.train.accumulate <= most]
    both = {key: value for change in single for key, value in change.items()}
    found = single + ([both] if len(single) > 1 else []) + [{"accumulate": k} for k in micro]
    return found + ([both | {"accumulate": micro[-1]}] if both and micro else [])


# ---- time, traffic, price


def _work(
    run: Run,
    manifest: Manifest,
    world: int,
    dry: Dry,
    found: Device | None,
    assumed: Assumptions,
    price: float | None,
    measured: float | None,
) -> Section:
    traffic = sum(share * cost.traffic(counts, world) for share, counts in dry.steps)
    calls: dict[str, float] = {}
    for share, counts in dry.steps:
        for (name, size), times in counts.collectives.items():
            calls[f"{name} {size}"] = calls.get(f"{name} {size}", 0) + share * times
    document: Section = {
        "step": {"flops": dry.flops, "sent": traffic, "collectives": calls},
        "steps": run.train.steps,
        "time": None,
        "price": None,
    }
    link = cost.link(found, world, assumed) if found else None
    if found:
        compute = sum(share * cost.compute_seconds(counts, found, assumed) for share, counts in dry.steps)
    elif measured is not None:
        compute = measured
        document["step"]["achieved_flops"] = dry.flops / measured
    else:
        return document
    waiting = (
        sum(share * cost.communication_seconds(counts, world, link) for share, counts in dry.steps) if link else 0.0
    )
    step = cost.step_seconds(compute, waiting, assumed.overlap)
    validation = _validation_seconds(run, manifest, dry, compute)
    total = run.train.steps * (step + validation)
    document["time"] = {
        "compute": compute,
        "communication": waiting if link or world == 1 else None,
        "step": step,
        "validation": validation,
        "total": total,
        "examples_per_second": run.train.batch_size * dry.draws / step,
    }
    hours = world * total / 3600
    document["price"] = {"worker_hours": hours, "total": None if price is None else hours * price}
    return document


def _validation_seconds(run: Run, manifest: Manifest, dry: Dry, compute: float) -> float:
    """Seconds of validation for one training step: by its FLOPs, at the pace of the training step."""
    if not run.train.validate_every or not dry.flops:
        return 0.0
    batches = math.ceil(manifest.rows["valid"] / run.train.batch_size)
    return batches * compute * dry.validation.flops / dry.flops / run.train.validate_every


def _measured(run: Run, spec: DataSpec, world: int) -> float:
    """Seconds of a real step of one worker's share on this machine, without communication: the median of some."""
    from dgm_models.training.runtime import Runtime
    from dgm_models.training.source import ArraySource
    from dgm_models.training.trainer import Trainer
    from pipelines.params import build_method

    share = -(-run.train.batch_size // world)
    train = replace(run.train, batch_size=share, steps=2**40, validate_every=0, keep="last", patience=0)
    levels = spec.levels
    shape = (max(2 * share, 64), *spec.shape)
    x = torch.randn(shape) if levels is None else torch.randint(levels, shape)
    x = x if levels is None else x.to(torch.uint8 if levels <= 256 else torch.int32)
    cond = torch.arange(len(x)) % spec.classes if spec.classes else None
    on = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(run.train.threads)
    try:
        with torch.random.fork_rng():
            method = build_method(run, spec)
            source = ArraySource(x, spec, cond)
            runtime = Runtime(on, precision=train.precision)
            trainer = Trainer(method.model, method.objective, source, train, run.optim, run.seed, runtime)
            seconds = []
            for _ in range(2 + MEASURED_STEPS):
                start = time.perf_counter()
                trainer.step()  # it ends by asking whether the gradient is finite, which waits for the device
                seconds.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return sorted(seconds[2:])[MEASURED_STEPS // 2]


# ---- data and checkpoints


def _row_bytes(manifest: Manifest) -> int:
    return manifest.spec().dims * {"uint8": 1, "int32": 4, "float32": 4}[manifest.dtype] + (
        8 if manifest.classes else 0
    )


def _data(run: Run, manifest: Manifest, world: int, dry: Dry) -> Section:
    rows, files = manifest.rows["train"], sum(part.bytes for part in manifest.parts if part.split == "train")
    consumed = run.train.steps * run.train.batch_size * dry.draws
    epochs = consumed / rows
    if run.stream is None:
        read = float(world * files)  # every worker reads the files once
    else:  # a worker reads the lanes that it has a part of: so many pairs of a worker and a lane there are
        lanes = run.stream.lanes
        read = epochs * files * (lanes + world - math.gcd(lanes, world)) / lanes
    return {
        "rows": rows,
        "row_bytes": _row_bytes(manifest),
        "file_bytes": files,
        "epochs": epochs,
        "streamed": run.stream is not None,
        "read_from_storage": read,
        "to_device": consumed * _row_bytes(manifest),
    }


def _checkpoints(run: Run, dry: Dry) -> Section:
    count = math.ceil(run.train.steps / run.train.checkpoint_every)
    return {
        "bytes": dry.state_bytes,
        "count": count,
        "written": dry.state_bytes * count + dry.weight_bytes,
        "stored": dry.state_bytes * min(count, KEPT_CHECKPOINTS) + dry.weight_bytes,
    }


def _assumptions(
    run: Run, world: int, found: Device | None, assumed: Assumptions, measure: bool, gpu: bool
) -> list[str]:
    """Everything that the numbers rest on and that was not counted."""
    lines = [
        "memory is that of the tensors: a kernel's own workspace (convolutions take some) is not in it",
        "the largest share of the batch; sharded parts are padded to equal sizes; the peak is that of the first steps",
    ]
    if run.train.compile:
        lines.append("torch.compile is left out: it needs other memory and less time")
    if found or gpu:
        lines.append("the optimizer works on all tensors at once, which keeps copies of their size for a moment")
    if found:
        lines += [
            f"a GPU holds {assumed.context / 2**30:g} GiB before the first tensor (CUDA context, cuBLAS, cuDNN) and "
            f"{assumed.fragmentation:.0%} of the tensors' peak in fragments",
            f"matrix products reach {assumed.utilisation:.0%} of the peak of {found.source}",
            f"other operations reach {assumed.memory_utilisation:.0%} of the memory's bandwidth; none takes less than "
            f"{assumed.launch * 1e6:g} us",
            "float32 products run without TF32; bfloat16 ones at the tensor cores' dense peak",
        ]
        if world > 1:
            where = "within a node" if world <= found.per_node else "between nodes"
            alpha = assumed.latency if world <= found.per_node else assumed.inter_latency
            lines.append(
                f"ring collectives as fast as the slowest link, {where}: {alpha * 1e6:g} us a message, "
                f"{assumed.link_utilisation:.0%} of its bandwidth; an all-reduce takes a tree where that is faster; "
                f"{assumed.overlap:.0%} of the communication hides behind the computation"
            )
    elif measure:
        lines.append("a step's time was measured here on one worker's share, without communication")
    else:
        lines.append("no time: name a --device, or --measure steps on this machine")
    lines.append("data is read in time, checkpoints are written beside the steps, no worker fails")
    stream = run.stream
    if stream is None:
        lines.append("every worker reads the training files once and holds them in the host's memory")
    elif stream.lanes % world:
        lines.append(
            f"{stream.lanes} lanes do not divide among {world} workers: lanes that are shared are read by each"
        )
    return lines


# ---- words


def size(count: float) -> str:
    """Bytes in words: 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    return (
        f"{seconds:.3g} s"
        if seconds < 120
        else f"{seconds / 60:.3g} min"
        if seconds < 7200
        else f"{seconds / 3600:.3g} h"
    )


def words(document: Mapping[str, Any]) -> str:
    """A plan as a short table with its assumptions below."""
    memory, step, data, checkpoints = (document[name] for name in ("memory", "step", "data", "checkpoints"))
    players = ", ".join(f"{name} {count:,}" for name, count in document["parameters"].items())
    large = {kind: count for kind, count in memory["split"].items() if 1000 * count >= memory["tensors"]}
    split = ", ".join(f"{kind} {size(count)}" for kind, count in large.items())
    host = ", ".join(f"{kind} {size(count)}" for kind, count in memory["host"].items())
    rows = [
        ("run", f"{document['run']} on {document['workers']} workers" + (
            f", {document['nodes']} nodes of {document['device']['name']}" if document["device"] else "")),
        ("parameters", players),
        ("memory", f"{size(memory['tensors'])} a worker: {split}"),
        ("host memory", f"{host} a worker"),
    ]  # fmt: skip
    if "fits" in memory:
        verdict = "fits" if memory["fits"] else "DOES NOT FIT"
        rows.append(("device memory", f"{size(memory['needed'])} of {size(memory['available'])}: {verdict}"))
        for tried in memory.get("remedies", ()):
            change = ", ".join(f"{key}: {str(value).lower()}" for key, value in tried["change"].items())
            rows.append(("", f"with {change}: {size(tried['needed'])}, {'fits' if tried['fits'] else 'does not fit'}"))
    rows.append(("a step", f"{step['flops']:.3g} FLOPs and {size(step['sent'])} sent by a worker"))
    spent = document["time"]
    if spent:
        apart = "" if spent["communication"] is None else f", communication {duration(spent['communication'])}"
        rows.append(("time", f"{duration(spent['step'])} a step (compute {duration(spent['compute'])}{apart}), "
                             f"{duration(spent['total'])} for {document['steps']} steps, "
                             f"{spent['examples_per_second']:.3g} examples/s"))  # fmt: skip
        paid = document["price"]
        rows.append(("price", f"{paid['worker_hours']:.3g} worker hours"
                              + (f", {paid['total']:.2f}" if paid["total"] is not None else ""
                                 " (give --price for one worker's hour)")))  # fmt: skip
    read = f"{size(data['read_from_storage'])} read, {'streamed' if data['streamed'] else 'held in memory'}"
    rows.append(("data", f"{data['epochs']:.3g} epochs of {data['rows']:,} rows of {size(data['row_bytes'])}; {read}"))
    rows.append(("checkpoints",
                 f"{checkpoints['count']} of {size(checkpoints['bytes'])}: "
                 f"{size(checkpoints['written'])} written, {size(checkpoints['stored'])} kept"))  # fmt: skip
    lines = [f"{name:<14} {text}" for name, text in rows]
    return "\n".join([*lines, "assumed", *(f"  - {line}" for line in document["assumptions"])])
