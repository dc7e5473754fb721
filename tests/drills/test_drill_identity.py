"""What a training's digest follows: a changed run is another run, whatever the store holds."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.support import project


def test_changed_params_never_resume_an_old_run(tmp_path: Path) -> None:
    """The digest, which is the run store's folder, follows every parameter of the run and none of the cluster's."""
    script = (
        "from pipelines import params as p; from pipelines.stages.train import job_of\n"
        "params = p.load(); print(job_of(params.run('vae'), params).digest)"
    )
    digests = []
    for old, new in (("", ""), ("lr: 2.0e-3", "lr: 2.1e-3"), ("workers: 1", "workers: 2")):
        folder = project.make(tmp_path / str(len(digests)), project.PARAMS.replace(old, new) if old else project.PARAMS)
        project.dgm(folder, "prepare", "digits")
        digests.append(project.run(folder, sys.executable, "-c", script).stdout.strip())
    written, changed, wider = digests
    assert changed != written and wider == written
