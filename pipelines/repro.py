"""`dgm repro --jobs N`: `dvc repro` with independent trainings at the same time.

DVC runs one stage after the other. Its file locks allow several `dvc repro` of single stages at once, so the stages
that train run in waves, those of a wave together; one plain `dvc repro` does the rest.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipelines import paths
from pipelines.cluster import JobFailed
from pipelines.params import Params


def waves(params: Params, zoo: bool) -> list[list[str]]:
    """The stages that train, in groups whose members do not depend on each other."""
    # runs on codes come with the rest: they wait for the run that makes the codes
    runs = [
        key for key, run in params.runs.items() if key.startswith(paths.ZOO) == zoo and run.dataset in params.datasets
    ]
    if zoo:
        return [[f"train@{key.removeprefix(paths.ZOO)}" for key in runs]]
    before = [f"prepare@{key}" for key in sorted({params.run(key).dataset for key in runs} | set(params.extractors))]
    trained = [f"extractor@{key}" for key in params.extractors] + [f"train@{key}" for key in runs]
    return [before, trained]


def repro(params: Params, jobs: int, file: str = "dvc.yaml") -> None:
    """Brings the pipeline up to date with at most `jobs` stages at once.

    Raises: ValueError for a file that is no pipeline of this project; JobFailed naming the stages that failed.
    """
    if not (paths.root() / file).is_file() or Path(file).name != "dvc.yaml":
        raise ValueError(f"{file}: no dvc.yaml of this project; dvc.yaml and zoo/dvc.yaml are")
    zoo = Path(file).parent.name == "zoo"
    prefix = f"{file}:" if zoo else ""
    running: list[subprocess.Popen[str]] = []

    def run(stage: str) -> bool:
        command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "-s", prefix + stage]
        process = subprocess.Popen(
            command, cwd=paths.root(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        running.append(process)
        assert process.stdout is not None
        for line in process.stdout:
            print(f"{stage} | {line}", end="", flush=True)
        return process.wait() == 0

    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the stages below are ended, too
    try:
        for wave in waves(params, zoo):
            with ThreadPoolExecutor(jobs) as pool:
                good = list(pool.map(run, wave))
            failed = [stage for stage, fine in zip(wave, good, strict=True) if not fine]
            if failed:
                raise JobFailed(f"{', '.join(failed)}; what the others made is kept, the same command goes on")
        if subprocess.run([sys.executable, "-m", "dvc", "repro", file], cwd=paths.root(), check=False).returncode:
            raise JobFailed("dvc repro; its last lines say why, the same command goes on")
    finally:
        signal.signal(signal.SIGTERM, before)
        for process in running:
            process.terminate()
