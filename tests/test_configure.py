import dataclasses

import pytest

from jaxllm.configure import nearest, section


@dataclasses.dataclass(frozen=True)
class Inner:
    learning_rate: float


@dataclasses.dataclass(frozen=True)
class Outer:
    batch_size: int
    stages: tuple
    inner: Inner


VALUES = {"batch_size": 3, "stages": [0, 5], "inner": {"learning_rate": 0.1}}


def test_a_section_becomes_its_dataclass_and_lists_become_tuples():
    assert section(Outer, VALUES) == Outer(3, (0, 5), Inner(0.1))


def test_an_unknown_key_offers_the_nearest_name_with_its_path():
    with pytest.raises(ValueError, match=r"config\.batch_sise is not a known key; did you mean 'batch_size'\?"):
        section(Outer, VALUES | {"batch_sise": 3})
    with pytest.raises(
        ValueError, match=r"config\.inner\.learning_rat is not a known key; did you mean 'learning_rate'"
    ):
        section(Outer, VALUES | {"inner": {"learning_rat": 1}})


def test_a_key_near_nothing_lists_what_is_known():
    with pytest.raises(
        ValueError, match=r"config\.zzz is not a known key; known keys are \['batch_size', 'inner', 'stages'\]"
    ):
        section(Outer, VALUES | {"zzz": 1})
    assert nearest("tensr", ("tensor", "fsdp")) == "; did you mean 'tensor'?"


def test_a_missing_key_is_named_with_the_place_of_its_default():
    with pytest.raises(
        ValueError, match=r"config\.inner\.learning_rate is missing; configs/common\.py holds its default"
    ):
        section(Outer, VALUES | {"inner": {}})
