"""Laws of the game: who is trained by whom, and what the registry promises."""

from __future__ import annotations

import ast
import inspect
import re

import pytest
import torch

from dgm_models import registry
from dgm_models.construct import ConfigError
from dgm_models.method import build
from dgm_models.objective import Loss, Objective
from dgm_models.protocols import KINDS, DataSpec, capabilities
from dgm_models.training.trainer import Train
from tests.laws import cases
from tests.laws.cases import CASES, FIRST, ROOT, ROWS, SPECS, Case

pytestmark = pytest.mark.filterwarnings("error")


def gradients_by_turn(method, steps: int = 3) -> list[dict[str, bool]]:
    """For each turn: parameter's name -> whether its gradient was ever not zero. Every step takes every turn here."""
    now = [-1]

    def after(index: int, model: object, loss: Loss) -> Loss:
        now[0] = index
        return loss

    cases.intercept(method, after)
    seen: list[dict[str, bool]] = [{} for _ in method.objective.turns()]
    for name, parameter in method.model.named_parameters():

        def note(p: torch.nn.Parameter, name: str = name) -> None:
            seen[now[0]][name] = seen[now[0]].get(name, False) or bool((p.grad != 0).any())

        parameter.register_post_accumulate_grad_hook(note)
    every = max(turn.every for turn in method.objective.turns())
    # a large rate moves layers that begin at zero, so that the gradient reaches what lies before them
    cases.trainer(method, Train(steps=max(steps, every + 1), batch_size=8), {"lr": 0.02}).run()
    return seen


def owners(method) -> dict[str, str]:
    """Parameter's name -> player; every parameter belongs to exactly one."""
    names = {id(p): name for name, p in method.model.named_parameters()}
    found: dict[str, str] = {}
    for player, module in method.model.players().items():
        for p in module.parameters():
            assert names[id(p)] not in found, f"{names[id(p)]} belongs to {found[names[id(p)]]} and to {player}"
            found[names[id(p)]] = player
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_players_hold_every_parameter_once(case: Case) -> None:
    method = cases.made(case)
    assert owners(method).keys() == dict(method.model.named_parameters()).keys()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_players_get_gradients_in_their_own_turns_and_in_no_other(case: Case) -> None:
    method = cases.made(case)
    owner, seen = owners(method), gradients_by_turn(method)
    own: dict[str, bool] = {}
    for turn, found in zip(method.objective.turns(), seen, strict=True):
        assert {owner[name] for name in found} <= {turn.player}
        own |= {name: own.get(name, False) or moved for name, moved in found.items()}
    learned = {name: p for name, p in method.model.named_parameters() if p.requires_grad}
    assert own.keys() == learned.keys()
    # matrices must see a gradient that is not zero; a vector may not (a critic's last bias cancels in a difference)
    assert [name for name, p in learned.items() if p.ndim >= 2 and not own[name]] == []
    assert all(p.requires_grad and p.grad is None for p in learned.values())


def test_players_twin_with_a_disconnected_layer_is_caught() -> None:
    method = cases.made(Case("vae/vae", "vector:discrete"))
    method.model.unused = torch.nn.Linear(2, 2)
    assert "unused.weight" not in gradients_by_turn(method)[0]


def test_players_twin_that_trains_everyone_in_every_turn_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import contextmanager

    from dgm_models.training import trainer

    @contextmanager
    def everyone(players, active):
        yield dict(players[active])

    monkeypatch.setattr(trainer, "_only", everyone)
    method = cases.made(Case("gan/non_saturating", "vector:discrete"))
    owner, seen = owners(method), gradients_by_turn(method)
    assert {owner[name] for name in seen[1]} == {"critic", "generator"}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_capabilities_are_what_the_row_says(case: Case) -> None:
    assert sorted(capabilities(cases.made(case).model)) == sorted(case.row.capabilities)


@pytest.mark.parametrize("name", ROWS)
def test_row_refuses_the_data_that_it_does_not_list(name: str) -> None:
    refused = 0
    for kind in KINDS:
        for sort in ("discrete", "real"):
            if f"{kind}:{sort}" in ROWS[name].data:
                continue
            shape = (1, 4, 4) if kind == "image" else (4,)
            spec = DataSpec(kind, shape, 5 if sort == "discrete" else None, classes=3)
            with pytest.raises(
                ConfigError, match=rf"runs\.x\.method\.name: {name} models .*this data is {kind}:{sort}"
            ):
                build(name, spec, where="runs.x.method")
            refused += 1
    assert refused + len(ROWS[name].data) == 2 * len(KINDS)


@pytest.mark.parametrize("name", ROWS)
def test_row_names_data_that_the_laws_can_build(name: str) -> None:
    assert ROWS[name].data
    assert set(ROWS[name].data) <= set(SPECS)


def swapped(key: str) -> str:
    """The key with two neighbouring letters exchanged, as a hand does."""
    for i in range(len(key) - 2, -1, -1):
        if key[i] != key[i + 1]:
            return key[:i] + key[i + 1] + key[i] + key[i + 2 :]
    return key + "x"


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_unknown_key_names_its_path_and_the_nearest_key(case: Case) -> None:
    keys = [key for key in inspect.signature(registry.builder(case.method)).parameters if key != "data"]
    assert keys
    for key in keys:
        wrong = swapped(key)
        message = f'runs.x.method.{wrong}: unknown key; did you mean "{key}"?'
        with pytest.raises(ConfigError, match=re.escape(message)):
            build(case.method, case.spec, where="runs.x.method", **{wrong: 1})
    if "network" in keys:
        message = 'runs.x.method.network.widht: unknown key; did you mean "width"?'
        with pytest.raises(ConfigError, match=re.escape(message)):
            build(case.method, case.spec, where="runs.x.method", network={"name": "mlp", "widht": 8})


def test_unknown_method_names_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="'gan/wgan_pg' is not registered; did you mean \"gan/wgan_gp\""):
        registry.row("gan/wgan_pg")
    with pytest.raises(ConfigError, match="is not registered"):
        registry.row(["gan/wgan_gp"])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ROWS)
def test_objective_counts_the_elements_that_it_sums(name: str) -> None:
    method = cases.made(Case(name, ROWS[name].data[0]))
    assert isinstance(method.objective, Objective)
    batch = cases.source(method.data).batch(0, 4)
    assert int(method.objective.count(batch)) >= 1


def imported(text: str, package: str) -> set[str]:
    """The modules that a source text imports, relative ones resolved against `package`."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


MODULES = {f"dgm_models.{name.replace('/', '.')}": name for name in ROWS}


@pytest.mark.parametrize("name", ROWS)
def test_method_file_exists_and_imports_no_other_method(name: str) -> None:
    path = ROOT / ROWS[name].file
    assert path.is_file()
    package = f"dgm_models.{ROWS[name].family}"
    assert imported(path.read_text(), package) & MODULES.keys() <= {f"dgm_models.{name.replace('/', '.')}"}


@pytest.mark.parametrize(
    "text",
    [
        "from dgm_models.vae.vae import Elbo",
        "from dgm_models.vae import vae",
        "import dgm_models.vae.vae",
        "def f():\n    from .vae import Elbo",
        "from ..vae import vae",
    ],
)
def test_import_of_a_method_is_seen_however_it_is_written(text: str) -> None:
    assert "dgm_models.vae.vae" in imported(text, "dgm_models.vae")
