import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import tree

PARAMS = {
    "blocks": {"mlp": {"up": {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.full((3,), -1.0)}}},
    "final_norm": {"scale": jnp.zeros((5,), jnp.bfloat16)},
}
NAMES = ["blocks/mlp/up/bias", "blocks/mlp/up/kernel", "final_norm/scale"]


def test_names_are_paths_with_slashes_in_the_order_of_leaves():
    assert tree.names(PARAMS) == NAMES
    assert tree.names([{"a": 1}, (2, 3)]) == ["0/a", "1/0", "1/1"]


def test_map_named_gives_each_function_call_its_own_name_and_leaves():
    sizes = tree.map_named(lambda name, x, y: (name, x.size + y), PARAMS, {**PARAMS, "final_norm": {"scale": 7}})
    assert sizes["final_norm"]["scale"] == ("final_norm/scale", 12)


def test_match_needs_the_whole_name():
    table = [(r"blocks/.*/bias", 1), (r"blocks/.*/kernel", 2), (r"final_norm/scale", 3)]
    assert tree.match(table, PARAMS) == {
        "blocks": {"mlp": {"up": {"kernel": 2, "bias": 1}}},
        "final_norm": {"scale": 3},
    }
    with pytest.raises(ValueError, match=r"final_norm/scale of shape \(5,\) matches 0 rows"):
        tree.match(table[:2] + [(r"final_norm", 3)], PARAMS)
    with pytest.raises(ValueError, match=r"final_norm/scale of shape \(5,\) matches 0 rows"):
        tree.match(table[:2] + [(r"scale", 3)], PARAMS)


def test_match_refuses_two_rows_for_one_leaf_and_names_both():
    with pytest.raises(ValueError, match=r"bias of shape \(3,\) matches 2 rows of the table \['.*bias', 'blocks.*'\]"):
        tree.match([(r".*bias", 1), (r"blocks.*", 2), (r"final_norm/scale", 3)], PARAMS)


def test_mask_searches_and_an_empty_pattern_selects_nothing():
    assert tree.mask("kernel|norm", PARAMS) == {
        "blocks": {"mlp": {"up": {"kernel": True, "bias": False}}},
        "final_norm": {"scale": True},
    }
    assert not any(tree.mask("", PARAMS)["final_norm"].values())


def test_size_counts_elements():
    assert tree.size(PARAMS) == 6 + 3 + 5


def test_global_norm_is_that_of_one_long_vector():
    draw = np.random.default_rng(0)
    leaves = [draw.normal(size=shape) for shape in ((3, 4), (7,), ())]
    expected = np.linalg.norm(np.concatenate([leaf.ravel() for leaf in leaves]))
    np.testing.assert_allclose(tree.global_norm([jnp.float32(leaf) for leaf in leaves]), expected, rtol=1e-6)


def test_global_norm_of_bfloat16_accumulates_in_float32():
    norm = tree.global_norm({"x": jnp.ones((4097,), jnp.bfloat16)})
    assert norm.dtype == jnp.float32
    np.testing.assert_allclose(norm, 4097**0.5, rtol=1e-6)
