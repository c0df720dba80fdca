import pytest

from jaxllm.data import config as config_module
from jaxllm.data import packing, tokens
from jaxllm.data.config import DataConfig, SourceConfig

ONE = {"a": SourceConfig("a.txt")}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sequence_length": 1}, "sequence_length=1 is too short: a row needs at least 2 targets"),
        ({"sources": {}}, "leaves nothing to read"),
        ({"packing": "dense"}, r"packing='dense' is not one of \('concatenated', 'best_fit', 'best_fit_whole'\)"),
        ({"split": "middle"}, r"split='middle' is not one of \('document', 'tail'\)"),
        ({"validation": 1.0}, "validation=1.0 is a share: 0 or more, and less than 1"),
        ({"validation": -0.1}, "validation=-0.1"),
        ({"workers": -1}, "workers=-1.* are 0 or more"),
        ({"prefetch": -1}, "prefetch=-1"),
        ({"shuffle_seed": -1}, "shuffle_seed=-1"),
        ({"stage_steps": (5,)}, r"stage_steps=\(5,\) must start at 0 and rise"),
        ({"stage_steps": ()}, r"stage_steps=\(\) must start at 0"),
        ({"stage_steps": (0, 9, 9)}, "must start at 0 and rise"),
        ({"stage_steps": (0, 9)}, r"source 'a' has 1 weights for 2 stages: weights=\(1.0,\), stage_steps=\(0, 9\)"),
        ({"sources": {"a": SourceConfig("a.txt", weights=(0.0,))}}, "stage that starts at step 0 is 0: raise one"),
    ],
)
def test_a_value_that_makes_no_sense_is_named_with_the_mend(fields, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**{"sources": ONE, **fields})


def test_a_source_needs_a_path_and_weights_that_are_numbers():
    with pytest.raises(ValueError, match="path='' names no source: give a file"):
        SourceConfig("")
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="a weight is a finite number"):
            SourceConfig("a.txt", weights=(weight,))


def test_sources_may_come_as_mappings_of_their_fields():
    config = DataConfig(sources={"a": {"path": "a.txt", "weights": [1, 2]}}, stage_steps=[0, 3])
    assert config.sources["a"] == SourceConfig("a.txt", weights=(1, 2)) and config.stage_steps == (0, 3)
    with pytest.raises(TypeError, match="feild"):
        DataConfig(sources={"a": {"path": "a.txt", "feild": "text"}})


def test_each_name_that_a_config_may_hold_is_a_function():
    assert set(config_module.PACKINGS) == set(packing.PLANS)
    assert set(config_module.SPLITS) == set(tokens._SPLITS)
