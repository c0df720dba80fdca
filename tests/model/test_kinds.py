import jax.numpy as jnp
import numpy as np

from jaxllm.model import rope
from jaxllm.model.kinds import NO_WINDOW, LayerKinds

POSITIONS_BT = jnp.arange(5)[None, :]


def test_each_layer_gets_the_table_and_window_of_its_own_kind(tiny):
    config = tiny(
        num_layers=5,
        layer_pattern=("local", "nope", "global", "local_nope"),
        sliding_window=3,
        rope=dict(theta=100.0, local_theta=10.0),
    )
    kinds = LayerKinds(config, POSITIONS_BT)
    for index, kind in zip(kinds.index_L, ("local", "nope", "global", "local_nope", "local"), strict=True):
        table, window = kinds.of(index)
        np.testing.assert_array_equal(table, rope.table(config.rope, config.head_width, POSITIONS_BT, kind))
        assert int(window) == (3 if kind in ("local", "local_nope") else NO_WINDOW)


def test_a_single_kind_needs_no_selection(tiny):
    kinds = LayerKinds(tiny(), POSITIONS_BT)
    assert kinds.index_L is None and kinds.of(None)[1] is None
    assert LayerKinds(tiny(layer_pattern=("local",), sliding_window=3), POSITIONS_BT).of(None)[1] == 3
