"""A stage as a job: what travels, what does not, and what the same work submitted twice is."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines import params as settings
from pipelines.cluster import JobFailed, submission
from pipelines.cluster.submission import Work
from tests.support import project

CLUSTER = "cluster: {address: 'http://head:8265', storage: 's3://bucket/runs', workers: 2}"
TEXT = project.PARAMS.replace("cluster: {storage: .dgm/store, workers: 1}", CLUSTER)


class Jobs:
    """A job server: states by id, and what was asked of it."""

    def __init__(self, states: dict[str, str]) -> None:
        self.states, self.submitted = dict(states), []
        self.files: dict[str, str] = {}

    def get_job_status(self, id: str) -> Any:
        if id not in self.states:
            raise RuntimeError(f"Request failed with status code 404: Job {id} does not exist")
        return SimpleNamespace(value=self.states[id])

    def submit_job(self, submission_id: str, **given: Any) -> None:
        if submission_id in self.states:
            raise RuntimeError(f"Job with submission_id {submission_id} already exists")
        folder = Path(given["runtime_env"]["working_dir"])
        self.files = {
            path.relative_to(folder).as_posix(): path.read_text(errors="replace")
            for path in folder.rglob("*")
            if path.is_file()
        }
        self.submitted.append({"id": submission_id, **given})
        self.states[submission_id] = "PENDING"


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    folder = project.make(tmp_path / "project", TEXT)
    monkeypatch.setenv("DGM_ROOT", str(folder))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    manifest = folder / "data" / "digits" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{}")
    (manifest.parent / "part.parquet").write_text("rows")
    return Work("train", "vae", "abc123", (manifest,), 300)


def _submit(work: Work, jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(submission, "client", lambda cluster: jobs)
    return submission.submit(work, settings.load())


def test_job_takes_code_params_and_inputs_but_no_rows(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = Jobs({})
    assert _submit(work, jobs, monkeypatch) == "dgm-train-abc123"
    (given,) = jobs.submitted
    assert given["entrypoint"] == "python -m pipelines train vae --store-only"
    assert {"params.yaml", "job.json", "dgm_models/noise.py", "data/digits/manifest.json"} <= set(jobs.files)
    assert not [name for name in jobs.files if name.endswith((".parquet", ".pyc")) or name.startswith((".git", ".dgm"))]
    ticket = json.loads(jobs.files["job.json"])
    assert ticket["digest"] == "abc123" and set(ticket["git"]) == {"git_commit", "git_dirty"}


def test_job_environment_holds_no_secret(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN", "MLFLOW_TRACKING_TOKEN", "AWS_ENDPOINT_URL"):
        monkeypatch.setenv(name, "hush")
    jobs = Jobs({})
    _submit(work, jobs, monkeypatch)
    assert "hush" not in json.dumps(jobs.submitted[0]["runtime_env"]["env_vars"])
    assert "hush" not in "".join(jobs.files.values())


@pytest.mark.parametrize("state", ["PENDING", "RUNNING"])
def test_same_work_attaches_to_the_running_job(work: Work, monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    jobs = Jobs({work.id: state})
    assert _submit(work, jobs, monkeypatch) == work.id
    assert not jobs.submitted


@pytest.mark.parametrize("state", ["FAILED", "STOPPED", "SUCCEEDED"])
def test_ended_job_is_kept_and_followed_by_another(work: Work, monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    jobs = Jobs({work.id: state})
    assert _submit(work, jobs, monkeypatch) == f"{work.id}-2" and jobs.states[work.id] == state
    assert _submit(work, jobs, monkeypatch) == f"{work.id}-2", "attached to the second attempt"
    jobs.states[f"{work.id}-2"] = state
    assert _submit(work, jobs, monkeypatch) == f"{work.id}-3"


def test_submitter_that_comes_second_attaches(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    class Racing(Jobs):
        def submit_job(self, submission_id: str, **given: Any) -> None:
            self.states[submission_id] = "RUNNING"  # the other one was quicker
            super().submit_job(submission_id, **given)

    assert _submit(work, Racing({}), monkeypatch) == work.id


@pytest.mark.parametrize("refusals", [2, 100])
def test_head_without_an_agent_is_asked_again_for_a_while(
    work: Work, monkeypatch: pytest.MonkeyPatch, refusals: int
) -> None:
    class Starting(Jobs):
        refused = 0

        def submit_job(self, submission_id: str, **given: Any) -> None:
            if self.refused < refusals:
                self.refused += 1
                raise RuntimeError("Request failed with status code 500: No available agent to submit job")
            super().submit_job(submission_id, **given)

    clock = iter(range(1000))
    monkeypatch.setattr(submission.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(submission.time, "sleep", lambda seconds: None)
    jobs = Starting({})
    if refusals == 2:
        assert _submit(work, jobs, monkeypatch) == work.id and len(jobs.submitted) == 1
    else:
        with pytest.raises(ValueError, match=r"not taken: .*No available agent"):
            _submit(work, jobs, monkeypatch)


def test_store_in_a_folder_is_refused_before_anything_is_sent(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = Jobs({})
    monkeypatch.setattr(submission, "client", lambda cluster: jobs)
    found = settings.parse({"cluster": {"address": "http://head:8265", "storage": ".dgm/store"}})
    with pytest.raises(ValueError, match=r"cluster.storage: '.dgm/store' is a folder of this machine"):
        submission.submit(work, found)
    assert not jobs.submitted


def test_address_of_no_job_server_names_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ValueError, match=r"cluster\.address: no job server"):
        submission.client(settings.Cluster())
    with pytest.raises(ValueError, match=r"http://127.0.0.1:9 does not take jobs"):
        submission.client(settings.Cluster(address="http://127.0.0.1:9"))


def test_cluster_with_another_digest_stops(work: Work) -> None:
    submission.check_digest("anything")  # outside of a job nothing is compared
    folder = work.inputs[0].parents[2]
    (folder / "job.json").write_text(json.dumps({"digest": "abc123", "git": {}, "versions": {"torch": "1.0"}}))
    submission.check_digest("abc123")
    with pytest.raises(ValueError, match="this cluster computes the digest other, the submitter abc123"):
        submission.check_digest("other")


def test_failed_job_shows_the_last_lines_and_the_way_on(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Jobs):
        async def tail_job_logs(self, id: str) -> Any:
            for chunk in ("first line\n", "step 7: the gradient is not finite\n"):
                yield chunk
            self.states[work.id] = "FAILED"

    found = settings.load()
    jobs = Failing({work.id: "RUNNING"})
    monkeypatch.setattr(submission, "client", lambda cluster: jobs)
    monkeypatch.setattr(submission, "place", lambda uri: submission_place(work.inputs[0].parent))
    with pytest.raises(JobFailed, match=r"(?s)FAILED.*the gradient is not finite.*same command resumes"):
        submission.wait(work.id, work, found)


def submission_place(folder: Path) -> Any:
    from pipelines.storage import place

    return place(folder)


def test_broken_log_connection_repeats_no_line(work: Work) -> None:
    class Breaking(Jobs):
        times = 0

        async def tail_job_logs(self, id: str) -> Any:
            self.times += 1
            yield "one\n"
            if self.times == 1:
                raise RuntimeError("closed")
            yield "two\n"
            self.states[id] = "SUCCEEDED"

    shown: list[str] = []
    jobs = Breaking({work.id: "RUNNING"})
    with submission._followed(jobs, work.id, shown.append):
        assert submission._end_of(jobs, work.id) == "SUCCEEDED"
    assert "".join(shown) == "one\ntwo\n" and jobs.times == 2


def test_job_is_found_by_id_beginning_and_run(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"id": "dgm-train-aa", "run": "vae"}, {"id": "dgm-train-ab", "run": "gan"}]
    monkeypatch.setattr(submission, "listing", lambda cluster: rows)
    cluster = settings.Cluster()
    assert submission.find(cluster, "dgm-train-aa") == submission.find(cluster, "vae") == "dgm-train-aa"
    assert submission.find(cluster, "dgm-train-ab") == "dgm-train-ab"
    for words in ("dgm-train-a", "other"):
        with pytest.raises(ValueError, match=r"dgm-train-aa \(vae\), dgm-train-ab \(gan\)"):
            submission.find(cluster, words)
