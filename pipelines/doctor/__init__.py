"""`dgm doctor`: is everything that a run will need there? One finding a line, with the way to mend it.

Every check is a function of Params that yields findings. It runs in a thread with a time limit: one that raises or
hangs becomes a finding of its own ("unknown") and the next one runs. Probe objects carry a name that nobody else has
and are removed. What looks like a secret is masked in every finding, whoever wrote the words.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from pipelines.doctor import door, machine, storage, survey, tracker
from pipelines.doctor.common import Finding, mask_of, said
from pipelines.params import Params


@dataclass(frozen=True)
class Check:
    """A name for what fails outside its findings, the function, and its time limit in seconds."""

    name: str
    look: Callable[[Params], Iterable[Finding]]
    seconds: float = 20.0


def examine(params: Params, checks: Iterable[Check] | None = None) -> list[Finding]:
    """Runs every check, one after the other.

    Args:
        params: params.yaml.
        checks: `CHECKS` by default.

    Returns: the findings in the order of the checks, with secrets masked.
    """
    found = [finding for check in (CHECKS if checks is None else checks) for finding in _limited(check, params)]
    mask = mask_of(params)
    return [replace(each, found=mask(each.found), mend=mask(each.mend)) for each in found]


def line(finding: Finding) -> str:
    """The finding as one line of text."""
    mend = f" -> {finding.mend}" if finding.mend else ""
    return f"{finding.state:<8}{finding.check:<24} {finding.found}{mend}"


def _limited(check: Check, params: Params) -> list[Finding]:
    found: list[Finding] = []

    def look() -> None:
        try:
            for finding in check.look(params):
                found.append(finding)
        except Exception as error:  # whatever it is, the next check runs
            words = f"the check failed: {type(error).__name__}: {said(error)}"
            found.append(Finding(check.name, "unknown", words, "the words say what is missing, or it is a defect here"))

    thread = threading.Thread(target=look, name=f"dgm-doctor-{check.name}", daemon=True)
    thread.start()
    thread.join(check.seconds)
    if thread.is_alive():
        mend = "see whether what it asks is up; an object named dgm-doctor-* may have stayed behind"
        return [*found, Finding(check.name, "unknown", f"no answer within {check.seconds:g} s", mend)]
    return found


CHECKS = (
    Check("versions", machine.versions),
    Check("threads", machine.threads),
    Check("hostname", machine.hostname, 10),
    Check("telemetry", machine.telemetry),
    Check("git", machine.git),
    Check("dvc", machine.dvc),
    Check("disk", machine.disk),
    Check("memory", machine.memory),
    Check("storage rights", storage.storage_rights, 40),
    Check("dvc remote rights", storage.dvc_rights, 40),
    Check("clock (S3)", storage.s3_clock, 30),
    Check("tracking", tracker.tracking_server, 40),
    Check("mlflow artifacts", tracker.artifact_rights, 40),
    Check("token mode", door.token_mode),
    Check("token file", door.token_file),
    Check("token asked for", door.token_asked, 20),
    Check("dashboard address", door.dashboard, 10),
    Check("clock (cluster)", door.cluster_clock, 10),
    Check("cluster", survey.cluster_nodes, survey.NODES_S + 20),
)
