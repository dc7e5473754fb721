"""Conditions are functions of an example; a conditioner appends them without touching what it appends them to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dgm_models.conditions import Caption, Condition, Edges, Label, Masked
from dgm_models.construct import ConfigError, convert
from dgm_models.method import build
from dgm_models.nn.conditioner import IMAGE_DIM, Conditioner, check
from dgm_models.nn.networks import Mlp
from dgm_models.protocols import DataSpec
from tests.laws import cases

IMAGES = DataSpec("image", (1, 6, 8), 5, classes=3)
VECTORS = DataSpec("vector", (2,), None, classes=3)


def images(n: int = 4) -> torch.Tensor:
    return torch.randint(5, (n, 1, 6, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def test_label_is_the_dataset_s_and_must_be_there() -> None:
    keys, labels = torch.arange(4), torch.tensor([2, 0, 1, 1])
    assert torch.equal(Label().of(IMAGES, images(), labels, keys), labels)
    assert Label().spec(IMAGES).levels == 3
    with pytest.raises(ValueError, match="no labels"):
        Label().of(IMAGES, images(), None, keys)
    with pytest.raises(ValueError, match="needs data with classes"):
        Label().spec(replace(IMAGES, classes=0))


def test_caption_is_the_label_s_name_a_token_a_word() -> None:
    named = replace(IMAGES, class_names=("Blue dot", "dot", "red Dot big"))  # words: big, blue, dot, red
    spec = Caption().spec(named)
    assert (spec.kind, spec.shape, spec.levels) == ("tokens", (3,), 5)
    found = Caption().of(named, images(), torch.tensor([2, 0, 1, 1]), torch.arange(4))
    assert found.tolist() == [[4, 3, 1], [2, 3, 0], [3, 0, 0], [3, 0, 0]]
    assert Caption().read(named, "dot  RED").tolist() == [3, 4, 0]  # a user's words, in an order of their own
    with pytest.raises(ValueError, match="no labels"):
        Caption().of(named, images(), None, torch.arange(4))
    with pytest.raises(ValueError, match="classes have names"):
        Caption().spec(IMAGES)
    with pytest.raises(ValueError, match=r"class_names: 1 names for 3 classes"):
        replace(IMAGES, class_names=("dot",))


def test_conditioner_reads_a_caption_as_one_word_after_the_other() -> None:
    named = replace(IMAGES, class_names=("blue dot", "dot", "red dot"))
    reads = Conditioner(Caption(), named)
    assert reads.vector_dim == reads.planes == 2 * 4
    vector = reads.vector(torch.tensor([[1, 2], [3, 0]]))
    assert vector.tolist() == [[0, 1, 0, 0, 0, 0, 1, 0], [0, 0, 0, 1, 1, 0, 0, 0]]
    assert reads.join(torch.zeros(2, 1, 6, 8), torch.tensor([[1, 2], [3, 0]])).shape[1] == 9


@pytest.mark.parametrize("name", [case.method for case in cases.CASES if case.asked])
def test_every_method_that_is_asked_for_labels_learns_from_captions(name: str) -> None:
    spec = cases.Case(name, cases.ROWS[name].data[0]).spec
    spec = replace(spec, class_names=("blue dot", "dot", "red dot"))
    small = {key: value for key, value in cases.small(name).items() if key != "pairing"}  # transport is of labels
    method = build(name, spec, cond={"name": "caption"}, **small)
    training = cases.trainer(method, cases.Train(steps=1, batch_size=4), {})
    training.run()
    assert all(torch.tensor(value).isfinite() for value in training.history[-1][1].values())


def test_edges_are_nothing_on_a_constant_and_whole_at_a_step_of_the_whole_range() -> None:
    step = torch.zeros(1, 1, 6, 8, dtype=torch.uint8)
    step[..., 4:] = 4  # columns 4 to 7
    found = Edges().of(IMAGES, step, None, torch.zeros(1, dtype=torch.int64))[0, 0]
    assert (found[:, 3:5] == 1).all()
    assert (found[:, [0, 1, 2, 5, 6, 7]] == -1).all()
    assert tuple(Edges().spec(IMAGES).shape) == (1, 6, 8)


def test_masked_hides_one_rectangle_of_the_stated_share_by_key() -> None:
    x, keys = images(64), torch.arange(64)
    found = Masked(share=0.5).of(IMAGES, x, None, keys)
    assert found.shape[1:] == Masked(share=0.5).spec(IMAGES).shape
    shown = found[:, 1] == 1
    assert ((~shown).flatten(1).sum(1) == 3 * 4).all()
    unit = x[:, 0].float() / 2 - 1
    assert torch.equal(found[:, 0][shown], unit[shown])
    assert (found[:, 0][~shown] == 0).all()
    assert len({tuple(row) for row in shown.flatten(1).tolist()}) > 10  # 4 x 5 places
    again = Masked(share=0.5).of(IMAGES, x[:5], None, keys[:5])
    assert torch.equal(again, found[:5])  # an example's alone


def test_images_conditions_refuse_vectors() -> None:
    for condition in (Edges(), Masked()):
        with pytest.raises(ValueError, match="this data is vector"):
            condition.spec(VECTORS)


def test_conditioner_joins_a_label_as_constant_planes() -> None:
    reads = Conditioner(Label(), IMAGES)
    x = torch.randn(2, 1, 6, 8)
    joined = reads.join(x, torch.tensor([2, 0]))
    assert joined.shape[1:] == reads.joined((1, 6, 8)) == (4, 6, 8)
    assert torch.equal(joined[:, :1], x)
    assert (joined[0, 3] == 1).all() and (joined[0, 1:3] == 0).all() and (joined[1, 1] == 1).all()
    flat = Conditioner(Label(), VECTORS).join(torch.zeros(2, 2), torch.tensor([1, 2]))
    assert flat.tolist() == [[0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]


def test_conditioner_of_nothing_changes_nothing() -> None:
    reads = Conditioner(None, IMAGES, Mlp())
    x, z = torch.randn(2, 1, 6, 8), torch.randn(2, 3)
    assert reads.join(x, None) is x and reads.with_vector(z, None) is z
    assert reads.vector_dim == reads.planes == 0 and not list(reads.parameters())


def test_conditioner_gives_an_image_a_vector_only_with_a_network() -> None:
    z, cond = torch.randn(2, 3), torch.randn(2, 2, 6, 8)
    reads = Conditioner(Masked(), IMAGES, Mlp(width=8, depth=1))
    assert reads.with_vector(z, cond).shape == (2, 3 + IMAGE_DIM)
    assert not list(Conditioner(Masked(), IMAGES).parameters())


def test_conditions_that_are_missing_or_unasked_for_are_named() -> None:
    with pytest.raises(ValueError, match="built without a condition"):
        check(None, torch.zeros(1))
    with pytest.raises(ValueError, match=r"built with \{name: label\}"):
        check(Label(), None)
    with pytest.raises(ConfigError, match='did you mean "label"'):
        convert({"name": "lable"}, Condition, "runs.a.method.cond")
