import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import sharding
from jaxllm.losses import generalized_jsd
from jaxllm.model import parameter_rules
from jaxllm.train.objectives import (
    ObjectiveConfig,
    distillation,
    embedding_noise,
    likeliest,
    next_token,
    stored_distillation,
)


def objective_of(tiny, built, z_coef=0.0, **changes):
    model, params = built(tiny(**changes))
    return jax.jit(next_token(model, ObjectiveConfig(z_coef))), params, model


def micro_batch(packed_batch):
    return {name: x[0] for name, x in packed_batch(1, 4, 8).items()}


@pytest.mark.parametrize("z_coef", [0.0, 0.1])
def test_next_token_is_the_weighted_cross_entropy_of_the_packed_logits(tiny, built, packed_batch, z_coef):
    objective, params, model = objective_of(tiny, built, z_coef)
    batch = micro_batch(packed_batch)
    packed = dict(positions_BT=batch["positions_BT"], segments_BT=batch["segments_BT"])
    logits_BTV = np.float64(jax.jit(model.forward)(params, batch["tokens_BT"], **packed))
    expected = nll = 0.0
    for b, t in np.ndindex(4, 8):
        if batch["mask_BT"][b, t]:
            logz = np.log(np.exp(logits_BTV[b, t]).sum())
            token = logz - logits_BTV[b, t, batch["targets_BT"][b, t]]
            nll += token
            expected += batch["weight_BT"][b, t] * (token + z_coef * logz**2)
    loss, metrics = objective(params, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["nll"].total, nll, rtol=1e-5)
    assert metrics["nll"].count == batch["mask_BT"].sum()


def test_the_metric_counts_tokens_whatever_the_weights(tiny, built, packed_batch):
    objective, params, _ = objective_of(tiny, built)
    batch = micro_batch(packed_batch)
    plain, tripled = (objective(params, batch | {"weight_BT": factor * batch["weight_BT"]}) for factor in (1, 3))
    np.testing.assert_allclose(tripled[0], 3 * plain[0], rtol=1e-6)
    assert tripled[1]["nll"].total == plain[1]["nll"].total


def test_tokens_at_masked_positions_and_padding_change_neither_loss_nor_gradient(tiny, built, packed_batch):
    model, params = built(tiny())
    both = jax.jit(jax.value_and_grad(lambda *x: next_token(model, ObjectiveConfig(1e-3))(*x)[0]))
    batch = micro_batch(packed_batch)
    other = {name: x.copy() for name, x in batch.items()}
    outside = ~batch["mask_BT"]
    other["targets_BT"][outside] = 39
    other["tokens_BT"][batch["segments_BT"] == 0] = 17
    value, gradient = both(params, batch)
    changed, changed_gradient = both(params, other)
    assert value == changed and np.any(outside)
    jax.tree.map(np.testing.assert_array_equal, gradient, changed_gradient)


@pytest.mark.parametrize("pad", [1, 37])
def test_more_padding_changes_nothing(tiny, built, packed_batch, pad):
    objective, params, _ = objective_of(tiny, built)
    batch = micro_batch(packed_batch)
    longer = {name: np.pad(x, ((0, 0), (0, pad))) for name, x in batch.items()}
    np.testing.assert_allclose(objective(params, longer)[0], objective(params, batch)[0], rtol=1e-6)


def test_a_batch_without_a_target_has_loss_and_gradient_zero(tiny, built, packed_batch):
    model, params = built(tiny())
    batch = {name: np.zeros_like(x) for name, x in micro_batch(packed_batch).items()}
    with jax.debug_nans(True):
        value, gradient = jax.jit(jax.value_and_grad(lambda *x: next_token(model, ObjectiveConfig(1e-3))(*x)[0]))(
            params, batch
        )
    assert value == 0 and not any(np.any(x) for x in jax.tree.leaves(gradient))


def test_dropout_is_on_only_where_the_batch_has_a_key(tiny, built, packed_batch):
    objective, params, _ = objective_of(tiny, built, dropout=0.5)
    batch = micro_batch(packed_batch)
    keyed = [objective(params, batch | {"dropout_key": jax.random.key(seed)})[0] for seed in (0, 0, 1)]
    assert keyed[0] == keyed[1] != keyed[2]
    assert objective(params, batch)[0] == objective_of(tiny, built)[0](params, batch)[0]


def test_a_negative_z_loss_is_refused():
    with pytest.raises(ValueError, match=r"objective\.z_coef=-0\.1 must not be negative"):
        ObjectiveConfig(-0.1)
    assert jnp.isfinite(ObjectiveConfig(0.0).z_coef)


# ---- noise on the embeddings ----

SEGMENTS_BT = np.array([[1, 1, 1, 1, 1, 2, 2, 3], [1, 1, 2, 2, 2, 2, 0, 0]])
LENGTHS_BT = np.array([[5, 5, 5, 5, 5, 2, 2, 1], [2, 2, 4, 4, 4, 4, 2, 2]])


def test_noise_is_uniform_and_as_large_as_the_tokens_own_document_and_the_width_say():
    """Not as its row's length or its micro-batch's: alpha / sqrt(L D) of L in its own segment."""
    width, alpha = 4096, 5.0
    noise_BTD = np.asarray(embedding_noise(jax.random.key(0), jnp.asarray(SEGMENTS_BT), width=width, alpha=alpha))
    bound_BT = alpha / np.sqrt(LENGTHS_BT * width)
    assert np.all(np.abs(noise_BTD) <= bound_BT[..., None])
    np.testing.assert_allclose(np.abs(noise_BTD).max(axis=-1), bound_BT, rtol=0.01)
    np.testing.assert_allclose(noise_BTD.std(axis=-1), bound_BT / np.sqrt(3), rtol=0.05)
    np.testing.assert_allclose(noise_BTD.mean(axis=-1) / bound_BT, 0.0, atol=0.05)
    # No two positions share their noise.
    assert np.max(np.abs(np.corrcoef(noise_BTD.reshape(-1, width)) - np.eye(SEGMENTS_BT.size))) < 0.1


def test_a_documents_noise_is_as_large_packed_as_alone():
    alone = embedding_noise(jax.random.key(0), jnp.ones((1, 4), int), width=4096, alpha=5.0)
    packed = embedding_noise(jax.random.key(1), jnp.asarray(SEGMENTS_BT), width=4096, alpha=5.0)[1, 2:6]
    np.testing.assert_allclose(np.std(packed), np.std(alone), rtol=0.02)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_model_adds_the_noise_to_its_embeddings(tiny, built, packed_batch, scale):
    """Noise that makes every token's embedding that of another token gives that token's hidden states."""
    model, params = built(tiny(embedding_scale=scale))
    batch = micro_batch(packed_batch)
    packed = dict(positions_BT=batch["positions_BT"], segments_BT=batch["segments_BT"])
    other_BT = (batch["tokens_BT"] + 1) % 40
    noise_BTD = params["embedding"]["table"][other_BT] - params["embedding"]["table"][batch["tokens_BT"]]
    hidden = jax.jit(model.hidden)
    found = hidden(params, batch["tokens_BT"], **packed, embedding_noise_BTD=noise_BTD)
    np.testing.assert_allclose(found, hidden(params, other_BT, **packed), atol=1e-5)
    nothing = hidden(params, batch["tokens_BT"], **packed, embedding_noise_BTD=0 * noise_BTD)
    np.testing.assert_array_equal(nothing, hidden(params, batch["tokens_BT"], **packed))


def test_noise_is_on_only_where_the_batch_has_a_key_and_alpha_is_not_zero(tiny, built, packed_batch):
    model, params = built(tiny())
    batch = micro_batch(packed_batch)
    noisy, plain = (jax.jit(next_token(model, ObjectiveConfig(0.0, neftune_alpha=alpha))) for alpha in (5.0, 0.0))
    keyed = [noisy(params, batch | {"noise_key": jax.random.key(seed)})[0] for seed in (0, 0, 1)]
    assert keyed[0] == keyed[1] != keyed[2]
    assert noisy(params, batch)[0] == plain(params, batch)[0] == plain(params, batch | {"noise_key": keyed[0]})[0]


def test_the_noise_of_a_micro_batch_is_the_one_of_its_key(tiny, built, packed_batch):
    model, params = built(tiny())
    batch, key = micro_batch(packed_batch), jax.random.key(3)
    packed = dict(positions_BT=batch["positions_BT"], segments_BT=batch["segments_BT"])

    @jax.jit
    def expected(params):
        noise_BTD = embedding_noise(key, batch["segments_BT"], width=16, alpha=5.0)
        hidden_BTD = model.hidden(params, batch["tokens_BT"], **packed, embedding_noise_BTD=noise_BTD)
        return model.cross_entropy(params, hidden_BTD, batch["targets_BT"], batch["weight_BT"])[0]

    found, _ = jax.jit(next_token(model, ObjectiveConfig(0.0, neftune_alpha=5.0)))(params, batch | {"noise_key": key})
    np.testing.assert_allclose(found, expected(params), rtol=1e-6)


# ---- distillation ----

WIDER = dict(width=24, num_layers=1, mlp_width=16)


def student_and_teacher(tiny, built, **changes):
    model, params = built(tiny(**changes))
    teacher, teacher_params = built(tiny(**WIDER))
    return model, params, teacher, jax.tree.map(jnp.asarray, teacher_params)


@functools.cache
def with_gradients(model, teacher, config):
    """(params, teacher_params, batch) -> (loss, gradients for both trees), compiled once for all tests."""

    def loss(params, teacher_params, batch):
        if teacher is None:
            return next_token(model, config)(params, batch)[0]
        return distillation(model, teacher, config)(params, batch, teacher_params=teacher_params)[0]

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


def log_softmax(logits_V):
    return logits_V - np.log(np.exp(logits_V).sum())


@pytest.mark.parametrize("beta, temperature, hard_weight", [(0.0, 1.0, 0.0), (1.0, 2.0, 0.3), (0.3, 0.5, 1.0)])
def test_distillation_mixes_the_datas_cross_entropy_with_the_teachers_divergence(
    tiny, built, packed_batch, beta, temperature, hard_weight
):
    model, params, teacher, teacher_params = student_and_teacher(tiny, built)
    batch = micro_batch(packed_batch)
    packed = dict(positions_BT=batch["positions_BT"], segments_BT=batch["segments_BT"])
    student_BTV = np.float64(jax.jit(model.forward)(params, batch["tokens_BT"], **packed))
    teacher_BTV = np.float64(jax.jit(teacher.forward)(teacher_params, batch["tokens_BT"], **packed))
    expected = nll = jsd = 0.0
    for place in np.argwhere(batch["mask_BT"]):
        place = tuple(place)
        token = -log_softmax(student_BTV[place])[batch["targets_BT"][place]]
        q_V, p_V = (np.exp(log_softmax(logits_BTV[place] / temperature)) for logits_BTV in (student_BTV, teacher_BTV))
        m_V = beta * p_V + (1 - beta) * q_V
        ends = {0.0: np.sum(p_V * np.log(p_V / q_V)), 1.0: np.sum(q_V * np.log(q_V / p_V))}
        between = beta * np.sum(p_V * np.log(p_V / m_V)) + (1 - beta) * np.sum(q_V * np.log(q_V / m_V))
        divergence = ends.get(beta, between)
        nll, jsd = nll + token, jsd + divergence
        mixed = hard_weight * token + (1 - hard_weight) * temperature**2 * divergence
        expected += batch["weight_BT"][place] * mixed
    config = ObjectiveConfig(0.0, beta=beta, temperature=temperature, hard_weight=hard_weight)
    objective = jax.jit(distillation(model, teacher, config))
    loss, metrics = objective(params, batch, teacher_params=teacher_params)
    np.testing.assert_allclose(loss, expected, rtol=2e-6)
    np.testing.assert_allclose(metrics["nll"].total, nll, rtol=1e-5)
    np.testing.assert_allclose(metrics["jsd"].total, jsd, rtol=1e-5)
    assert metrics["nll"].count == metrics["jsd"].count == batch["mask_BT"].sum()


def test_with_all_weight_on_the_data_distillation_is_next_token_prediction(tiny, built, packed_batch):
    model, params, teacher, teacher_params = student_and_teacher(tiny, built)
    config, batch = ObjectiveConfig(1e-3, hard_weight=1.0), micro_batch(packed_batch)
    found, expected = (with_gradients(model, x, config)(params, teacher_params, batch) for x in (teacher, None))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), found[1][0], expected[1][0])


def test_the_teacher_gets_no_gradient_no_dropout_and_no_noise(tiny, built, packed_batch):
    model, params, teacher, teacher_params = student_and_teacher(tiny, built)
    dropping = built(tiny(**WIDER, dropout=0.5))[0]
    batch = micro_batch(packed_batch)
    packed = dict(positions_BT=batch["positions_BT"], segments_BT=batch["segments_BT"])
    keys = {"dropout_key": jax.random.key(0), "noise_key": jax.random.key(1)}

    @jax.jit
    def expected(params, teacher_params):
        noise_BTD = embedding_noise(keys["noise_key"], batch["segments_BT"], width=16, alpha=5.0)
        student_BTV = model.forward(params, batch["tokens_BT"], **packed, embedding_noise_BTD=noise_BTD)
        teacher_BTV = teacher.forward(teacher_params, batch["tokens_BT"], **packed)
        return jnp.sum(batch["weight_BT"] * generalized_jsd(student_BTV, teacher_BTV, beta=0.0))

    config = ObjectiveConfig(0.0, hard_weight=0.0, neftune_alpha=5.0)
    loss, gradients = with_gradients(model, dropping, config)(params, teacher_params, batch | keys)
    np.testing.assert_allclose(loss, expected(params, teacher_params), rtol=1e-6)
    assert np.any(gradients[0]["embedding"]["table"]) and not any(np.any(x) for x in jax.tree.leaves(gradients[1]))


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(tiny, built, packed_batch):
    model, params = built(tiny())
    config = ObjectiveConfig(0.0, beta=0.5, hard_weight=0.0)
    loss, (gradient, _) = with_gradients(model, model, config)(params, params, micro_batch(packed_batch))
    assert abs(loss) < 1e-6
    jax.tree.map(lambda x: np.testing.assert_allclose(x, 0.0, atol=1e-6), gradient)


MIXED = ObjectiveConfig(1e-3, beta=0.3, temperature=1.5)


def test_masked_tokens_change_nothing_in_distillation_and_an_empty_batch_is_zero(tiny, built, packed_batch):
    model, params, teacher, teacher_params = student_and_teacher(tiny, built)
    both = functools.partial(with_gradients(model, teacher, MIXED), params, teacher_params)
    batch = micro_batch(packed_batch)
    other = {name: x.copy() for name, x in batch.items()}
    other["targets_BT"][~batch["mask_BT"]] = 39
    other["tokens_BT"][batch["segments_BT"] == 0] = 17
    jax.tree.map(np.testing.assert_array_equal, both(batch), both(other))
    with jax.debug_nans(True):
        loss, gradients = both({name: np.zeros_like(x) for name, x in batch.items()})
    assert loss == 0 and not any(np.any(x) for x in jax.tree.leaves(gradients))


def test_micro_batches_of_a_distillation_add_up_to_the_whole(tiny, built, packed_batch):
    """16 ragged sequences as 1 x 16 and 4 x 4: loss to 1e-6, gradients to 1e-5."""
    model, params, teacher, teacher_params = student_and_teacher(tiny, built)
    both = functools.partial(with_gradients(model, teacher, MIXED), params, teacher_params)
    whole = {name: x[0] for name, x in packed_batch(1, 16, 8).items()}
    parts = [{name: x[4 * m : 4 * m + 4] for name, x in whole.items()} for m in range(4)]
    loss, gradients = jax.tree.map(lambda *x: sum(x), *map(both, parts))
    expected_loss, expected = both(whole)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5 * np.abs(y).max()), gradients, expected)


def test_all_tokens_but_one_of_a_stored_teacher_teach_as_the_teacher_does(tiny, built, packed_batch):
    model, params, teacher, teacher_params = student_and_teacher(tiny, built)
    batch = micro_batch(packed_batch)
    packed = dict(positions_BT=batch["positions_BT"], segments_BT=batch["segments_BT"])
    logits_BTV = jax.jit(teacher.forward)(teacher_params, batch["tokens_BT"], **packed)
    logp_BTV = np.array(jax.nn.log_softmax(logits_BTV / MIXED.temperature))
    order_BTV = np.argsort(-logp_BTV, axis=-1)
    stored = batch | {
        "teacher_ids_BTK": order_BTV[..., :-1],
        "teacher_logp_BTJ": np.take_along_axis(logp_BTV, order_BTV, axis=-1),
    }
    both = jax.jit(jax.value_and_grad(stored_distillation(model, MIXED), has_aux=True))
    (loss, metrics), gradient = both(params, stored)
    expected_loss, (expected, _) = with_gradients(model, teacher, MIXED)(params, teacher_params, batch)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5 * np.abs(y).max()), gradient, expected)
    assert set(metrics) == {"nll", "jsd"}


def test_a_teacher_cut_to_its_likeliest_tokens_teaches_online_what_a_sort_of_its_logits_would(
    tiny, built, packed_batch
):
    """And dropout and noise are the student's alone, and the teacher gets no gradient."""
    model, params, teacher, teacher_params = student_and_teacher(tiny, built)
    dropping = built(tiny(**WIDER, dropout=0.5))[0]
    batch = micro_batch(packed_batch) | {"dropout_key": jax.random.key(0), "noise_key": jax.random.key(1)}
    config = ObjectiveConfig(1e-3, neftune_alpha=5.0, beta=0.3, temperature=1.5, top_k=3)
    packed = dict(positions_BT=batch["positions_BT"], segments_BT=batch["segments_BT"])
    logits_BTV = np.float64(jax.jit(teacher.forward)(teacher_params, batch["tokens_BT"], **packed)) / 1.5
    order_BTV = np.argsort(-logits_BTV, axis=-1)
    p_BTV = np.take_along_axis(np.exp(logits_BTV), order_BTV, axis=-1)
    p_BTV /= p_BTV.sum(axis=-1, keepdims=True)
    p_BTJ = np.concatenate([p_BTV[..., :3], p_BTV[..., 3:].sum(axis=-1, keepdims=True)], axis=-1)
    stored = batch | {"teacher_ids_BTK": order_BTV[..., :3], "teacher_logp_BTJ": np.float32(np.log(p_BTJ))}
    (expected_loss, metrics), expected = jax.jit(jax.value_and_grad(stored_distillation(model, config), has_aux=True))(
        params, stored
    )
    loss, gradients = with_gradients(model, dropping, config)(params, teacher_params, batch)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), gradients[0], expected)
    assert not any(np.any(x) for x in jax.tree.leaves(gradients[1]))
    assert metrics["jsd"].count == metrics["nll"].count == batch["mask_BT"].sum()


def test_what_is_stored_at_masked_positions_changes_nothing(tiny, built, packed_batch):
    model, params = built(tiny())
    batch, both = (
        micro_batch(packed_batch),
        jax.jit(jax.value_and_grad(stored_distillation(model, MIXED), has_aux=True)),
    )
    draw = np.random.default_rng(0)
    shape, outside = batch["mask_BT"].shape, ~batch["mask_BT"][..., None]
    ids_BTK = np.argsort(draw.random((*shape, 40)))[..., :3]
    logp_BTJ = np.float32(np.log(draw.dirichlet(np.ones(4), shape)))
    other = {"teacher_ids_BTK": ids_BTK, "teacher_logp_BTJ": logp_BTJ}
    padded = {name: np.where(outside, 0, array).astype(array.dtype) for name, array in other.items()}
    with jax.debug_nans(True):
        found, expected = (both(params, batch | stored) for stored in (padded, other))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("top_k", [0, 40])
def test_likeliest_tokens_that_are_none_or_leave_none_are_refused(tiny, built, top_k):
    teacher = built(tiny())[0]
    with pytest.raises(ValueError, match=rf"objective\.top_k={top_k} must be at least 1 and less than .* of 40 ids"):
        likeliest(teacher, ObjectiveConfig(0.0, top_k=top_k))
    if top_k:
        with pytest.raises(ValueError, match="top_k=40 must be"):
            distillation(teacher, teacher, ObjectiveConfig(0.0, top_k=top_k))


@pytest.mark.parametrize("top_k", [0, 3])
def test_a_mesh_changes_neither_loss_nor_gradient(tiny, built, packed_batch, mesh, top_k):
    """A wider teacher, both vocabularies sharded, and noise, which is the same wherever it is drawn."""
    (model, params), (teacher, teacher_params) = (built(tiny(head_width=8, **x)) for x in ({}, dict(width=24)))
    batch = {name: x[0] for name, x in packed_batch(1, 8, 8).items()}
    config = ObjectiveConfig(0.0, beta=0.4, neftune_alpha=5.0, top_k=top_k)

    def loss(params, teacher_params, batch):
        batch |= {"noise_key": jax.random.key(0)}
        return distillation(model, teacher, config)(params, batch, teacher_params=teacher_params)[0]

    both = jax.value_and_grad(loss)
    with jax.set_mesh(jax.make_mesh((), ())):
        expected = jax.jit(lambda *x: both(*x))(*jax.tree.map(jnp.asarray, (params, teacher_params, batch)))
    place = lambda model, params: jax.tree.map(  # noqa: E731
        jax.device_put, params, sharding.parameter_shardings(parameter_rules(model.config), params, mesh)
    )
    rows = jax.NamedSharding(mesh, jax.P(("replica", "fsdp")))
    placed = place(model, params), place(teacher, teacher_params), jax.device_put(batch, rows)
    found = jax.jit(both)(*placed)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5 * np.abs(y).max()), found[1], expected[1])


def test_a_teacher_with_another_vocabulary_is_refused(tiny, built):
    model, teacher = built(tiny())[0], built(tiny(vocab_size=44))[0]
    with pytest.raises(
        ValueError, match="the student has a vocabulary of 40 ids, its teacher one of 44.*distill_data.py"
    ):
        distillation(model, teacher, ObjectiveConfig(0.0))


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(neftune_alpha=-1.0), r"objective\.neftune_alpha=-1\.0 must not be negative"),
        (dict(neftune_alpha=float("nan")), r"objective\.neftune_alpha=nan must not be negative"),
        (dict(beta=1.5), r"objective\.beta=1\.5 must be in \[0, 1\]: 0 is forward KL, 1 reverse"),
        (dict(hard_weight=-0.1), r"objective\.hard_weight=-0\.1 must be in \[0, 1\]: 0 is the teacher alone"),
        (dict(top_k=-1), r"objective\.top_k=-1 must not be negative"),
        (dict(store_teacher=True), r"objective\.store_teacher=True stores .*top_k=0 tokens .*set top_k to 1 or more"),
        (dict(store_teacher=True, top_k=2, student_fraction=0.1), r"and student_fraction=0\.1 to 0"),
        (dict(temperature=0.0), r"objective\.temperature=0\.0 must be positive and finite"),
        (dict(temperature=float("inf")), r"objective\.temperature=inf must be positive and finite"),
    ],
)
def test_coefficients_outside_of_their_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(0.0, **values)
