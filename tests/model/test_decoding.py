"""Cached decoding against the whole forward pass, and what the cache may and may not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import sharding
from jaxllm.model import decoding, parameter_rules

ARCHITECTURES = {
    "grouped queries": {},
    "soft caps and a sliding window": dict(
        layer_pattern=("local", "global"),
        sliding_window=4,
        attention_soft_cap=5.0,
        logit_soft_cap=3.0,
        post_norm=True,
        norm_offset=1.0,
        embedding_scale=4.0,
        activation="gelu_tanh",
    ),
    "layers without rope": dict(layer_pattern=("global", "nope"), qk_norm="head"),
    "stretched rope": dict(rope={"scaling": "llama3", "factor": 8.0, "original_length": 8}, tied_head=False),
    "biases": dict(qkv_bias=True, output_bias=True, mlp_bias=True, qk_norm="all"),
}
LENGTHS = np.array([5, 1, 3, 8])
TOKENS = np.random.default_rng(0).integers(0, 40, (4, 20)).astype(np.int32)
ROWS = np.arange(4)


def decoded(model, params, steps):
    """Logits [steps + 1, 4, V] after ragged prompts and after each of ``steps`` further tokens of each row."""
    extend, decode = jax.jit(model.extend), jax.jit(model.decode)
    logits, cache = extend(params, model.cache(4, 32), TOKENS[:, :8], LENGTHS)
    outputs = [logits]
    for step in range(steps):
        logits, cache = decode(params, cache, TOKENS[ROWS, LENGTHS + step])
        outputs.append(logits)
    return np.stack(outputs)


def forwarded(model, params, steps):
    logits_BTV = np.asarray(jax.jit(model.forward)(params, TOKENS))
    return np.stack([logits_BTV[ROWS, LENGTHS - 1 + step] for step in range(steps + 1)])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_cached_decoding_of_ragged_rows_equals_the_forward_pass_at_every_position(name, tiny, built):
    model, params = built(tiny(**ARCHITECTURES[name]))
    np.testing.assert_allclose(decoded(model, params, 12), forwarded(model, params, 12), atol=1e-4)


# The two sum in another order, so now and then an operand of a later product rounds to its other neighbour.
@pytest.mark.parametrize(
    ("dtypes", "tolerance"),
    [(dict(operand_dtype="bfloat16"), 0.015), (dict(operand_dtype="bfloat16", activation_dtype="bfloat16"), 0.03)],
    ids=["operands", "operands and activations"],
)
def test_decoding_in_bfloat16_equals_the_forward_pass_within_its_precision(dtypes, tolerance, tiny, built):
    model, params = built(tiny(**dtypes))
    forward = forwarded(model, params, 12)
    difference = decoded(model, params, 12) - forward
    assert difference.std() < tolerance * forward.std(), difference.std() / forward.std()


def test_extending_in_pieces_equals_extending_at_once(tiny, built):
    model, params = built(tiny(**ARCHITECTURES["soft caps and a sliding window"]))
    cache = model.cache(4, 16)
    for first, last in ((0, 5), (5, 6), (6, 12)):
        logits, cache = jax.jit(model.extend)(params, cache, TOKENS[:, first:last], jnp.full(4, last - first))
    np.testing.assert_allclose(logits, jax.jit(model.forward)(params, TOKENS[:, :12])[:, -1], atol=1e-4)
    np.testing.assert_array_equal(cache["length_B"], [12] * 4)


def test_what_lies_behind_a_rows_length_has_no_influence(tiny, built):
    model, params = built(tiny())
    clean = model.cache(4, 32)
    dirty = clean | {"layers": jax.tree.map(lambda x: x + 1e4, clean["layers"])}
    behind = np.arange(8)[None, :] >= LENGTHS[:, None]
    extend, decode = jax.jit(model.extend), jax.jit(model.decode)
    expected, clean = extend(params, clean, TOKENS[:, :8], LENGTHS)
    logits, dirty = extend(params, dirty, np.where(behind, 39 - TOKENS[:, :8], TOKENS[:, :8]), LENGTHS)
    np.testing.assert_array_equal(logits, expected)
    for step in range(4):
        expected, clean = decode(params, clean, TOKENS[:, step])
        logits, dirty = decode(params, dirty, TOKENS[:, step])
        np.testing.assert_array_equal(logits, expected)


def test_a_lengthened_cache_continues_as_a_long_one(tiny, built):
    model, params = built(tiny())
    _, long = jax.jit(model.extend)(params, model.cache(4, 150), TOKENS[:, :8], LENGTHS)
    _, short = jax.jit(model.extend)(params, model.cache(4, 8), TOKENS[:, :8], LENGTHS)
    short = short | {"layers": decoding.resized(short["layers"], None, length=150)}
    assert jax.tree.map(jnp.shape, short) == jax.tree.map(jnp.shape, long)
    expected, _ = jax.jit(model.decode)(params, long, TOKENS[:, 9])
    np.testing.assert_allclose(jax.jit(model.decode)(params, short, TOKENS[:, 9])[0], expected, atol=1e-5)


def drawn_layers(model, rows, length, seed):
    draw = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: draw.normal(size=x.shape).astype(np.float32), jax.eval_shape(lambda: model.cache(rows, length))
    )["layers"]


def with_rows_one_by_one(layers, rows, moves):
    layers = jax.tree.map(np.copy, layers)
    for old, new in zip(jax.tree.leaves(layers), jax.tree.leaves(rows), strict=True):
        for source, slot in moves:
            old[slot, :, : new.shape[2]] = new[source]
    return layers


def test_rows_are_copied_to_their_places_and_nothing_else_changes_on_every_mesh(tiny, built, mesh):
    model, _ = built(tiny())
    layers, rows = drawn_layers(model, 8, 10, 0), drawn_layers(model, 4, 6, 1)
    sources_A, places_A = np.array([2, 0, 2, 1, 3, 3]), np.array([7, 0, 3, 4, 1, 1])

    def copied(layers, rows, sources_A, places_A, count):
        layers, rows = (jax.tree.map(lambda x: sharding.place(x, "bksh"), tree) for tree in (layers, rows))
        return decoding.with_rows(layers, rows, sources_A, places_A, count)

    expected = with_rows_one_by_one(layers, rows, [(2, 7), (0, 0), (2, 3), (1, 4)])
    jax.tree.map(np.testing.assert_array_equal, jax.jit(copied)(layers, rows, sources_A, places_A, 4), expected)
    with jax.set_mesh(jax.make_mesh((), ())):
        bare = jax.jit(decoding.with_rows)(layers, rows, sources_A, places_A, 4)
    jax.tree.map(np.testing.assert_array_equal, bare, expected)


def test_a_resized_cache_has_the_rows_that_were_asked_for_and_room(tiny, built, mesh):
    model, _ = built(tiny())
    layers, rows_B = drawn_layers(model, 8, 5, 0), np.array([6, 1, 1, 0])
    resized = jax.jit(
        lambda x: decoding.resized(jax.tree.map(lambda x: sharding.place(x, "bksh"), x), rows_B, length=9)
    )
    for old, new in zip(jax.tree.leaves(layers), jax.tree.leaves(resized(layers)), strict=True):
        np.testing.assert_array_equal(new[:, :, :5], old[rows_B])
        assert new.shape[2] == 9 and not new[:, :, 5:].any()


def test_rows_are_copied_in_place(tiny, built):
    model, _ = built(tiny())
    layers, rows = drawn_layers(model, 64, 32, 0), drawn_layers(model, 2, 8, 1)
    move_A = np.zeros(64, np.int32)
    compiled = jax.jit(decoding.with_rows, donate_argnums=0).lower(layers, rows, move_A, move_A, 3).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * sum(x.nbytes for x in jax.tree.leaves(layers))


def test_ready_parameters_decode_as_the_parameters_do_and_stay_ready(tiny, built):
    model, params = built(tiny(operand_dtype="bfloat16"))
    ready = decoding.ready(model.config, params)
    assert decoding.ready(model.config, ready) is ready
    expected, _ = jax.jit(model.extend)(params, model.cache(4, 8), TOKENS[:, :8], LENGTHS)
    np.testing.assert_array_equal(jax.jit(model.extend)(ready, model.cache(4, 8), TOKENS[:, :8], LENGTHS)[0], expected)
    kernels = [x for path, x in jax.tree.leaves_with_path(ready) if "kernel" in jax.tree_util.keystr(path)]
    assert {x.dtype for x in kernels} == {jnp.dtype("bfloat16")} and len(kernels) == 7 * 2 + 1
    assert ready["blocks"][0]["mlp_pre_norm"]["scale"].dtype == ready["embedding"]["table"].dtype == jnp.float32


def test_more_tokens_than_the_cache_is_long_raise(tiny, built):
    model, params = built(tiny())
    with pytest.raises(ValueError, match="9 tokens do not fit a cache for 8 positions; .* at least 9"):
        jax.jit(model.extend)(params, model.cache(4, 8), np.zeros((4, 9), np.int32), LENGTHS)


def test_padding_behind_the_end_of_the_cache_is_dropped_and_moves_nothing(tiny, built):
    model, params = built(tiny())
    tokens = np.tile(TOKENS, (1, 4))[:, :64]
    _, cache = jax.jit(model.extend)(params, model.cache(4, 64), tokens[:, :60], jnp.full(4, 60))
    logits, _ = jax.jit(model.extend)(params, cache, np.pad(tokens[:, 60:], ((0, 0), (0, 12))), jnp.full(4, 4))
    np.testing.assert_allclose(logits, jax.jit(model.forward)(params, tokens)[:, -1], atol=1e-4)


def test_the_cache_is_updated_in_place_whatever_its_length(tiny, built):
    model, params = built(tiny())

    def loop(params, cache, token_B):
        return jax.lax.fori_loop(0, 3, lambda _, cache: model.decode(params, cache, token_B)[1], cache)

    def temporary_and_cache_bytes(length):
        cache = model.cache(4, length)
        compiled = jax.jit(loop, donate_argnums=1).lower(params, cache, jnp.zeros(4, jnp.int32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes, sum(x.nbytes for x in jax.tree.leaves(cache))

    short, long = np.array(temporary_and_cache_bytes(128)), np.array(temporary_and_cache_bytes(2048))
    grown_temporary, grown_cache = long - short
    # What grows are the scores of one query, not a copy of a layer's keys or values (a quarter of the cache here).
    assert grown_temporary < 0.2 * grown_cache


def test_every_mesh_decodes_as_one_device_does(tiny, built, mesh):
    config = tiny(**ARCHITECTURES["soft caps and a sliding window"])
    model, params = built(config)
    placed = jax.device_put(params, sharding.parameter_shardings(parameter_rules(config), params, mesh))

    @jax.jit
    def steps(params, tokens, lengths, next_tokens):
        tokens, lengths = sharding.place(tokens, "bt"), sharding.place(lengths, "b")
        first, cache = model.extend(params, model.cache(4, 32), tokens, lengths)
        return first, model.decode(params, cache, sharding.place(next_tokens, "b"))[0]

    on_mesh = steps(placed, TOKENS[:, :8], LENGTHS, TOKENS[ROWS, LENGTHS])
    with jax.set_mesh(jax.make_mesh((), ())):
        bare = forwarded(model, params, 1)
    np.testing.assert_allclose(on_mesh, bare, atol=1e-4)
