"""The parts of the benchmark against other libraries that need none of them."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dgm_models.method import build

FILE = Path(__file__).parents[1] / "benchmarks" / "peers.py"


@pytest.fixture(scope="module")
def peers() -> Any:
    spec = importlib.util.spec_from_file_location("benchmarks_peers", FILE)
    assert spec and spec.loader
    module = ModuleType("benchmarks_peers")
    sys.modules["benchmarks_peers"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("case, draws", [(0, [(4, 16)]), (2, [(4, 32), (4, 1)] * 5 + [(4, 32)])])
def test_peers_draws_come_in_the_order_in_which_a_peer_asks(peers: Any, case: int, draws: list[Any]) -> None:
    """An epsilon for pythae; z and the mixing weight for every critic update, z for the generator's."""
    case = replace(peers.CASES[case], batch=4, network={"name": "mlp", "width": 8, "depth": 1})
    ours = peers.Ours(case, build(case.method, case.data, network=case.network))
    with peers.differentiated() as losses, peers.kept_draws() as kept:
        ours.steps(1)
    assert [tuple(draw.shape) for draw in kept] == draws
    assert len(ours.drawn) == len(losses) == (len(draws) + 1) // 2  # a batch for every loss
    with peers.given(kept):
        assert torch.equal(torch.randn(4, 16), kept[0])
        for draw in kept[1:]:
            assert torch.equal(torch.rand(4, 1), draw)


def test_peers_that_are_missing_are_named(
    peers: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "PEERS", {"pythae": ("no_such_module", peers.Pythae)})
    monkeypatch.setattr(sys, "argv", ["peers.py"])
    with pytest.raises(SystemExit) as left:
        peers.main()
    assert left.value.code == 1
    said = capsys.readouterr().out
    assert "not measured: pythae" in said and "pip install --no-deps --target" in said
