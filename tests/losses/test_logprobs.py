import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.losses import chunked_cross_entropy, chunked_token_logprobs, token_logprobs

B, T, D, V = 2, 7, 5, 11
DRAW = np.random.default_rng(0)
HIDDEN_BTD, HEAD_DV = DRAW.normal(size=(B, T, D)), DRAW.normal(size=(D, V))
TOKENS_BT = DRAW.integers(0, V, (B, T))
COTANGENTS = tuple(DRAW.normal(size=(B, T)) for _ in range(3))


def oracle(hidden_BTD, head_DV, tokens_BT, temperature=1.0, soft_cap=0.0):
    """(logp, logz, entropy) by the definition, one position at a time, in float64."""
    found = np.zeros((3, *tokens_BT.shape))
    for place in np.ndindex(tokens_BT.shape):
        logits_V = hidden_BTD[place] @ head_DV
        if soft_cap:
            logits_V = soft_cap * np.tanh(logits_V / soft_cap)
        logits_V = logits_V / temperature
        p_V = np.exp(logits_V) / np.exp(logits_V).sum()
        found[:, *place] = np.log(p_V[tokens_BT[place]]), np.log(np.exp(logits_V).sum()), -sum(p_V * np.log(p_V))
    return found


def oracle_gradient(x, function, step=1e-6):
    """Central differences in every coordinate."""
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        above, below = x.copy(), x.copy()
        above[index] += step
        below[index] -= step
        gradient[index] = (function(above) - function(below)) / (2 * step)
    return gradient


def weighed(outputs, cotangents=COTANGENTS):
    return sum((output * cotangent).sum() for output, cotangent in zip(outputs, cotangents, strict=True))


@functools.partial(jax.jit, static_argnames=("options",))
def scored(hidden_BTD, head_DV, tokens_BT, cotangents, options):
    score = functools.partial(chunked_token_logprobs, tokens_BT=tokens_BT, **dict(options))
    outputs, pull = jax.vjp(lambda hidden_BTD, head_DV: score(hidden_BTD, head_DV), hidden_BTD, head_DV)
    return outputs, pull(cotangents)


def ours(hidden_BTD, head_DV, tokens_BT=TOKENS_BT, *, cotangents=COTANGENTS, **options):
    """Outputs, and gradients for hidden and head of their weighed sum."""
    arrays = jnp.float32(hidden_BTD), jnp.float32(head_DV), jnp.asarray(tokens_BT, jnp.int32)
    return scored(*arrays, tuple(jnp.float32(x) for x in cotangents), tuple(options.items()))


def test_token_logprobs_are_log_softmax_at_the_token():
    logits_BTV = 3 * DRAW.normal(size=(B, T, V))
    expected = oracle(logits_BTV, np.eye(V), TOKENS_BT)[0]
    found = token_logprobs(jnp.float32(logits_BTV), jnp.asarray(TOKENS_BT))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    shifted = token_logprobs(jnp.float32(logits_BTV) + 100.0, jnp.asarray(TOKENS_BT))
    np.testing.assert_allclose(shifted, expected, atol=1e-4)
    narrow = token_logprobs(jnp.bfloat16(logits_BTV), jnp.asarray(TOKENS_BT))
    assert narrow.dtype == jnp.float32
    rounded = oracle(np.float64(jnp.bfloat16(logits_BTV)), np.eye(V), TOKENS_BT)[0]
    np.testing.assert_allclose(narrow, rounded, atol=1e-5)


def test_uniform_logits_give_minus_log_v_and_entropy_log_v():
    logp, logz, entropy = chunked_token_logprobs(
        jnp.ones((1, 3, D)), jnp.zeros((D, V)), jnp.zeros((1, 3), int), chunk=2
    )
    for found, expected in ((logp, -np.log(V)), (logz, np.log(V)), (entropy, np.log(V))):
        np.testing.assert_allclose(found, np.full((1, 3), expected), rtol=1e-6)


@pytest.mark.parametrize(
    "chunk, temperature, soft_cap", [(1, 1.0, 0.0), (3, 0.6, 0.0), (3, 1.7, 1.5), (7, 1.0, 1.5), (100, 0.6, 0.0)]
)
def test_chunked_scores_and_their_gradients_match_the_oracle(chunk, temperature, soft_cap):
    define = functools.partial(oracle, tokens_BT=TOKENS_BT, temperature=temperature, soft_cap=soft_cap)
    outputs, (hidden_grad, head_grad) = ours(
        HIDDEN_BTD, HEAD_DV, chunk=chunk, temperature=temperature, soft_cap=soft_cap
    )
    for found, expected in zip(outputs, define(HIDDEN_BTD, HEAD_DV), strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, atol=1e-5)
    expected = oracle_gradient(HIDDEN_BTD, lambda hidden_BTD: weighed(define(hidden_BTD, HEAD_DV)))
    np.testing.assert_allclose(hidden_grad, expected, atol=1e-5)
    expected = oracle_gradient(HEAD_DV, lambda head_DV: weighed(define(HIDDEN_BTD, head_DV)))
    np.testing.assert_allclose(head_grad, expected, atol=2e-5)


@pytest.mark.parametrize("output", range(3))
def test_each_output_has_a_gradient_of_its_own(output):
    cotangents = tuple(x * (index == output) for index, x in enumerate(COTANGENTS))
    _, (hidden_grad, _) = ours(HIDDEN_BTD, HEAD_DV, cotangents=cotangents, chunk=3)
    expected = oracle_gradient(HIDDEN_BTD, lambda x: weighed(oracle(x, HEAD_DV, TOKENS_BT), cotangents))
    np.testing.assert_allclose(hidden_grad, expected, atol=1e-5)


@pytest.mark.parametrize("chunk", [2, 3, 100])
def test_what_lies_outside_of_a_mask_is_not_scored_and_gets_no_gradient(chunk):
    """Of one row the head sees five positions, of the other one: no chunk but the first ones has any."""
    mask_BT = np.array([[0, 1, 1, 0, 1, 1, 1], [0, 0, 0, 1, 0, 0, 0]], bool)
    arrays = jnp.float32(HIDDEN_BTD), jnp.float32(HEAD_DV)
    score = functools.partial(chunked_token_logprobs, tokens_BT=jnp.asarray(TOKENS_BT), chunk=chunk, mask_BT=mask_BT)
    outputs, pull = jax.vjp(jax.jit(lambda hidden_BTD, head_DV: score(hidden_BTD, head_DV)), *arrays)
    for found, expected in zip(outputs, oracle(HIDDEN_BTD, HEAD_DV, TOKENS_BT), strict=True):
        np.testing.assert_allclose(found, np.where(mask_BT, expected, 0.0), atol=1e-5)
    hidden_grad, head_grad = pull(tuple(jnp.float32(x) for x in COTANGENTS))
    masked = tuple(np.where(mask_BT, x, 0.0) for x in COTANGENTS)
    expected = oracle_gradient(HIDDEN_BTD, lambda x: weighed(oracle(x, HEAD_DV, TOKENS_BT), masked))
    np.testing.assert_allclose(hidden_grad, expected, atol=1e-5)
    expected = oracle_gradient(HEAD_DV, lambda x: weighed(oracle(HIDDEN_BTD, x, TOKENS_BT), masked))
    np.testing.assert_allclose(head_grad, expected, atol=2e-5)


def test_no_chunk_without_a_position_under_the_mask_meets_the_head():
    """What is there may then be anything: even infinities reach nothing."""
    hidden_BTD = jnp.full((1, 6, D), jnp.inf).at[:, 4:].set(1.0)
    mask_BT, tokens_BT = jnp.arange(6)[None, :] >= 4, jnp.zeros((1, 6), int)
    logp, *_ = chunked_token_logprobs(hidden_BTD, jnp.ones((D, V)), tokens_BT, chunk=2, mask_BT=mask_BT)
    np.testing.assert_allclose(logp, [[0, 0, 0, 0, -np.log(V), -np.log(V)]], rtol=1e-6)
    gradient = jax.grad(
        lambda head_DV: jnp.sum(chunked_token_logprobs(hidden_BTD, head_DV, tokens_BT, chunk=2, mask_BT=mask_BT)[0])
    )(jnp.ones((D, V)))
    assert np.all(np.isfinite(gradient))


def test_chunked_equals_dense_whatever_the_logits_size():
    logits_BTV = 30 * HIDDEN_BTD @ HEAD_DV
    logp, _, entropy = ours(30 * HIDDEN_BTD, HEAD_DV, chunk=3)[0]
    np.testing.assert_allclose(logp, token_logprobs(jnp.float32(logits_BTV), jnp.asarray(TOKENS_BT)), atol=2e-4)
    assert np.all(np.isfinite(entropy)) and np.all(np.asarray(entropy) > -1e-3)


@pytest.mark.parametrize("label", [-100, -1, V, 2**31 - 1])
def test_any_label_is_inert_where_its_cotangent_is_zero(label):
    mask_BT = np.arange(T) < np.array([[3], [6]])
    cotangents = tuple(x * mask_BT for x in COTANGENTS)
    with jax.debug_nans(True):
        found = ours(HIDDEN_BTD, HEAD_DV, np.where(mask_BT, TOKENS_BT, label), cotangents=cotangents, chunk=3)
        expected = ours(HIDDEN_BTD, HEAD_DV, TOKENS_BT, cotangents=cotangents, chunk=3)
    assert np.all(np.isfinite(found[0][0]))
    np.testing.assert_array_equal(found[0][0][mask_BT], expected[0][0][mask_BT])
    for gradient, same in zip(found[1], expected[1], strict=True):
        np.testing.assert_array_equal(gradient, same)
    assert not np.any(found[1][0][~mask_BT])


def test_bfloat16_operands_round_the_operands_and_nothing_else():
    rounded_BTD, rounded_DV = (np.float64(jnp.bfloat16(x)) for x in (HIDDEN_BTD, HEAD_DV))
    outputs, gradients = ours(HIDDEN_BTD, HEAD_DV, chunk=3, operand_dtype=jnp.bfloat16)
    for found, expected in zip(outputs, oracle(rounded_BTD, rounded_DV, TOKENS_BT), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    exact = ours(HIDDEN_BTD, HEAD_DV, chunk=3)
    assert np.max(np.abs(outputs[0] - exact[0][0])) > 1e-4
    for found, expected in zip(gradients, exact[1], strict=True):
        assert found.dtype == jnp.float32
        assert np.linalg.norm(found - expected) < 1e-2 * np.linalg.norm(expected)


def test_bfloat16_hidden_states_give_float32_scores_and_a_bfloat16_gradient():
    function = lambda x: chunked_token_logprobs(x, jnp.float32(HEAD_DV), jnp.asarray(TOKENS_BT), chunk=3)[0]  # noqa: E731
    value, pull = jax.vjp(function, jnp.bfloat16(HIDDEN_BTD))
    assert value.dtype == jnp.float32 and pull(value)[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(value, oracle(HIDDEN_BTD, HEAD_DV, TOKENS_BT)[0], atol=0.05)


def total(hidden_BTD, head_DV, tokens_BT, score):
    return sum(jnp.sum(x) for x in score(hidden_BTD, head_DV, tokens_BT))


def dense(hidden_BTD, head_DV, tokens_BT):
    logits_BTV = jnp.einsum("btd,dv->btv", hidden_BTD, head_DV)
    return (token_logprobs(logits_BTV, tokens_BT),)


def mean_loss(**options):
    """The loss with weights 1 / (B T), as a function that gives a tuple."""

    def score(hidden_BTD, head_DV, tokens_BT):
        weight_BT = jnp.full(tokens_BT.shape, 1 / tokens_BT.size)
        return chunked_cross_entropy(hidden_BTD, head_DV, tokens_BT, weight_BT, **options)[:1]

    return score


def arguments(B, T, D, V):
    shapes = ((B, T, D), jnp.float32), ((D, V), jnp.float32), ((B, T), jnp.int32)
    return [jax.ShapeDtypeStruct(*shape) for shape in shapes]


def test_no_program_holds_all_logits_forward_or_backward(array_sizes):
    B, T, D, V = 2, 32, 8, 64
    chunked = functools.partial(chunked_token_logprobs, chunk=8, temperature=0.5, soft_cap=3.0)
    largest = {}
    for name, score in (("chunked", chunked), ("loss", mean_loss(chunk=8, soft_cap=3.0)), ("dense", dense)):
        program = jax.value_and_grad(functools.partial(total, score=score), argnums=(0, 1))
        largest[name] = max(array_sizes(jax.make_jaxpr(program)(*arguments(B, T, D, V)).jaxpr))
    assert largest["dense"] >= B * T * V
    assert max(largest["chunked"], largest["loss"]) <= B * T * V // 4


def test_memory_at_a_vocabulary_of_128k_is_a_quarter_of_the_dense_loss():
    def temporary_bytes(score):
        program = jax.value_and_grad(functools.partial(total, score=score), argnums=(0, 1))
        return jax.jit(program).lower(*arguments(4, 1024, 16, 131072)).compile().memory_analysis().temp_size_in_bytes

    limit = 0.25 * temporary_bytes(dense)
    assert temporary_bytes(functools.partial(chunked_token_logprobs, chunk=128)) <= limit
    assert temporary_bytes(mean_loss(chunk=128)) <= limit


# ---- the loss whose gradient is made with its logits ----

MASK_BT = np.arange(T) < np.array([[3], [6]])
WEIGHT_BT = MASK_BT * DRAW.random((B, T))


def loss_and_gradients(hidden_BTD, head_DV, tokens_BT, weight_BT, factor=1.0, **options):
    def loss(hidden_BTD, head_DV):
        value, logp_BT = chunked_cross_entropy(
            hidden_BTD, head_DV, jnp.asarray(tokens_BT), jnp.float32(weight_BT), **options
        )
        return factor * value, logp_BT

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(hidden_BTD, head_DV)


@pytest.mark.parametrize("chunk, z_coef, soft_cap", [(3, 0.0, 0.0), (7, 0.2, 0.0), (2, 0.1, 1.5)])
def test_the_chunked_loss_and_its_gradients_match_the_oracle(chunk, z_coef, soft_cap):
    def define(hidden_BTD, head_DV):
        logp_BT, logz_BT, _ = oracle(hidden_BTD, head_DV, TOKENS_BT, soft_cap=soft_cap)
        return np.sum(WEIGHT_BT * (-logp_BT + z_coef * logz_BT**2))

    labels = np.where(MASK_BT, TOKENS_BT, -100)
    options = dict(chunk=chunk, z_coef=z_coef, soft_cap=soft_cap)
    (value, logp_BT), gradients = loss_and_gradients(
        jnp.float32(HIDDEN_BTD), jnp.float32(HEAD_DV), labels, WEIGHT_BT, **options
    )
    np.testing.assert_allclose(value, define(HIDDEN_BTD, HEAD_DV), rtol=1e-6)
    expected = oracle(HIDDEN_BTD, HEAD_DV, TOKENS_BT, soft_cap=soft_cap)[0]
    np.testing.assert_allclose(np.asarray(logp_BT)[MASK_BT], expected[MASK_BT], atol=1e-5)
    np.testing.assert_allclose(gradients[0], oracle_gradient(HIDDEN_BTD, lambda x: define(x, HEAD_DV)), atol=1e-5)
    np.testing.assert_allclose(gradients[1], oracle_gradient(HEAD_DV, lambda x: define(HIDDEN_BTD, x)), atol=1e-5)
    assert not np.any(np.asarray(gradients[0])[~MASK_BT])


def test_the_chunked_loss_passes_on_the_gradient_that_reaches_it():
    arrays = jnp.float32(HIDDEN_BTD), jnp.float32(HEAD_DV), TOKENS_BT, WEIGHT_BT
    once, thrice = (loss_and_gradients(*arrays, factor, chunk=3)[1] for factor in (1.0, -3.0))
    for gradient, same in zip(thrice, once, strict=True):
        np.testing.assert_allclose(gradient, -3 * same, rtol=1e-6)


def test_the_log_probabilities_beside_the_loss_carry_no_gradient():
    def metric(hidden_BTD):
        return jnp.sum(
            chunked_cross_entropy(hidden_BTD, jnp.float32(HEAD_DV), TOKENS_BT, jnp.float32(WEIGHT_BT), chunk=3)[1]
        )

    assert not np.any(jax.grad(metric)(jnp.float32(HIDDEN_BTD)))


@pytest.mark.parametrize("hidden_dtype", ["float32", "bfloat16"])
def test_the_chunked_loss_in_bfloat16_is_near_and_gradients_keep_their_arrays_dtypes(hidden_dtype):
    exact = loss_and_gradients(jnp.float32(HIDDEN_BTD), jnp.float32(HEAD_DV), TOKENS_BT, WEIGHT_BT, chunk=3)
    hidden_BTD, head_DV = jnp.asarray(HIDDEN_BTD, hidden_dtype), jnp.float32(HEAD_DV)
    found = loss_and_gradients(hidden_BTD, head_DV, TOKENS_BT, WEIGHT_BT, chunk=3, operand_dtype="bfloat16")
    assert 0 < abs(found[0][0] - exact[0][0]) < 0.01 * WEIGHT_BT.sum()
    assert (found[0][0].dtype, found[1][0].dtype, found[1][1].dtype) == ("float32", hidden_dtype, "float32")
    for gradient, same in zip(found[1], exact[1], strict=True):
        assert np.linalg.norm(np.float32(gradient) - same) < 1e-2 * np.linalg.norm(same)


def test_an_empty_batch_has_loss_and_gradient_zero():
    with jax.debug_nans(True):
        (value, _), gradients = loss_and_gradients(
            jnp.float32(HIDDEN_BTD), jnp.float32(HEAD_DV), TOKENS_BT * 0 - 100, 0 * WEIGHT_BT, chunk=3, z_coef=0.1
        )
    assert value == 0 and not any(np.any(x) for x in gradients)


def test_a_vocabulary_sharded_over_the_mesh_gives_the_same_scores(mesh):
    B, T, D, V = 8, 6, 8, 12
    draw = np.random.default_rng(3)
    hidden, head, tokens = draw.normal(size=(B, T, D)), draw.normal(size=(D, V)), draw.integers(0, V, (B, T))
    rows, columns = ("replica", "fsdp"), "tensor"
    place = lambda x, *spec: jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec)))  # noqa: E731
    placed = (
        place(np.float32(hidden), rows, None, None),
        place(np.float32(head), None, columns),
        place(tokens, rows, None),
    )

    @jax.jit
    def both(hidden_BTD, head_DV, tokens_BT):
        score = lambda *x: chunked_token_logprobs(*x, tokens_BT, chunk=4)[0]  # noqa: E731
        logp_BT, pull = jax.vjp(score, hidden_BTD, head_DV)
        dense_BT = token_logprobs(jnp.einsum("btd,dv->btv", hidden_BTD, head_DV), tokens_BT)
        whole = lambda *x: -chunked_cross_entropy(*x, tokens_BT, jnp.ones_like(logp_BT), chunk=4)[0]  # noqa: E731
        return logp_BT, dense_BT, pull(jnp.ones_like(logp_BT)), jax.grad(whole, argnums=(0, 1))(hidden_BTD, head_DV)

    logp_BT, dense_BT, gradients, whole_gradients = both(*placed)
    expected = oracle(hidden, head, tokens)[0]
    np.testing.assert_allclose(logp_BT, expected, atol=1e-5)
    np.testing.assert_allclose(dense_BT, expected, atol=1e-5)
    alone = ours(hidden, head, tokens, cotangents=(np.ones((B, T)), np.zeros((B, T)), np.zeros((B, T))), chunk=4)[1]
    for found, whole, same in zip(gradients, whole_gradients, alone, strict=True):
        np.testing.assert_allclose(found, same, atol=1e-5)
        np.testing.assert_allclose(whole, same, atol=1e-5)
    assert gradients[1].sharding.spec == whole_gradients[1].sharding.spec == jax.P(None, columns)


def test_a_chunk_below_one_is_refused():
    with pytest.raises(ValueError, match="chunk=0 must be at least 1 position"):
        ours(HIDDEN_BTD, HEAD_DV, chunk=0)
