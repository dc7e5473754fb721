"""Faults on purpose, and what must hold: `dgm drill`.

A drill makes one fault strike a training, asserts that it did, and then holds the result to the undisturbed run's: the
same weights bit for bit, every step once, one MLflow run, nothing lost that was acknowledged. The undisturbed runs are
the control: trained once a session, by the same code, without the fault.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgm_models.construct import did_you_mean

if TYPE_CHECKING:
    from pipelines.drills.bench import Bench


@dataclass(frozen=True)
class Drill:
    """One row of the table.

    Args:
        name: of the drill.
        does: the fault, and what it strikes.
        holds: what must hold beyond an equal result.
        run: "module:function" of this package.
        hosts: needs several hosts, hence Linux and the right to make namespaces.
        short: part of the short set that `make test` runs.
    """

    name: str
    does: str
    holds: str
    run: str
    hosts: bool = False
    short: bool = False


DRILLS = (
    Drill("worker-killed", "SIGKILL of the worker, on one machine", "Ray Train starts another, which resumes",
          "local:kill_worker", short=True),
    Drill("driver-killed", "SIGKILL of `dgm train`", "no worker goes on; the same command resumes",
          "local:kill_driver"),
    Drill("driver-notice", "SIGTERM to `dgm train`", "saved within the grace, status 143, no step lost",
          "local:notice_driver"),
    Drill("checkpoint-torn", "the newest checkpoint cut in half", "the one before is used",
          "local:torn_checkpoint"),
    Drill("checkpoint-flipped", "one bit of the newest checkpoint flipped", "the one before is used",
          "local:flipped_checkpoint", short=True),
    Drill("disk-full", "no space left in the run store", "the error says so, what was acknowledged stays, no leftovers",
          "local:disk_full", short=True),
    Drill("nan", "NaN in the weights of one rank of two", "every try names the step, nothing is published",
          "local:nan_on_one_rank"),
    Drill("out-of-memory", "the worker's allocation is refused", "the reason is printed, another worker resumes",
          "local:out_of_memory"),
    Drill("s3-busy", "503 to eight requests", "tried again", "local:s3_busy"),
    Drill("s3-lost-answer", "500 to ten writes that were applied", "no write is lost or fenced by itself",
          "local:s3_lost_answer", short=True),
    Drill("s3-reset", "TCP resets in the middle of six bodies", "tried again", "local:s3_reset"),
    Drill("s3-trickle", "four bodies that take two seconds each", "waited for", "local:s3_trickle"),
    Drill("s3-flipped", "one bit flipped in two uploads and one download", "refused by checksum and sent again",
          "local:s3_flipped"),
    Drill("s3-refused", "the bucket refuses connections for 15 s", "the training waits, with no failure allowed for",
          "local:s3_refused"),
    Drill("repro-twice", "a second `dvc repro` while one runs", "refused, nothing is made twice",
          "local:two_repros"),
    Drill("repro-killed", "SIGKILL of `dvc repro` at four points", "the next one completes, nothing half-made is left",
          "local:killed_repro"),
    Drill("undisturbed", "nothing, on two hosts", "bit-equal to two workers on one machine", "cluster:undisturbed",
          hosts=True),
    Drill("host-worker-killed", "SIGKILL of one of two workers", "both are started again", "cluster:kill_worker",
          hosts=True),
    Drill("host-killed", "power loss of a worker's host", "resumed on another host", "cluster:kill_node",
          hosts=True),
    Drill("head-killed", "power loss of the head", "the same command on a new head resumes", "cluster:kill_head",
          hosts=True),
    Drill("partition", "a training's host cut off, and back", "goes on elsewhere; the stale worker cannot publish",
          "cluster:partition", hosts=True),
    Drill("host-notice", "a node announced to go in 5 s, then gone", "saved on the notice, no failure counted",
          "cluster:notice_node", hosts=True),
    Drill("worker-hangs", "SIGSTOP of one worker of two", "given up and started again", "cluster:hang_worker",
          hosts=True),
    Drill("host-hangs", "SIGSTOP of everything on a host", "given up and started again on another",
          "cluster:hang_node", hosts=True),
    Drill("tracker-down", "SIGKILL of the MLflow server, and back", "training goes on, the curves are whole in the end",
          "cluster:tracker_down", hosts=True),
    Drill("elastic", "[1, 2] workers: a host lost for good, then another comes", "the other goes on alone, then both",
          "road:elastic", hosts=True),
    Drill("whole-road", "nothing, `dvc repro` of three families on two hosts", "outs and versions as of one machine",
          "road:laptop_to_registry", hosts=True),
)  # fmt: skip


def listing() -> list[dict[str, Any]]:
    """The table, for `dgm drill --list --json`."""
    return [
        {"name": drill.name, "does": drill.does, "holds": drill.holds, "hosts": drill.hosts, "short": drill.short}
        for drill in DRILLS
    ]


def chosen(names: Sequence[str], short: bool = False) -> list[Drill]:
    """The drills of these names, all of them without names. Raises ValueError for a name that is none."""
    known = {drill.name: drill for drill in DRILLS}
    for name in names:
        if name not in known:
            raise ValueError(f"drill {name!r}: no such drill{did_you_mean(name, known)}")
    return [drill for drill in DRILLS if (not names or drill.name in names) and (drill.short or not short)]


def run(
    names: Sequence[str] = (),
    repeat: int = 1,
    short: bool = False,
    log: Path | None = None,
    folder: Path | None = None,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Runs drills one after the other.

    Args:
        names: which; all by default.
        repeat: how often the whole set.
        short: only the short set.
        log: a file that gets one JSON line an attempt; the page beside it, of the same name, gets the table.
        folder: for the projects and logs of the drills; kept. By default only what a failed drill left is kept.
        say: gets one line a drill.
    Returns: for every attempt {drill, when, passed, seconds, recovery_s, lost_steps, commit, error}.
    Raises: ValueError for a wrong name; hosts.NoHosts when a named drill needs hosts that cannot be made.
    """
    from pipelines.drills import hosts, record
    from pipelines.drills.bench import Bench

    drills, attempts = chosen(names, short), []
    if any(drill.hosts for drill in drills):
        try:
            hosts.require()
        except hosts.NoHosts as error:
            if names:
                raise
            say(f"without the drills that need hosts: {error}")
            drills = [drill for drill in drills if not drill.hosts]
    home = folder or Path(tempfile.mkdtemp(prefix="dgm-drill-"))
    commit = _commit()
    for number in range(repeat):
        with Bench(home / str(number + 1)) as bench:
            for drill in drills:
                found = attempt(drill, bench) | {"commit": commit}
                attempts.append(found)
                say(line(found))
                if log:
                    with log.open("a") as file:
                        file.write(json.dumps(found, sort_keys=True) + "\n")
    if log and log.with_suffix(".md").is_file():
        record.update(log.with_suffix(".md"), log)
    if folder is None:
        _tidy(home, attempts, say)
    return attempts


def line(found: dict[str, Any]) -> str:
    """One attempt in words."""
    words = f"{'passed' if found['passed'] else 'FAILED'}  {found['drill']:<20} {found['seconds']:6.1f} s"
    if found["recovery_s"] is not None:
        words += f"  recovered in {found['recovery_s']:.1f} s"
    if found["lost_steps"] is not None:
        words += f"  {found['lost_steps']} steps taken again"
    return words + (f"\n{found['error']}" if found["error"] else "")


def attempt(drill: Drill, bench: Bench) -> dict[str, Any]:
    """One drill on a bench: what `run` returns, less the commit."""
    module, _, function = drill.run.partition(":")
    action = getattr(importlib.import_module(f"pipelines.drills.{module}"), function)
    found: dict[str, Any] = {"drill": drill.name, "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    error, outcome, started = "", None, time.monotonic()
    try:
        outcome = action(bench)
    except Exception as failure:  # the next drill runs all the same
        error = without_folders("".join(traceback.format_exception(failure, limit=-3)).strip())
        bench.reset()
    return found | {
        "passed": not error,
        "seconds": round(time.monotonic() - started, 1),
        "recovery_s": outcome.recovery_s if outcome else None,
        "lost_steps": outcome.lost_steps if outcome else None,
        "error": error,
    }


def without_folders(text: str) -> str:
    """A text whose files are named from the project's and the environment's folder on: a log goes to other machines."""
    from pipelines import paths

    return text.replace(f"{sys.prefix}/", "").replace(f"{paths.code()}/", "")


def _commit() -> str | None:
    """The commit of the code, with "+" when tracked files differ from it."""
    from pipelines import paths

    def git(*words: str) -> str | None:
        done = subprocess.run(["git", *words], cwd=paths.code(), capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    head, changes = git("rev-parse", "--short=12", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    return None if head is None else head + ("+" if changes else "")


def _tidy(home: Path, attempts: Sequence[dict[str, Any]], say: Callable[[str], None]) -> None:
    import shutil

    if all(attempt["passed"] for attempt in attempts):
        shutil.rmtree(home, ignore_errors=True)
    else:
        say(f"what the drills left is in {home}")
