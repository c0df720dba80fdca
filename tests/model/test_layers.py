import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.model.layers import Embedding, Projection, RMSNorm, dropout, truncated_normal

DRAW = np.random.default_rng(0)


@pytest.mark.parametrize("shape", [(6,), (4, 6)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_divides_by_the_root_of_the_mean_square(tiny, shape, offset):
    layer = RMSNorm(shape, tiny(norm_eps=0.3, norm_offset=offset))
    scale, x = DRAW.normal(size=shape), DRAW.normal(size=(2, 3, 4, 6))
    layer.scale[...] = jnp.float32(scale)
    found = layer(jnp.float32(x))
    for b, t in np.ndindex(2, 3):
        groups = [x[b, t]] if len(shape) == 2 else x[b, t]
        expected = [group / np.sqrt((group**2).mean() + 0.3) * (offset + scale) for group in groups]
        np.testing.assert_allclose(found[b, t], np.reshape(expected, (4, 6)), rtol=1e-5)


def test_rms_norm_of_bfloat16_rounds_only_its_result(tiny):
    layer = RMSNorm((64,), tiny())
    x = jnp.bfloat16(100 * DRAW.normal(size=(2, 64)))
    found = layer(x)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, layer(x.astype(jnp.float32)).astype(jnp.bfloat16))


@pytest.mark.parametrize(
    "equation, shape, inputs",
    [("btd,dnh->btnh", (16, 4, 6), 16), ("btnh,nhd->btd", (4, 6, 16), 24), ("btf,fd->btd", (24, 16), 24)],
)
def test_a_projections_deviation_falls_with_the_root_of_its_inputs(tiny, equation, shape, inputs):
    shape = tuple(4 * length for length in shape)
    kernel = np.asarray(Projection(equation, shape, False, tiny(), nnx.Rngs(0), gain=0.5).kernel[...])
    widened = 16 if equation.startswith("btnh") else 4
    np.testing.assert_allclose(kernel.std(), 0.5 * (widened * inputs) ** -0.5, rtol=0.03)


def test_a_projections_bias_is_added_to_every_position(tiny):
    layer = Projection("btd,dnh->btnh", (16, 4, 6), True, tiny(), nnx.Rngs(0))
    x = jnp.float32(DRAW.normal(size=(2, 3, 16)))
    plain = layer(x)
    bias = DRAW.normal(size=(4, 6)).astype("f")
    layer.bias[...] = jnp.asarray(bias)
    np.testing.assert_allclose(layer(x) - plain, np.broadcast_to(bias, (2, 3, 4, 6)), atol=1e-5)


def test_an_embedding_is_the_tokens_row_times_its_scale(tiny):
    layer = Embedding(tiny(embedding_scale=4.0, activation_dtype="bfloat16"), nnx.Rngs(0))
    found = layer(jnp.array([[3, 39]]))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found[0], 4 * layer.table[...][jnp.array([3, 39])].astype(jnp.bfloat16))


def test_dropout_keeps_the_mean_and_zeroes_its_share():
    x = jnp.ones((400, 500))
    found = np.asarray(dropout(x, 0.3, jax.random.key(0)))
    np.testing.assert_allclose(found.mean(), 1.0, atol=5e-3)
    np.testing.assert_allclose((found == 0).mean(), 0.3, atol=5e-3)
    np.testing.assert_allclose(found[found > 0], 1 / 0.7, rtol=1e-6)
    assert dropout(x, 0.3, None) is x and dropout(x, 0.0, jax.random.key(0)) is x
    assert dropout(x.astype(jnp.bfloat16), 0.3, jax.random.key(0)).dtype == jnp.bfloat16


def test_truncated_normals_have_the_deviation_asked_for_and_no_tails():
    x = np.asarray(truncated_normal(jax.random.key(0), (400, 500), 0.7))
    np.testing.assert_allclose([x.mean(), x.std()], [0.0, 0.7], atol=5e-3)
    assert 2.2 * 0.7 < np.abs(x).max() < 2.3 * 0.7
