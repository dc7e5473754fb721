"""Promotion: which version is the champion, why, and who said so.

MLflow's aliases have no compare-and-set: of two that move one both succeed. The truth is therefore a ledger: a run
whose params '0001', '0002', ... are the promotions and rollbacks in order. MLflow refuses to change a param, in every
store, so of two who append the same number exactly one wins. The aliases `champion` and `previous` only follow the
ledger: whoever comes next mends them after a crash (`settle`), and an alias moved by hand goes back.

A model that was rolled back is no candidate any more (its numbers were good, that is how it came to be champion),
until `readmit`.
"""

from __future__ import annotations

import dataclasses
import getpass
import hashlib
import json
import math
import socket
import tempfile
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipelines import files, registration, tracking
from pipelines.tracking import RUN_DIGEST

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION, PREVIOUS = "champion", "previous"
VERDICT = "dgm.verdict"


class Lost(RuntimeError):
    """Somebody else moved the alias between the look and the entry."""


class Interval(Protocol):
    """What `dgm_models.metrics.estimate.Estimate` has."""

    @property
    def value(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


Difference = Callable[[Any, Any, Any], Interval]


# ---------------------------------------------------------------- the gate: pure


@dataclass(frozen=True)
class Gate:
    """What a challenger must show. In a metric's name `{model}` stands for the registered model, which is the dataset.

    Attributes:
        metric: the row that decides; lower is better. The lower end of champion minus challenger must be above 0.
        coverage: a row of higher-is-better, or None: the challenger must not be worse beyond the difference's interval.
        ceiling_fraction: a first champion's interval must lie below this fraction of the ceiling's value.
        ceiling: the row of the worst that is plausible (noise, or the data's mean); by default `<metric>/ceiling`.
        split: of the rows.
        copiers: a model whose `copies` row is flagged, a copier of training rows, may win.
    """

    metric: str = "fid/{model}"
    coverage: str | None = "recall/{model}"
    ceiling_fraction: float = 0.5
    ceiling: str = ""
    split: str = "test"
    copiers: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.ceiling_fraction <= 1:
            raise ValueError(f"ceiling_fraction: {self.ceiling_fraction!r} is not in (0, 1]")

    @property
    def ceiling_metric(self) -> str:
        return self.ceiling or f"{self.metric}/ceiling"

    def of(self, model: str) -> Gate:
        """The gate of one registered model."""
        coverage = self.coverage and self.coverage.replace("{model}", model)
        metric, ceiling = (name.replace("{model}", model) for name in (self.metric, self.ceiling))
        return dataclasses.replace(self, metric=metric, coverage=coverage, ceiling=ceiling)


@dataclass(frozen=True)
class Evaluation:
    """One model's evaluation as the gate sees it.

    Attributes:
        name: what a reader calls it, such as "version 3 (ddpm)".
        rows: of evaluation.json.
        real, fake: [n, d] features of the data and of the model's samples; None until they are needed.
    """

    name: str
    run_digest: str
    data_digest: str
    rows: Sequence[Mapping[str, Any]]
    real: Any = None
    fake: Any = None

    def row(self, metric: str, split: str) -> Mapping[str, Any] | None:
        """The row of a metric on a split, or None when it is missing, twice there, or holds no finite value."""
        found = [row for row in self.rows if row["metric"] == metric and row.get("split") == split]
        good = len(found) == 1 and _is_number(found[0].get("value"))
        return found[0] if good else None


@dataclass(frozen=True)
class Criterion:
    """One thing that was looked at."""

    name: str
    passed: bool
    reason: str
    numbers: Mapping[str, float]


@dataclass(frozen=True)
class Verdict:
    """What was decided and why.

    Attributes:
        passed: the challenger becomes, or became, the champion.
        others: one line for each other candidate.
    """

    passed: bool
    champion: str | None
    challenger: str | None
    criteria: tuple[Criterion, ...]
    others: tuple[str, ...] = ()

    @property
    def reasons(self) -> list[str]:
        return [f"{'passed' if each.passed else 'failed'}: {each.reason}" for each in self.criteria]

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """The same text for the same verdict."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"


def decide(champion: Evaluation | None, challenger: Evaluation, gate: Gate, difference: Difference) -> Verdict:
    """Whether a challenger may replace the champion; pure.

    Args:
        champion: None for a first champion, which is held against the ceiling.
        challenger: the candidate.
        gate: the rules.
        difference: (real, champion's fake, challenger's fake) -> the interval of metric(champion) - metric(challenger).

    Returns:
        a verdict whose criteria stop at the first reason why the two do not compare.
    """
    rival = None if champion is None else champion.name
    apart = _apart(champion, challenger, gate)
    if apart:
        return Verdict(False, rival, challenger.name, (Criterion("comparable", False, apart, {}),))
    if champion is None:
        criteria = [_below_ceiling(challenger, gate)]
    else:
        criteria = [_better(champion, challenger, gate, difference)]
        if gate.coverage:
            criteria.append(_not_worse(champion, challenger, gate.coverage, gate.split))
    if not gate.copiers and (row := challenger.row("copies", gate.split)) is not None:
        criteria.append(_no_copier(challenger, row))
    return Verdict(all(each.passed for each in criteria), rival, challenger.name, tuple(criteria))


def _apart(champion: Evaluation | None, challenger: Evaluation, gate: Gate) -> str:
    """Why the two do not compare, by name; empty when they do."""
    sides = [challenger] if champion is None else [champion, challenger]
    for metric in filter(None, (gate.metric, gate.coverage)):
        for side in sides:
            if side.row(metric, gate.split) is None:
                return f"{side.name} has no row {metric} of split {gate.split} with a value"
    if champion is None:
        return ""
    if champion.data_digest != challenger.data_digest:
        return f"data digests differ: {_pair(champion, champion.data_digest, challenger, challenger.data_digest)}"
    for metric in filter(None, (gate.metric, gate.coverage)):
        ours, theirs = champion.row(metric, gate.split), challenger.row(metric, gate.split)
        assert ours is not None and theirs is not None
        for key in ("kind", "n", "extractor_sha256"):  # a bound beside an estimate says nothing of which is lower
            if ours.get(key) != theirs.get(key):
                return f"{key} of {metric} differs: {_pair(champion, ours.get(key), challenger, theirs.get(key))}"
    return _features_apart(champion, challenger)


def _features_apart(champion: Evaluation, challenger: Evaluation) -> str:
    if champion.real is None or challenger.real is None:
        return ""  # not downloaded yet: `decide` is asked again with features
    for name in ("real", "fake"):
        ours, theirs = tuple(getattr(champion, name).shape), tuple(getattr(challenger, name).shape)
        if ours != theirs:
            return f"shapes of the {name} features differ: {_pair(champion, ours, challenger, theirs)}"
    largest = float(abs(champion.real - challenger.real).max())
    if largest > 1e-3 * float(champion.real.std()):  # rounding of another machine is far below
        return f"the real features of {champion.name} and {challenger.name} differ by up to {largest:.3g}"
    return ""


def _pair(champion: Evaluation, ours: Any, challenger: Evaluation, theirs: Any) -> str:
    return f"{champion.name} has {ours}, {challenger.name} has {theirs}"


def _below_ceiling(challenger: Evaluation, gate: Gate) -> Criterion:
    row, top = challenger.row(gate.metric, gate.split), challenger.row(gate.ceiling_metric, gate.split)
    assert row is not None
    name, high = f"{gate.metric} below {gate.ceiling_fraction:g} of the ceiling", row.get("high", math.nan)
    if top is None or top.get("n") != row.get("n"):
        why = "no row" if top is None else f"n = {top.get('n')}, not {row.get('n')}, in the row"
        return Criterion(name, False, f"{challenger.name} has {why} {gate.ceiling_metric}", {})
    if not _is_number(high):
        return Criterion(name, False, f"{challenger.name} has no interval for {gate.metric}", {})
    limit = gate.ceiling_fraction * top["value"]
    passed = high < limit
    text = f"{challenger.name}: {gate.metric} {_span(row['value'], row.get('low'), high)} "
    text += f"{'lies' if passed else 'does not lie'} below {limit:.4g} = {gate.ceiling_fraction:g} x {top['value']:.4g}"
    return Criterion(name, passed, text, {"value": row["value"], "high": high, "limit": limit, "ceiling": top["value"]})


def _no_copier(challenger: Evaluation, row: Mapping[str, Any]) -> Criterion:
    flagged = bool(row.get("flag"))
    text = f"{challenger.name}: {'flagged as' if flagged else 'not flagged as'} a copier of training rows, "
    text += f"estimated share {_span(row['value'], row.get('low'), row.get('high'))}"
    return Criterion("no copier", not flagged, text, {"share": row["value"]})


def _better(champion: Evaluation, challenger: Evaluation, gate: Gate, difference: Difference) -> Criterion:
    found = difference(champion.real, champion.fake, challenger.fake)
    numbers = {"value": float(found.value), "low": float(found.low), "high": float(found.high)}
    ours, theirs = champion.row(gate.metric, gate.split), challenger.row(gate.metric, gate.split)
    assert ours is not None and theirs is not None
    numbers |= {"champion": ours["value"], "challenger": theirs["value"]}
    passed = numbers["low"] > 0
    text = f"{gate.metric} of {challenger.name} {'is' if passed else 'is not'} lower beyond the interval: "
    text += f"the difference is {_span(found.value, found.low, found.high)}"
    return Criterion(f"{gate.metric} better", passed, text, numbers)


def _not_worse(champion: Evaluation, challenger: Evaluation, metric: str, split: str) -> Criterion:
    """Fails when the interval of challenger minus champion lies below 0.

    Source: Zou, Donner 2008 (MOVER): the interval of a difference from two intervals of independent estimates.
    """
    ours, theirs = champion.row(metric, split), challenger.row(metric, split)
    assert ours is not None and theirs is not None
    gap = theirs["value"] - ours["value"]
    up = math.hypot(_reach(theirs, "high"), _reach(ours, "low"))
    down = math.hypot(_reach(theirs, "low"), _reach(ours, "high"))
    passed = gap + up >= 0
    text = f"{metric} of {challenger.name} {'is not' if passed else 'is'} worse beyond the interval: "
    text += f"the difference is {_span(gap, gap - down, gap + up)}"
    numbers = {"value": gap, "low": gap - down, "high": gap + up}
    return Criterion(
        f"{metric} not worse", passed, text, {**numbers, "champion": ours["value"], "challenger": theirs["value"]}
    )


def _reach(row: Mapping[str, Any], end: str) -> float:
    return abs(float(row[end]) - float(row["value"])) if _is_number(row.get(end)) else 0.0


def _span(value: float, low: Any, high: Any) -> str:
    ends = f" [{low:.4g}, {high:.4g}]" if _is_number(low) and _is_number(high) else ""
    return f"{value:.4g}{ends}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# ---------------------------------------------------------------- the ledger


@dataclass(frozen=True)
class Place:
    """A model in the ledger: the digests identify it, the number is only this server's."""

    version: str
    run: str
    run_digest: str
    evaluation_sha256: str


@dataclass(frozen=True)
class Entry:
    """One promotion or rollback.

    Attributes:
        id: stays the same on every server; two tries of one promotion differ.
        action: "promote" or "rollback".
        source, to: the champion before (None for the first) and after.
        by, time: who, and when in UTC.
        verdict: the SHA-256 of the verdict, `verdicts/<first 16 digits>.json` of the ledger's run; "" for a rollback.
    """

    id: str
    action: str
    source: Place | None
    to: Place
    by: str
    time: str
    verdict: str

    def to_json(self) -> str:
        fields = dataclasses.asdict(self)
        return json.dumps({"from": fields.pop("source"), **fields}, sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Entry:
        fields = json.loads(text)
        source, to = fields.pop("from"), fields.pop("to")
        return Entry(source=Place(**source) if source else None, to=Place(**to), **fields)


def history(model_name: str, *, uri: str | None = None) -> list[Entry]:
    """All promotions and rollbacks of a model, oldest first."""
    mlflow = tracking.client(uri)
    return _read(mlflow, registration.ledger_run(mlflow, model_name))


def _read(mlflow: MlflowClient, ledger: str) -> list[Entry]:
    params = mlflow.get_run(ledger).data.params
    numbers = sorted(int(key) for key in params if key.isdigit())
    if numbers != list(range(1, len(numbers) + 1)):
        raise ValueError(f"the ledger (run {ledger}) has gaps: {numbers}")
    return [Entry.from_json(params[f"{number:04d}"]) for number in numbers]


def _append(mlflow: MlflowClient, ledger: str, number: int, entry: Entry) -> None:
    """Writes entry `number`: the compare-and-set.

    Raises:
        Lost: somebody else wrote that number.
    """
    from mlflow.exceptions import MlflowException

    key = f"{number:04d}"
    try:
        mlflow.log_param(ledger, key, entry.to_json())
    except MlflowException:
        # Ask what is there: an answer may have been lost after the entry was written, and errors have many causes.
        written = mlflow.get_run(ledger).data.params.get(key)
        if written is None:
            raise
        if Entry.from_json(written).id != entry.id:
            other = Entry.from_json(written).to
            text = f"lost: somebody promoted version {other.version} ({other.run}) meanwhile; run again"
            raise Lost(text) from None


def _standing(entries: Sequence[Entry]) -> list[Place]:
    """The champions that a rollback may go back to, the present one last."""
    stack: list[Place] = []
    for entry in entries:
        if entry.action == "rollback":
            stack.pop()
        else:
            stack.append(entry.to)
    return stack


def _barred(entries: Sequence[Entry]) -> set[str]:
    """Run digests of models whose last mention is that they were rolled back."""
    barred: set[str] = set()
    for entry in entries:
        if entry.action == "rollback" and entry.source:
            barred.add(entry.source.run_digest)
        barred.discard(entry.to.run_digest)
    return barred


def settle(mlflow: MlflowClient, model_name: str) -> list[str]:
    """Makes the aliases follow the ledger, after a crash or a hand that moved one.

    The ledger is read again after every change: a slow process would otherwise put back what a later promotion set.

    Returns:
        one line for each change, or for a champion that is not there.
    """
    ledger = registration.ledger_run(mlflow, model_name)
    done: list[str] = []
    while True:
        entries = _read(mlflow, ledger)
        stack = _standing(entries)
        wanted = {CHAMPION: stack[-1] if stack else None, PREVIOUS: stack[-2] if len(stack) > 1 else None}
        aliases = {name: str(number) for name, number in mlflow.get_registered_model(model_name).aliases.items()}
        for alias, place in wanted.items():
            version = _version_of(mlflow, model_name, place) if place else None
            number = str(version.version) if version else None
            if place and number is None:
                text = f"{model_name}: the {alias} by the ledger ({place.run}) has no version; sync its receipt"
                done += [text] * (text not in done)
            elif number != aliases.get(alias):
                if number is None:
                    mlflow.delete_registered_model_alias(model_name, alias)
                else:
                    mlflow.set_registered_model_alias(model_name, alias, number)
                done.append(f"{model_name}: alias {alias} {aliases.get(alias, 'none')} -> {number or 'none'}")
        if len(_read(mlflow, ledger)) == len(entries):
            return done


def _version_of(mlflow: MlflowClient, model_name: str, place: Place) -> ModelVersion | None:
    return registration.find(mlflow, model_name, place.run_digest, place.evaluation_sha256)


def _place(version: ModelVersion) -> Place:
    tags = version.tags
    return Place(str(version.version), tags["dgm.run"], tags[RUN_DIGEST], tags[registration.EVALUATION])


def _entry(action: str, source: Place | None, to: Place, by: str | None, verdict: str) -> Entry:
    who = by or f"{getpass.getuser()}@{socket.gethostname()}"
    time = datetime.now(UTC).isoformat(timespec="seconds")
    return Entry(uuid.uuid4().hex, action, source, to, who[:200], time, verdict)


def _write_receipt(path: Path | None, model_name: str, entries: Sequence[Entry]) -> None:
    if path is None:
        return
    stack = _standing(entries)
    told = [json.loads(entry.to_json()) for entry in entries]
    champion = dataclasses.asdict(stack[-1]) if stack else None
    document = {"kind": "promotion", "model": model_name, "champion": champion, "history": told}
    if not (path.exists() and files.read_json(path) == document):
        files.write_json(path, document)


def follow(mlflow: MlflowClient, receipt: Mapping[str, Any]) -> list[str]:
    """Appends to a server's ledger what a promotion receipt knows beyond it; see `registration.sync`.

    Only forward, as git's fast-forward: the ledger must be the beginning of the receipt's history.
    """
    model = receipt["model"]
    told = [Entry.from_json(json.dumps(each)) for each in receipt["history"]]
    if not told:
        return []
    try:
        ledger = registration.ledger_run(mlflow, model)
    except ValueError as error:
        return [f"{model}: promotions not done: {error}"]
    known = [entry.id for entry in _read(mlflow, ledger)]
    ids = [entry.id for entry in told]
    if known[: len(ids)] == ids:
        return []
    if ids[: len(known)] != known:
        return [f"{model}: promotions not done: this server's ledger tells another story; promote there"]
    done = []
    for number, entry in enumerate(told[len(known) :], start=len(known) + 1):
        places = {}
        for name, place in (("source", entry.source), ("to", entry.to)):
            version = _version_of(mlflow, model, place) if place else None
            places[name] = dataclasses.replace(place, version=str(version.version)) if place and version else place
        _append(mlflow, ledger, number, dataclasses.replace(entry, **places))  # type: ignore[arg-type]
        done.append(f"{model}: ledger {number:04d}: {entry.action} {entry.to.run}")
    return done


# ---------------------------------------------------------------- promote and roll back


def promote(
    model_name: str,
    gate: Gate,
    *,
    receipt: Path | None = None,
    candidates: Iterable[Path] | None = None,
    difference: Difference | None = None,
    by: str | None = None,
    restart: bool = False,
    readmit: bool = False,
    uri: str | None = None,
) -> Verdict:
    """Moves `champion` to the best version that passes the gate, if one does.

    Candidates are tried by the value of `gate.metric`, best first, so that the order of registration does not matter;
    equal values by their digests. The champion is measured by its own evaluation or, where that does not compare (a
    new n, a new extractor), by another version of the same run that does.

    Args:
        model_name: the registered model.
        gate: the rules; a `{model}` in its names is filled in.
        receipt: where to write the history, for `sync`.
        candidates: receipts of the versions that may win; all versions by default.
        difference: see `decide`; `dgm_models.metrics.frechet.frechet_difference` by default.
        by: who; user@host by default.
        restart: judge as if there were no champion (after the data or the evaluation changed).
        readmit: consider models that were rolled back.
        uri: the tracker.

    Returns:
        the verdict on the new champion, or on the best candidate when none passed.

    Raises:
        Lost: somebody else promoted meanwhile; run again.
        ValueError: no such model; a champion whose version is gone; candidates that do not compare with each other.
    """
    mlflow = tracking.client(uri)
    ledger = registration.ledger_run(mlflow, model_name)
    settle(mlflow, model_name)
    entries = _read(mlflow, ledger)
    stack = _standing(entries)
    champion = stack[-1] if stack and not restart else None
    versions = registration.versions(mlflow, model_name)
    of_run = [each for each in versions if champion and each.tags[RUN_DIGEST] == champion.run_digest]
    if champion and not of_run:
        raise ValueError(f"{model_name}: the champion ({champion.run}) has no version: sync its receipt, or restart")
    of_run.sort(key=lambda each: each.tags[registration.EVALUATION] != (champion and champion.evaluation_sha256))
    allowed = None if candidates is None else _identities(candidates, model_name)
    barred = set() if readmit else _barred(entries)
    pool = [each for each in versions if each not in of_run and (allowed is None or _identity(each) in allowed)]
    others = [f"{_title(each)}: was rolled back" for each in pool if each.tags[RUN_DIGEST] in barred]
    pool = [each for each in pool if each.tags[RUN_DIGEST] not in barred]

    with tempfile.TemporaryDirectory(prefix="dgm-promote-") as work:
        judge = _Judge(mlflow, gate.of(model_name), difference or _frechet_difference, of_run, Path(work))
        verdict, winner = judge.best(pool)
    verdict = dataclasses.replace(verdict, others=tuple(others) + verdict.others)
    if winner is None or (stack and _place(winner).run_digest == stack[-1].run_digest):
        if winner is not None:  # after a restart the champion may win again
            reason = Criterion("another model", False, f"{_title(winner)} is the champion already", {})
            verdict = dataclasses.replace(verdict, passed=False, criteria=(*verdict.criteria, reason))
        _keep(mlflow, ledger, verdict)
    else:
        _keep(mlflow, ledger, verdict)  # before the entry, which must not point to nothing
        entry = _entry("promote", stack[-1] if stack else None, _place(winner), by, verdict.digest)
        _append(mlflow, ledger, len(entries) + 1, entry)
        entries = [*entries, entry]
    judged = winner or judge.first
    if judged is not None:
        text = f"{'promoted' if verdict.passed else 'refused'}: {'; '.join(verdict.reasons)}"
        mlflow.set_model_version_tag(model_name, str(judged.version), VERDICT, text[:1000])
    settle(mlflow, model_name)
    _write_receipt(receipt, model_name, entries)
    return verdict


def rollback(model_name: str, *, by: str | None = None, receipt: Path | None = None, uri: str | None = None) -> Entry:
    """Goes back to the champion before; a second time to the one before that.

    Returns:
        the ledger's new entry.

    Raises:
        Lost: somebody else promoted meanwhile.
        ValueError: there is no champion before, or its version is gone.
    """
    mlflow = tracking.client(uri)
    ledger = registration.ledger_run(mlflow, model_name)
    entries = _read(mlflow, ledger)
    stack = _standing(entries)
    if len(stack) < 2:
        raise ValueError(f"{model_name}: {'the first champion' if stack else 'no champion'}: nothing to go back to")
    version = _version_of(mlflow, model_name, stack[-2])
    if version is None:
        raise ValueError(f"{model_name}: the champion before ({stack[-2].run}) has no version: sync its receipt")
    entry = _entry("rollback", stack[-1], _place(version), by, "")
    _append(mlflow, ledger, len(entries) + 1, entry)
    settle(mlflow, model_name)
    _write_receipt(receipt, model_name, [*entries, entry])
    return entry


def _frechet_difference(real: Any, champion: Any, challenger: Any) -> Interval:
    from dgm_models.metrics.frechet import frechet_difference

    return frechet_difference(real, champion, challenger)


def _identity(version: ModelVersion) -> tuple[str, str]:
    return version.tags[RUN_DIGEST], version.tags[registration.EVALUATION]


def _identities(receipts: Iterable[Path], model_name: str) -> set[tuple[str, str]]:
    documents = [registration.read_receipt(path) for path in receipts]
    return {
        (each["run_digest"], each["evaluation_sha256"])
        for each in documents
        if each["kind"] == "version" and each["model"] == model_name
    }


def _title(version: ModelVersion) -> str:
    return f"version {version.version} ({version.tags['dgm.run']})"


def _keep(mlflow: MlflowClient, ledger: str, verdict: Verdict) -> None:
    mlflow.log_text(ledger, verdict.to_json(), f"verdicts/{verdict.digest[:16]}.json")


def _line(verdict: Verdict) -> str:
    return f"{verdict.challenger}: {'; '.join(verdict.reasons)}"


class _Judge:
    """Downloads what the gate must see, no more than once and features only of those that it really compares."""

    def __init__(
        self, mlflow: MlflowClient, gate: Gate, difference: Difference, champions: list[ModelVersion], work: Path
    ) -> None:
        self.mlflow, self.gate, self.difference, self.champions, self.work = mlflow, gate, difference, champions, work
        self.first: ModelVersion | None = None  # the best candidate
        self._seen: dict[str, Evaluation] = {}

    def best(self, pool: list[ModelVersion]) -> tuple[Verdict, ModelVersion | None]:
        """The verdict on the best of `pool` that passes, and it; or the verdict on the best, and None."""
        rival = _title(self.champions[0]) if self.champions else None
        ranked, others = self._ranked(pool)
        if not ranked:
            reason = Criterion("challenger", False, "there is no challenger that the gate could judge", {})
            return Verdict(False, rival, None, (reason,), tuple(others)), None
        if not self.champions:
            self._must_compare(ranked)
        self.first = ranked[0]
        refused: list[Verdict] = []
        for version in ranked:
            if refused and self._is_behind(version):
                others.append(f"{_title(version)}: its {self.gate.metric} is no lower than the champion's")
                continue
            verdict = self._judge(version)
            if verdict.passed:
                return dataclasses.replace(verdict, others=(*others, *map(_line, refused))), version
            refused.append(verdict)
        return dataclasses.replace(refused[0], others=(*others, *map(_line, refused[1:]))), None

    def _ranked(self, pool: list[ModelVersion]) -> tuple[list[ModelVersion], list[str]]:
        keys: dict[tuple[float, str, str], ModelVersion] = {}
        others = []
        for version in pool:
            try:
                evaluation = self._rows(version)
            except ValueError as error:
                others.append(f"{_title(version)}: {error}")
                continue
            apart = _apart(self._champion_for(evaluation), evaluation, self.gate)
            row = evaluation.row(self.gate.metric, self.gate.split)
            if apart or row is None:
                others.append(f"{_title(version)}: {apart}")
            else:
                keys[(float(row["value"]), *_identity(version))] = version
        return [keys[key] for key in sorted(keys)], others

    def _must_compare(self, ranked: list[ModelVersion]) -> None:
        first = self._rows(ranked[0])
        for version in ranked[1:]:
            apart = _apart(first, self._rows(version), self.gate)
            if apart:
                raise ValueError(f"the candidates for a first champion do not compare: {apart}; name the candidates")

    def _champion_for(self, challenger: Evaluation) -> Evaluation | None:
        found = [self._rows(version) for version in self.champions]
        fitting = [each for each in found if not _apart(each, challenger, self.gate)]
        both = fitting or found
        return both[0] if both else None

    def _is_behind(self, version: ModelVersion) -> bool:
        challenger = self._rows(version)
        rival = self._champion_for(challenger)
        ours = rival and rival.row(self.gate.metric, self.gate.split)
        theirs = challenger.row(self.gate.metric, self.gate.split)
        return bool(ours and theirs and theirs["value"] >= ours["value"])

    def _judge(self, version: ModelVersion) -> Verdict:
        challenger = self._rows(version)
        rival = self._champion_for(challenger)
        try:
            if rival is None:
                verdict = decide(None, challenger, self.gate, self.difference)
            else:
                champion = next(each for each in self.champions if _title(each) == rival.name)
                verdict = decide(self._whole(champion), self._whole(version), self.gate, self.difference)
            if verdict.passed:  # a champion that nobody can load would be none
                registration.fetch_part(self.mlflow, version, "artifact", self.work / f"artifact-{version.version}")
        except ValueError as error:  # damaged files, or too few rows for the difference
            reason = Criterion("comparable", False, f"{challenger.name} cannot be judged: {error}", {})
            return Verdict(False, rival.name if rival else None, challenger.name, (reason,))
        return verdict

    def _rows(self, version: ModelVersion) -> Evaluation:
        """Rows and digests from the version's own verified files; its tags must say the same."""
        title = _title(version)
        if title not in self._seen:
            names = ("evaluation/evaluation.json", "artifact/spec.json")
            rows, spec = registration.fetch_documents(self.mlflow, version, *names)
            lineage = spec["lineage"]
            if lineage["run_digest"] != version.tags[RUN_DIGEST]:
                raise ValueError(f"{title}: its tag {RUN_DIGEST} is not what its spec.json says")
            self._seen[title] = Evaluation(title, lineage["run_digest"], lineage["data_digest"], rows)
        return self._seen[title]

    def _whole(self, version: ModelVersion) -> Evaluation:
        from safetensors.torch import load_file

        evaluation = self._rows(version)
        folder = registration.fetch_part(self.mlflow, version, "evaluation", self.work / f"{version.version}")
        features = load_file(folder / "features.safetensors")
        return dataclasses.replace(evaluation, real=features["real"], fake=features["fake"])
