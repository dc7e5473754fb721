"""A params section becomes an object strictly, and what is wrong is named by its path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from dgm_models.construct import ConfigError, Positive, Range, construct, defaults, did_you_mean, plain
from dgm_models.nn.networks import Conv, Mlp, Network
from dgm_models.protocols import DataSpec


@dataclass(frozen=True)
class Inner:
    size: Positive = 2
    rate: float = 0.5


@dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    kind: Literal["a", "b", 3] = "a"
    pair: tuple[int, float] = (1, 2.0)
    many: list[Positive] | None = None
    named: dict[str, float] | None = None
    flag: bool = False
    half_open: Annotated[float, Range(0, 1, "high")] = 0.0
    either: int | str = 1
    network: Network = Mlp()


def message(section: object) -> str:
    with pytest.raises(ConfigError) as error:
        construct(Outer, section, "runs.x")
    return str(error.value)


def test_construct_reads_nested_sections() -> None:
    found = construct(
        Outer,
        {"inner": {"size": 3, "rate": 1}, "kind": 3, "pair": [4, 5], "many": [1, 2], "named": {"q": 1}, "either": "x"},
        "runs.x",
    )
    assert found == Outer(Inner(3, 1.0), 3, (4, 5.0), [1, 2], {"q": 1.0}, either="x")
    assert type(found.inner.rate) is float and type(found.pair[1]) is float


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"iner": {}}, 'runs.x.iner: unknown key; did you mean "inner"?'),
        ({"zzz": 1}, "runs.x.zzz: unknown key; allowed: either, flag, half_open"),
        ({1: 1}, "runs.x.1: unknown key"),
        ({"inner": {"sise": 1}}, 'runs.x.inner.sise: unknown key; did you mean "size"?'),
        ({"inner": {"size": 0}}, "runs.x.inner.size: 0 is not a whole number at least 1"),
        ({"inner": {"size": 1.0}}, "runs.x.inner.size: 1.0 is not a whole number"),
        ({"inner": {"size": True}}, "runs.x.inner.size: True is not a whole number"),
        ({"inner": {"rate": "1e-3"}}, "runs.x.inner.rate: '1e-3' is not a number (YAML reads 1e-3 as text"),
        ({"inner": {"rate": float("nan")}}, "runs.x.inner.rate: nan is not a number"),
        ({"inner": {"rate": True}}, "runs.x.inner.rate: True is not a number"),
        ({"inner": 3}, "runs.x.inner: expected a section of keys, found 3"),
        ({"kind": "c"}, "runs.x.kind: 'c' is not known; allowed: 3, a, b"),
        ({"kind": 3.0}, "runs.x.kind: 3.0 is not known"),
        ({"pair": [1]}, "runs.x.pair: [1] has 1 items, expected 2"),
        ({"pair": "12"}, "runs.x.pair: '12' is not a list"),
        ({"many": [1, 0]}, "runs.x.many[1]: 0 is not a whole number at least 1"),
        ({"named": {"q": "x"}}, "runs.x.named.q: 'x' is not a number"),
        ({"named": 1}, "runs.x.named: 1 is not a section of keys"),
        ({"flag": 1}, "runs.x.flag: 1 is not true or false"),
        ({"flag": "yes"}, "runs.x.flag: 'yes' is not true or false"),
        ({"half_open": 1.0}, "runs.x.half_open: 1.0 is not a number at least 0 and below 1"),
        ({"either": 1.5}, "runs.x.either: 1.5 is not a whole number or text"),
        (
            {"network": "mlp"},
            "runs.x.network: expected a section with a name, found 'mlp'; "
            "allowed: conv, dcgan, grid, mlp, residual, stylegan2",
        ),
        ({"network": {"name": "mpl"}}, "runs.x.network.name: 'mpl' is not known; did you mean \"mlp\"?"),
        ({"network": {"name": ["mlp"]}}, "runs.x.network.name: ['mlp'] is not known"),
        ({"network": {"name": "mlp", "depth": 0}}, "runs.x.network.depth: 0 is not a whole number at least 1"),
        ([], "runs.x: expected a section of keys, found []"),
    ],
)
def test_construct_names_the_path_of_what_is_wrong(section: object, expected: str) -> None:
    assert expected in message(section)


def test_construct_names_what_is_missing() -> None:
    def needs(a: Positive, b: str = "x") -> None: ...

    with pytest.raises(ConfigError, match=r"runs\.y\.a: missing; expected a whole number at least 1"):
        construct(needs, {}, "runs.y")


def test_construct_keeps_what_the_caller_gives_out_of_the_section() -> None:
    def function(data: DataSpec, size: int = 1) -> tuple[DataSpec, int]:
        return data, size

    data = DataSpec("vector", (1,))
    assert construct(function, {"size": 2}, "m", data=data) == (data, 2)
    with pytest.raises(ConfigError, match=r"m\.data: unknown key"):
        construct(function, {"data": {}}, "m", data=data)


def test_construct_puts_the_path_before_a_constructor_s_complaint() -> None:
    with pytest.raises(ConfigError, match=r"spec\.data: data\.levels: 1 is below 2"):
        construct(DataSpec, {"kind": "vector", "shape": [3], "levels": 1}, "spec.data")


def test_defaults_are_plain_json_that_constructs_the_same() -> None:
    filled = defaults(Outer, {"inner": Inner(5), "network": Conv(channels=4)})
    assert filled["inner"] == {"size": 5, "rate": 0.5}
    assert filled["network"] == {"name": "conv", "channels": 4, "stages": 2, "activation": "leaky_relu"}
    again = construct(Outer, filled, "runs.x")
    assert again == Outer(Inner(5), network=Conv(channels=4))
    assert plain(again) == filled


def test_did_you_mean_lists_what_there_is_when_nothing_is_near() -> None:
    assert did_you_mean("zzz", ["b", "a"]) == "; allowed: a, b"
    assert did_you_mean("zzz", []) == "; allowed: nothing"
