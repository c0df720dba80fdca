import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.losses import chunked_generalized_jsd, chunked_top_k, chunked_top_k_jsd, generalized_jsd, top_k_jsd

B, T, D, E, V = 2, 5, 4, 7, 9
DRAW = np.random.default_rng(0)
HIDDEN_BTD, HEAD_DV = DRAW.normal(size=(B, T, D)), DRAW.normal(size=(D, V))
TEACHER_BTE, TEACHER_EV = DRAW.normal(size=(B, T, E)), DRAW.normal(size=(E, V))
STUDENT_BTV, LOGITS_BTV = HIDDEN_BTD @ HEAD_DV, TEACHER_BTE @ TEACHER_EV
COTANGENT_BT = DRAW.normal(size=(B, T))
BETAS = (0.0, 0.3, 1.0)


def softmax(logits_V):
    return np.exp(logits_V) / np.exp(logits_V).sum()


def entropy(p_V):
    return -sum(p * np.log(p) for p in p_V)


def divergence(p_V, q_V, beta):
    """Entropies only: H(m) - beta H(p) - (1 - beta) H(q), and cross-entropy minus entropy at the ends."""
    if beta == 0:
        return -sum(p * np.log(q) for p, q in zip(p_V, q_V, strict=True)) - entropy(p_V)
    if beta == 1:
        return divergence(q_V, p_V, 0)
    return entropy(beta * p_V + (1 - beta) * q_V) - beta * entropy(p_V) - (1 - beta) * entropy(q_V)


def oracle(student_BTV, teacher_BTV, *, beta, temperature=1.0):
    """By the definition, one position at a time, in float64."""
    found_BT = np.zeros(student_BTV.shape[:2])
    for place in np.ndindex(found_BT.shape):
        p_V, q_V = (softmax(logits_BTV[place] / temperature) for logits_BTV in (teacher_BTV, student_BTV))
        found_BT[place] = divergence(p_V, q_V, beta)
    return found_BT


def capped(logits, soft_cap):
    return soft_cap * np.tanh(logits / soft_cap) if soft_cap else logits


def oracle_gradient(x, function, step=1e-6):
    """Central differences in every coordinate."""
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        above, below = x.copy(), x.copy()
        above[index] += step
        below[index] -= step
        gradient[index] = (function(above) - function(below)) / (2 * step)
    return gradient


@functools.partial(jax.jit, static_argnames=("score", "options"))
def outputs_and_gradients(score, options, *arrays):
    per_token_BT, pull = jax.vjp(functools.partial(score, **dict(options)), *arrays)
    return per_token_BT, pull(jnp.float32(COTANGENT_BT))


def ours(score, *arrays, **options):
    """The loss of each token, and the gradient of their weighed sum for each array."""
    return outputs_and_gradients(score, tuple(options.items()), *(jnp.float32(x) for x in arrays))


def dense(*arrays, **options):
    return ours(generalized_jsd, *arrays, **options)


def chunked(*arrays, **options):
    return ours(chunked_generalized_jsd, *arrays, **options)


HEADS = (HIDDEN_BTD, HEAD_DV, TEACHER_BTE, TEACHER_EV)


# ---- the whole divergence ----


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("beta", BETAS)
def test_the_divergence_and_its_gradient_match_the_oracle_and_the_teacher_gets_none(beta, temperature):
    define = functools.partial(oracle, beta=beta, temperature=temperature)
    value_BT, (gradient, teacher_gradient) = dense(STUDENT_BTV, LOGITS_BTV, beta=beta, temperature=temperature)
    np.testing.assert_allclose(value_BT, define(STUDENT_BTV, LOGITS_BTV), rtol=1e-6, atol=1e-6)
    expected = oracle_gradient(STUDENT_BTV, lambda x: np.sum(COTANGENT_BT * define(x, LOGITS_BTV)))
    np.testing.assert_allclose(gradient, expected, atol=1e-5)
    assert not np.any(teacher_gradient)


def test_a_worked_example_of_two_tokens():
    """p = (3/4, 1/4) of the teacher, q = (1/2, 1/2) of the student."""
    student, teacher = jnp.zeros((1, 1, 2)), jnp.array([[[np.log(3.0), 0.0]]])
    forward = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    reverse = 0.5 * np.log(2 / 3) + 0.5 * np.log(2.0)
    fifth = 0.2 * (0.75 * np.log(0.75 / 0.55) + 0.25 * np.log(0.25 / 0.45))
    fifth += 0.8 * (0.5 * np.log(0.5 / 0.55) + 0.5 * np.log(0.5 / 0.45))
    for beta, expected in ((0.0, forward), (1.0, reverse), (0.2, fifth)):
        np.testing.assert_allclose(generalized_jsd(student, teacher, beta=beta), [[expected]], rtol=1e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_equal_distributions_have_no_divergence_and_no_gradient(beta):
    value_BT, (gradient, _) = dense(STUDENT_BTV, STUDENT_BTV + 3.0, beta=beta)
    np.testing.assert_allclose(value_BT, 0.0, atol=5e-7)
    np.testing.assert_allclose(gradient, 0.0, atol=5e-7)


@pytest.mark.parametrize("end, scale", [(0.0, lambda beta: beta), (1.0, lambda beta: 1 - beta)])
def test_near_an_end_the_divergence_is_that_of_the_end_times_the_distance(end, scale):
    """So its direction is the end's, but its size is not: it tends to 0, and only over the distance to the end's."""
    beta = abs(end - 1e-3)
    value_BT, (gradient, _) = dense(STUDENT_BTV / 2, LOGITS_BTV / 2, beta=beta)
    end_BT, (end_gradient, _) = dense(STUDENT_BTV / 2, LOGITS_BTV / 2, beta=end)
    np.testing.assert_allclose(value_BT / scale(beta), end_BT, rtol=0.03)
    cosine = np.sum(gradient * end_gradient) / np.linalg.norm(gradient) / np.linalg.norm(end_gradient)
    assert cosine > 0.999 and np.all(np.asarray(end_BT) > 30 * np.asarray(value_BT))


def test_beta_mirrored_with_student_and_teacher_swapped_is_the_same():
    for beta in (0.0, 0.3, 0.7, 1.0):
        swapped_BT = oracle(LOGITS_BTV, STUDENT_BTV, beta=1 - beta)
        np.testing.assert_allclose(dense(STUDENT_BTV, LOGITS_BTV, beta=beta)[0], swapped_BT, atol=1e-6)


def test_a_high_temperature_shrinks_the_divergence_by_its_square():
    """Without Hinton's factor: at temperature t the logits' variances, and so the divergence, are 1 / t^2."""
    value_BT = dense(STUDENT_BTV, LOGITS_BTV, beta=0.0, temperature=40.0)[0]
    difference_BTV = LOGITS_BTV - STUDENT_BTV
    np.testing.assert_allclose(40.0**2 * value_BT, difference_BTV.var(axis=-1) / 2, rtol=0.1)


@pytest.mark.parametrize("beta", BETAS)
def test_large_logits_and_narrow_ones_are_finite_and_float32(beta):
    value_BT, (gradient, _) = dense(100 * STUDENT_BTV, 100 * LOGITS_BTV, beta=beta)
    assert np.all(np.isfinite(value_BT)) and np.all(np.isfinite(gradient)) and np.all(np.asarray(value_BT) >= -1e-6)
    narrow = [jnp.bfloat16(x) for x in (STUDENT_BTV, LOGITS_BTV)]
    value_BT = generalized_jsd(*narrow, beta=beta)
    assert value_BT.dtype == jnp.float32
    np.testing.assert_allclose(value_BT, oracle(*(np.float64(x) for x in narrow), beta=beta), atol=1e-5)


@pytest.mark.parametrize("beta", [-0.1, 1.1])
def test_a_beta_outside_of_the_unit_interval_is_refused(beta):
    with pytest.raises(ValueError, match=rf"beta={beta} must be in \[0, 1\]: 0 is the forward KL"):
        generalized_jsd(jnp.zeros((1, 1, 2)), jnp.zeros((1, 1, 2)), beta=beta)


# ---- in chunks ----


@pytest.mark.parametrize(
    "beta, chunk, options",
    [
        (0.0, 1, {}),
        (0.3, 2, dict(temperature=1.7)),
        (1.0, 5, dict(soft_cap=1.5)),
        (0.5, 100, dict(temperature=0.6, soft_cap=2.0, teacher_soft_cap=1.0)),
    ],
)
def test_chunks_equal_the_oracle_in_value_and_gradient_and_the_teacher_gets_none(beta, chunk, options):
    def define(hidden_BTD, head_DV):
        student_BTV = capped(hidden_BTD @ head_DV, options.get("soft_cap"))
        teacher_BTV = capped(LOGITS_BTV, options.get("teacher_soft_cap"))
        return oracle(student_BTV, teacher_BTV, beta=beta, temperature=options.get("temperature", 1.0))

    weighed = lambda *x: np.sum(COTANGENT_BT * define(*x))  # noqa: E731
    value_BT, gradients = chunked(*HEADS, beta=beta, chunk=chunk, **options)
    np.testing.assert_allclose(value_BT, define(HIDDEN_BTD, HEAD_DV), rtol=1e-6, atol=1e-6)
    expected = oracle_gradient(HIDDEN_BTD, lambda x: weighed(x, HEAD_DV))
    np.testing.assert_allclose(gradients[0], expected, atol=1e-5)
    np.testing.assert_allclose(gradients[1], oracle_gradient(HEAD_DV, lambda x: weighed(HIDDEN_BTD, x)), atol=2e-5)
    assert not np.any(gradients[2]) and not np.any(gradients[3])


@pytest.mark.parametrize("beta", BETAS)
def test_chunks_equal_the_dense_divergence_in_value_and_gradient(beta):
    def whole(hidden_BTD, head_DV, teacher_BTE, teacher_EV, beta):
        return generalized_jsd(hidden_BTD @ head_DV, teacher_BTE @ teacher_EV, beta=beta)

    expected_BT, expected = ours(whole, *HEADS, beta=beta)
    value_BT, gradients = chunked(*HEADS, beta=beta, chunk=2)
    np.testing.assert_allclose(value_BT, expected_BT, rtol=1e-6, atol=1e-6)
    for found, same in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(found, same, atol=1e-5)


def test_positions_whose_cotangent_is_zero_are_inert():
    mask_BT = np.arange(T) < np.array([[2], [4]])
    other_BTD = np.where(mask_BT[..., None], HIDDEN_BTD, 17.0)

    @jax.jit
    def gradients(hidden_BTD):
        def loss(*student):
            value_BT = chunked_generalized_jsd(*student, *map(jnp.float32, HEADS[2:]), beta=0.5, chunk=2)
            return jnp.sum(jnp.where(mask_BT, value_BT, 0.0))

        return jax.grad(loss, argnums=(0, 1))(hidden_BTD, jnp.float32(HEAD_DV))

    with jax.debug_nans(True):
        found, same = (gradients(jnp.float32(x)) for x in (other_BTD, HIDDEN_BTD))
    np.testing.assert_array_equal(found[1], same[1])
    np.testing.assert_array_equal(found[0][mask_BT], same[0][mask_BT])
    assert not np.any(np.asarray(found[0])[~mask_BT])


def test_bfloat16_operands_round_the_operands_of_both_heads_and_nothing_else():
    rounded = [np.float64(jnp.bfloat16(x)) for x in HEADS]
    value_BT, gradients = chunked(*HEADS, beta=0.5, chunk=2, operand_dtype=jnp.bfloat16)
    expected_BT = oracle(rounded[0] @ rounded[1], rounded[2] @ rounded[3], beta=0.5)
    np.testing.assert_allclose(value_BT, expected_BT, atol=1e-5)
    assert np.max(np.abs(value_BT - oracle(STUDENT_BTV, LOGITS_BTV, beta=0.5))) > 1e-4
    assert all(gradient.dtype == jnp.float32 for gradient in gradients)


def test_no_program_holds_all_logits_forward_or_backward(array_sizes):
    B, T, D, E, V = 2, 32, 8, 12, 64
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((B, T, D), (D, V), (B, T, E), (E, V))]
    stored = [jax.ShapeDtypeStruct((B, T, 3), jnp.int32), jax.ShapeDtypeStruct((B, T, 4), jnp.float32)]
    for score, arrays in ((chunked_generalized_jsd, shapes), (chunked_top_k_jsd, shapes[:2] + stored)):
        loss = lambda *x, score=score: jnp.sum(score(*x, beta=0.5, chunk=8, soft_cap=3.0))  # noqa: E731
        program = jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1)))(*arrays)
        assert max(array_sizes(program.jaxpr)) <= B * T * V // 4
    program = jax.make_jaxpr(functools.partial(chunked_top_k, k=3, chunk=8, soft_cap=3.0))(*shapes[2:])
    assert max(array_sizes(program.jaxpr)) <= B * T * V // 4


def test_memory_at_a_vocabulary_of_128k_is_a_quarter_of_the_dense_divergence():
    shapes = ((4, 1024, 16), (16, 131072), (4, 1024, 24), (24, 131072))

    def temporary_bytes(score):
        program = jax.value_and_grad(lambda *x: jnp.sum(score(*x)), argnums=(0, 1))
        arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        return jax.jit(program).lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    whole = lambda h, w, g, u: generalized_jsd(h @ w, g @ u, beta=0.5)  # noqa: E731
    parts = functools.partial(chunked_generalized_jsd, beta=0.5, chunk=128)
    assert temporary_bytes(parts) <= 0.25 * temporary_bytes(whole)


# ---- the teacher's top k ----


def logp_of(ids_BTK, temperature=1.0):
    """The teacher's log-probabilities of these tokens, and of all others together: each a sum over its own tokens."""
    logp_BTJ = np.zeros((B, T, ids_BTK.shape[-1] + 1))
    for place in np.ndindex(B, T):
        p_V = softmax(LOGITS_BTV[place] / temperature)
        rest = [token for token in range(V) if token not in ids_BTK[place]]
        logp_BTJ[place] = np.log([*p_V[ids_BTK[place]], p_V[rest].sum()])
    return logp_BTJ


def stored(K, temperature=1.0):
    """The teacher's likeliest K tokens in no order, and their log-probabilities and that of the rest."""
    ids_BTK = DRAW.permuted(np.argsort(LOGITS_BTV, axis=-1)[..., -K:], axis=-1)
    return ids_BTK, logp_of(ids_BTK, temperature)


def of_stored(ids_BTK, logp_BTJ):
    return lambda student_BTV, **options: top_k_jsd(student_BTV, jnp.asarray(ids_BTK), jnp.asarray(logp_BTJ), **options)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("K, temperature", [(1, 1.0), (4, 0.7)])
def test_the_top_k_divergence_and_its_gradient_match_the_oracle_of_k_tokens_and_the_rest(beta, K, temperature):
    ids_BTK, logp_BTJ = stored(K, temperature)

    def define(student_BTV):
        found_BT = np.zeros((B, T))
        for place in np.ndindex(B, T):
            q = softmax(student_BTV[place] / temperature)[ids_BTK[place]]
            found_BT[place] = divergence(np.exp(logp_BTJ[place]), np.append(q, 1 - q.sum()), beta)
        return found_BT

    value_BT, (gradient,) = ours(of_stored(ids_BTK, logp_BTJ), STUDENT_BTV, beta=beta, temperature=temperature)
    np.testing.assert_allclose(value_BT, define(STUDENT_BTV), rtol=2e-6, atol=1e-6)
    expected = oracle_gradient(STUDENT_BTV, lambda x: np.sum(COTANGENT_BT * define(x)))
    np.testing.assert_allclose(gradient, expected, atol=1e-5)


@pytest.mark.parametrize(
    "k, chunk, options", [(1, 1, {}), (4, 2, dict(temperature=1.7)), (V - 1, 100, dict(temperature=0.6, soft_cap=1.5))]
)
def test_the_likeliest_tokens_and_the_log_probabilities_of_them_and_the_rest_are_those_of_a_sort(k, chunk, options):
    logits_BTV = capped(LOGITS_BTV, options.get("soft_cap")) / options.get("temperature", 1.0)
    find = jax.jit(functools.partial(chunked_top_k, k=k, chunk=chunk, **options))
    ids_BTK, logp_BTJ = find(jnp.float32(TEACHER_BTE), jnp.float32(TEACHER_EV))
    assert (ids_BTK.dtype, logp_BTJ.dtype) == (jnp.int32, jnp.float32)
    for place in np.ndindex(B, T):
        order = sorted(range(V), key=lambda token: -logits_BTV[place][token])
        p_V = softmax(logits_BTV[place])[order]
        assert ids_BTK[place].tolist() == order[:k]
        np.testing.assert_allclose(logp_BTJ[place], np.log([*p_V[:k], p_V[k:].sum()]), rtol=1e-5, atol=1e-6)


def test_the_likeliest_tokens_are_of_rounded_operands_in_float32():
    rounded = [np.float64(jnp.bfloat16(x)) for x in (TEACHER_BTE, TEACHER_EV)]
    given = jnp.float32(TEACHER_BTE), jnp.float32(TEACHER_EV)
    ids_BTK, logp_BTJ = chunked_top_k(*given, k=2, chunk=2, operand_dtype=jnp.bfloat16)
    expected_BTV = np.log([[softmax(logits_V) for logits_V in logits_TV] for logits_TV in rounded[0] @ rounded[1]])
    np.testing.assert_allclose(logp_BTJ[..., :2], np.take_along_axis(expected_BTV, np.asarray(ids_BTK), -1), atol=1e-5)
    assert logp_BTJ.dtype == jnp.float32


@pytest.mark.parametrize("chunk", [2, 100])
def test_top_k_in_chunks_equals_top_k_at_once_in_value_and_gradient(chunk):
    ids_BTK, logp_BTJ = stored(3, temperature=1.5)
    given, options = (jnp.asarray(ids_BTK), jnp.float32(logp_BTJ)), dict(beta=0.3, temperature=1.5)

    def whole(hidden_BTD, head_DV, **options):
        return top_k_jsd(2 * jnp.tanh(hidden_BTD @ head_DV / 2), *given, **options)

    parts = lambda *x, **options: chunked_top_k_jsd(*x, *given, chunk=chunk, soft_cap=2.0, **options)  # noqa: E731
    with jax.debug_nans(True):
        found, expected = (ours(score, HIDDEN_BTD, HEAD_DV, **options) for score in (parts, whole))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-5), found, expected)


@pytest.mark.parametrize("beta", BETAS)
def test_more_tokens_come_nearer_to_the_whole_divergence_and_all_but_one_reach_it(beta):
    ids_BTK, _ = stored(V - 1)
    # Nested sets of tokens: each partition refines the one before it.
    values = [
        np.asarray(of_stored(ids_BTK[..., :K], logp_of(ids_BTK[..., :K]))(jnp.float32(STUDENT_BTV), beta=beta))
        for K in (1, 3, V - 1)
    ]
    assert np.all(values[0] <= values[1] + 1e-6) and np.all(values[1] <= values[2] + 1e-6)
    np.testing.assert_allclose(values[2], oracle(STUDENT_BTV, LOGITS_BTV, beta=beta), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_what_a_teacher_finds_of_itself_teaches_as_it_does_and_float16_costs_a_thousandth(beta):
    """The rest is small here, down to 1e-5: made of the others' float16 it would cost a tenth, beyond float16 more."""
    ids_BTK, logp_BTJ = chunked_top_k(jnp.float32(TEACHER_BTE), jnp.float32(TEACHER_EV), k=V - 1, chunk=2)
    for ids, logp, rtol in ((ids_BTK, logp_BTJ, 1e-5), (np.uint16(ids_BTK), jnp.float16(logp_BTJ), 1e-3)):
        value_BT, _ = ours(of_stored(ids, logp), STUDENT_BTV, beta=beta)
        assert value_BT.dtype == jnp.float32
        np.testing.assert_allclose(value_BT, oracle(STUDENT_BTV, LOGITS_BTV, beta=beta), rtol=rtol, atol=rtol / 4)


def test_padding_of_a_stored_teacher_is_finite():
    """Zeros in all places: one token K times over, each time sure."""
    ids_BTK, logp_BTJ = np.zeros((B, T, 3), np.uint16), np.zeros((B, T, 4), np.float16)
    with jax.debug_nans(True):
        for beta in BETAS:
            value_BT, (gradient,) = ours(of_stored(ids_BTK, logp_BTJ), STUDENT_BTV, beta=beta)
            assert np.all(np.isfinite(value_BT)) and np.all(np.isfinite(gradient))


def test_a_stored_teacher_that_leaves_next_to_nothing_is_finite_and_gets_no_gradient():
    ids_BTK, logp_BTJ = stored(2)
    logp_BTJ[..., 2] = np.finfo(np.float16).min
    with jax.debug_nans(True):
        for beta in BETAS:
            value_BT, (gradient,) = ours(of_stored(ids_BTK, logp_BTJ), STUDENT_BTV, beta=beta)
            assert np.all(np.isfinite(value_BT)) and np.all(np.isfinite(gradient))
    loss = lambda logp_BTJ: jnp.sum(top_k_jsd(jnp.float32(STUDENT_BTV), ids_BTK, logp_BTJ, beta=0.5))  # noqa: E731
    assert not np.any(jax.grad(loss)(jnp.float32(logp_BTJ)))


def test_a_student_that_leaves_nothing_to_the_rest_keeps_a_finite_gradient():
    """1 - sum of its probabilities would be 0 in float32; the sum over the other tokens is not."""
    ids_BTK, logp_BTJ = stored(2)
    sharp_BTV = STUDENT_BTV.copy()
    np.put_along_axis(sharp_BTV, ids_BTK, 40.0, axis=-1)
    value_BT, (gradient,) = ours(of_stored(ids_BTK, logp_BTJ), sharp_BTV, beta=0.0)
    rest_BT = np.exp(STUDENT_BTV).sum(axis=-1) - np.exp(np.take_along_axis(STUDENT_BTV, ids_BTK, -1)).sum(axis=-1)
    student_BTJ = np.stack([np.full((B, T), -np.log(2))] * 2 + [np.log(rest_BT / 2) - 40], axis=-1)
    np.testing.assert_allclose(value_BT, (np.exp(logp_BTJ) * (logp_BTJ - student_BTJ)).sum(axis=-1), rtol=1e-5)
    assert np.all(np.isfinite(gradient))


def test_memory_of_the_top_k_divergence_does_not_grow_with_k():
    B, T, V = 2, 16, 4096

    def temporary_bytes(K):
        shapes = ((B, T, V), jnp.float32), ((B, T, K), jnp.int32), ((B, T, K + 1), jnp.float32)
        program = jax.value_and_grad(lambda *x: jnp.sum(top_k_jsd(*x, beta=0.5)))
        arrays = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
        return jax.jit(program).lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(64) <= 1.2 * temporary_bytes(4) + 2**16


def test_as_many_tokens_as_the_vocabulary_are_refused():
    ids = jnp.arange(3)[None, None, :]
    with pytest.raises(
        ValueError, match="the teacher's 3 tokens leave none of a vocabulary of 3; give generalized_jsd"
    ):
        top_k_jsd(jnp.zeros((1, 1, 3)), ids, jnp.zeros((1, 1, 4)), beta=0.5)


# ---- on a mesh ----


@pytest.mark.parametrize("beta", [0.4])
def test_a_vocabulary_sharded_over_the_mesh_gives_the_same_divergences(mesh, beta):
    B, T, D, E, V, K = 8, 6, 8, 16, 12, 3
    draw = np.random.default_rng(3)
    shapes = (B, T, D), (D, V), (B, T, E), (E, V)
    arrays = [np.float32(draw.normal(size=shape)) for shape in shapes]
    student_BTV, teacher_BTV = (np.float64(x) @ np.float64(y) for x, y in (arrays[:2], arrays[2:]))
    order_BTV = np.argsort(-teacher_BTV, axis=-1)
    p_BTV = np.take_along_axis(np.exp(teacher_BTV), order_BTV, axis=-1)
    p_BTV /= p_BTV.sum(axis=-1, keepdims=True)
    ids_BTK, p_BTK, rest_BT1 = order_BTV[..., :K], p_BTV[..., :K], p_BTV[..., K:].sum(axis=-1, keepdims=True)
    logp_BTJ = np.float32(np.log(np.concatenate([p_BTK, rest_BT1], axis=-1)))
    rows, columns = ("replica", "fsdp"), "tensor"
    place = lambda x, *spec: jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec)))  # noqa: E731
    specs = (rows,), (None, columns), (rows,), (None, columns), (rows,), (rows,)
    placed = [place(x, *spec) for x, spec in zip((*arrays, ids_BTK, logp_BTJ), specs, strict=True)]

    @jax.jit
    def every(hidden_BTD, head_DV, teacher_BTE, teacher_EV, ids_BTK, logp_BTJ):
        def values(hidden_BTD, head_DV):
            student_BTV = jnp.einsum("btd,dv->btv", hidden_BTD, head_DV)
            teacher_BTV = jnp.einsum("btd,dv->btv", teacher_BTE, teacher_EV)
            return (
                chunked_generalized_jsd(hidden_BTD, head_DV, teacher_BTE, teacher_EV, beta=beta, chunk=4),
                generalized_jsd(student_BTV, teacher_BTV, beta=beta),
                top_k_jsd(student_BTV, ids_BTK, logp_BTJ, beta=beta),
                chunked_top_k_jsd(hidden_BTD, head_DV, ids_BTK, logp_BTJ, beta=beta, chunk=4),
            )

        found, pull = jax.vjp(lambda *x: list(values(*x)), hidden_BTD, head_DV)
        ones_BT, zeros_BT = jnp.ones_like(found[0]), jnp.zeros_like(found[0])
        likeliest = chunked_top_k(teacher_BTE, teacher_EV, k=K, chunk=4)
        return likeliest, found, *(pull([ones_BT if n == place else zeros_BT for n in range(4)]) for place in range(4))

    likeliest, (parts_BT, whole_BT, top_BT, top_parts_BT), *all_gradients = every(*placed)
    np.testing.assert_array_equal(likeliest[0], ids_BTK)
    np.testing.assert_allclose(likeliest[1], logp_BTJ, rtol=1e-5, atol=1e-5)
    assert all(x.sharding.spec == jax.P(rows, None, None) for x in likeliest)
    expected_BT = oracle(student_BTV, teacher_BTV, beta=beta)
    np.testing.assert_allclose(parts_BT, expected_BT, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(whole_BT, expected_BT, rtol=1e-5, atol=1e-5)
    alone_BT = top_k_jsd(*(jnp.asarray(np.asarray(x)) for x in (student_BTV, ids_BTK, logp_BTJ)), beta=beta)
    np.testing.assert_allclose(top_BT, alone_BT, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(top_parts_BT, alone_BT, rtol=1e-5, atol=1e-5)
    for gradients, whole_gradients in (all_gradients[:2], all_gradients[:1:-1]):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), gradients, whole_gradients)
        assert gradients[1].sharding.spec == jax.P(None, columns)
