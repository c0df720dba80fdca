import functools
import inspect
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import architectures
from jaxllm import sharding, tree
from jaxllm.configure import section
from jaxllm.losses import token_logprobs
from jaxllm.model import DecoderConfig, build, parameter_rules, policy
from jaxllm.model.config import ATTENTIONS

VARIANTS = {
    "llama": {},
    "qwen 2": dict(qkv_bias=True, tied_head=False, rope=dict(theta=1000.0)),
    "qwen 3": dict(qk_norm="head"),
    "mistral": dict(layer_pattern=("local",), sliding_window=3, num_layers=1),
    "gemma 2": dict(
        activation="gelu_tanh", norm_offset=1.0, post_norm=True, embedding_scale=4.0, attention_soft_cap=2.0,
        logit_soft_cap=1.5, attention_scale=0.3, layer_pattern=("local", "global"), sliding_window=2,
    ),
    "gemma 3": dict(
        qk_norm="head", layer_pattern=("local", "local", "global"), sliding_window=2, num_layers=4, norm_offset=1.0,
        rope=dict(theta=1000.0, local_theta=10.0, scaling="linear", factor=4.0),
    ),
    "olmo 2": dict(pre_norm=False, post_norm=True, qk_norm="all", num_kv_heads=4, tied_head=False),
    "every bias": dict(output_bias=True, mlp_bias=True, qkv_bias=True, activation="gelu", num_layers=1),
    "no positions": dict(layer_pattern=("nope", "global"), norm_eps=0.1),
    "a window without positions": dict(layer_pattern=("local_nope", "local"), sliding_window=2),
}  # fmt: skip
B, T = 2, 7
TOKENS_BT = np.random.default_rng(0).integers(0, 40, (B, T))
POSITIONS_BT = np.array([[0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 3, 4, 5, 0]])
SEGMENTS_BT = np.array([[1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 1, 0]])
PACKED = dict(positions_BT=POSITIONS_BT, segments_BT=SEGMENTS_BT)


# ---- the oracle: the whole decoder in float64, one position, head and key at a time ----


def oracle(c, params, tokens_BT, positions_BT, segments_BT):
    """logits_BTV."""
    params = jax.tree.map(np.float64, params)
    head_VD = params["embedding"]["table"] if c.tied_head else params["head"]["kernel"].T
    logits = np.zeros((*tokens_BT.shape, c.vocab_size))
    for b, tokens in enumerate(tokens_BT):
        x = [c.embedding_scale * params["embedding"]["table"][token] for token in tokens]
        for layer in range(c.num_layers):
            block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["blocks"])
            kind = c.layer_pattern[layer % len(c.layer_pattern)]
            x = oracle_block(c, block, kind, x, positions_BT[b], segments_BT[b])
        for t, x_D in enumerate(x):
            logits[b, t] = head_VD @ norm(c, params["final_norm"], x_D)
    return c.logit_soft_cap * np.tanh(logits / c.logit_soft_cap) if c.logit_soft_cap else logits


def oracle_block(c, block, kind, x, positions, segments):
    before = lambda name, x_D: norm(c, block[name], x_D) if c.pre_norm else x_D  # noqa: E731
    after = lambda name, x_D: norm(c, block[name], x_D) if c.post_norm else x_D  # noqa: E731
    mixed = oracle_attention(
        c, block["attention"], kind, [before("attention_pre_norm", x_D) for x_D in x], positions, segments
    )
    x = [x_D + after("attention_post_norm", y_D) for x_D, y_D in zip(x, mixed, strict=True)]
    return [x_D + after("mlp_post_norm", oracle_mlp(c, block["mlp"], before("mlp_pre_norm", x_D))) for x_D in x]


def oracle_attention(c, params, kind, x, positions, segments):
    keys, values, out = [], [], []
    for t, x_D in enumerate(x):
        keys.append(rotated(c, kind, positions[t], qk_norm(c, params, "key", project(params["key"], x_D))))
        values.append(project(params["value"], x_D))
        q_NH = rotated(c, kind, positions[t], qk_norm(c, params, "query", project(params["query"], x_D)))
        heads = np.zeros((c.num_heads, c.head_width))
        for n in range(c.num_heads):
            weights, k = {}, n // (c.num_heads // c.num_kv_heads)
            for s in range(t + 1):
                windowed = kind in ("local", "local_nope")
                if segments[s] != segments[t] or (windowed and positions[t] - positions[s] >= c.sliding_window):
                    continue
                score = (c.attention_scale or 1 / math.sqrt(c.head_width)) * q_NH[n] @ keys[s][k]
                weights[s] = math.exp(
                    c.attention_soft_cap * math.tanh(score / c.attention_soft_cap) if c.attention_soft_cap else score
                )
            heads[n] = sum(weight * values[s][k] for s, weight in weights.items()) / sum(weights.values())
        out.append(
            sum(heads[n] @ params["output"]["kernel"][n] for n in range(c.num_heads)) + params["output"].get("bias", 0)
        )
    return out


def oracle_mlp(c, params, x_D):
    x = project(params["gate"], x_D)
    gelu = np.vectorize(lambda x: x / 2 * (1 + math.erf(x / math.sqrt(2))))
    gate = {
        "silu": lambda: x / (1 + np.exp(-x)),
        "gelu": lambda: gelu(x),
        "gelu_tanh": lambda: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    }[c.activation]()
    return (gate * project(params["up"], x_D)) @ params["down"]["kernel"] + params["down"].get("bias", 0)


def project(params, x_D):
    return np.tensordot(x_D, params["kernel"], axes=1) + params.get("bias", 0)


def norm(c, params, x):
    return x / math.sqrt(np.mean(x**2) + c.norm_eps) * (c.norm_offset + params["scale"])


def qk_norm(c, params, which, x_NH):
    if c.qk_norm == "none":
        return x_NH
    if c.qk_norm == "all":
        return norm(c, params[f"{which}_norm"], x_NH)
    return np.stack([norm(c, params[f"{which}_norm"], x_H) for x_H in x_NH])


def rotated(c, kind, position, x_NH):
    if kind in ("nope", "local_nope"):
        return x_NH
    own = kind == "local" and c.rope.local_theta
    theta, stretch = (c.rope.local_theta, 1.0) if own else (c.rope.theta, c.rope.factor)
    out, half = np.zeros_like(x_NH), c.head_width // 2
    for n, i in np.ndindex(len(x_NH), half):
        angle = position / stretch * theta ** (-2 * i / c.head_width)
        out[n, i] = x_NH[n, i] * math.cos(angle) - x_NH[n, i + half] * math.sin(angle)
        out[n, i + half] = x_NH[n, i] * math.sin(angle) + x_NH[n, i + half] * math.cos(angle)
    return out


@functools.cache
def compiled(config):
    return jax.jit(build(config).forward)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_match_a_decoder_written_in_loops(tiny, built, variant):
    config = tiny(**VARIANTS[variant])
    _, params = built(config)
    found = compiled(config)(params, TOKENS_BT, **PACKED)
    expected = oracle(config, params, TOKENS_BT, POSITIONS_BT, SEGMENTS_BT)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


# ---- what may see what ----


def token_gradients(model, params):
    """[T, T]: how much each logit row depends on each token, where every token has a row of the table of its own."""
    tokens_BT = jnp.arange(T)[None, :]

    def rows(table_VD):
        changed = params | {"embedding": {"table": table_VD}}
        logits_BTV = model.forward(changed, tokens_BT)
        return jnp.sum(logits_BTV * jnp.cos(jnp.arange(logits_BTV.shape[-1]))[None, None, :], axis=(0, 2))

    return np.abs(np.asarray(jax.jit(jax.jacrev(rows))(params["embedding"]["table"])))[:, :T].sum(axis=2)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_no_logit_depends_on_a_later_token_and_all_on_every_earlier_one(tiny, built, attention):
    model, params = built(tiny(tied_head=False, attention=attention))
    depends = token_gradients(model, params)
    assert np.all(depends[np.triu_indices(T, 1)] == 0)
    assert np.all(depends[np.tril_indices(T)] > 1e-6)


@pytest.mark.parametrize("window", [1, 3])
def test_a_local_layer_sees_its_window_and_no_further(tiny, built, window):
    config = tiny(tied_head=False, num_layers=1, layer_pattern=("local",), sliding_window=window)
    depends = token_gradients(*built(config))
    reach = np.arange(T)[:, None] - np.arange(T)[None, :]
    assert np.all(depends[(reach < 0) | (reach >= window)] == 0)
    assert np.all(depends[(reach >= 0) & (reach < window)] > 1e-6)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("pattern", [("global",), ("local", "nope")])
def test_packed_documents_are_as_if_alone_and_never_see_each_other(tiny, built, attention, pattern):
    config = tiny(attention=attention, layer_pattern=pattern, sliding_window=3)
    _, params = built(config)
    packed = np.asarray(
        compiled(config)(params, TOKENS_BT[:1], positions_BT=POSITIONS_BT[:1], segments_BT=SEGMENTS_BT[:1])
    )
    for document in (slice(0, 4), slice(4, 7)):
        alone = compiled(config)(params, TOKENS_BT[:1, document])
        np.testing.assert_allclose(packed[:, document], alone, atol=1e-5)
    other = TOKENS_BT[:1].copy()
    other[:, :4] = (other[:, :4] + 7) % 40
    changed = np.asarray(compiled(config)(params, other, positions_BT=POSITIONS_BT[:1], segments_BT=SEGMENTS_BT[:1]))
    np.testing.assert_array_equal(changed[:, 4:], packed[:, 4:])
    assert np.all(np.abs(changed[:, :4] - packed[:, :4]).max(axis=2) > 1e-3)


# ---- a prompt that is read once ----

PROMPT, ANSWERS, NEIGHBOUR = [5, 17, 8, 30], [[3, 21], [12]], [9, 4, 33]
SHARED = [  # tokens, position of the first, segment, parent: an answer begins with the last token of its prompt
    (PROMPT[:-1], 0, -1, -1), (PROMPT[-1:] + ANSWERS[0], 3, 1, -1), (PROMPT[-1:] + ANSWERS[1], 3, 2, -1),
    (NEIGHBOUR, 0, 3, 3), ([0], 0, 0, 0),
]  # fmt: skip
PLACES = {"first": slice(3, 6), "second": slice(6, 8), "neighbour": slice(8, 11)}


def shared_row(pieces=SHARED):
    """(tokens_BT, what else the model is told), of rows that are this one."""
    columns = [[] for _ in range(4)]
    for tokens, first, segment, parent in pieces:
        n = len(tokens)
        numbers = tokens, range(first, first + n), [segment] * n, [parent] * n
        for column, each in zip(columns, numbers, strict=True):
            column.extend(each)
    tokens_BT, *told = (np.tile(np.array(column, np.int32), (4, 1)) for column in columns)
    return tokens_BT, dict(zip(("positions_BT", "segments_BT", "parents_BT"), told, strict=True))


def apart_rows():
    """The two answers each behind its whole prompt, in the places that they have in the shared row."""
    ids_BT = np.zeros((4, 11), np.int32)
    for row, answer in zip(ids_BT, ANSWERS * 2, strict=True):
        row[: len(PROMPT + answer)] = PROMPT + answer
    return ids_BT


def scored(config, params, tokens_BT, places_BT, **told):
    """((a sum of the logits at some places, logits_BTV), gradient)."""
    cosines_V = jnp.cos(jnp.arange(config.vocab_size, dtype=jnp.float32))

    def score(params):
        logits_BTV = build(config).forward(params, tokens_BT, **told)
        return jnp.sum(jnp.where(places_BT[:, :, None], logits_BTV, 0.0) * cosines_V[None, None]), logits_BTV

    return jax.value_and_grad(score, has_aux=True)(params)


@functools.cache
def shared_scores(config, built):
    """``scored`` of the answers in the shared row, of which there are four."""
    tokens_BT, told = shared_row()
    places_BT = np.isin(told["segments_BT"], (1, 2))
    return jax.jit(functools.partial(scored, config))(built(config)[1], tokens_BT, places_BT, **told)


def same_gradients(found, expected):
    largest = max(np.abs(x).max() for x in jax.tree.leaves(expected))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5 * largest), found, expected)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_prompt_read_once_is_a_prompt_read_before_each_answer(tiny, built, attention):
    config = tiny(attention=attention, layer_pattern=("local", "global"), sliding_window=3)
    (_, logits_BTV), gradient = shared_scores(config, built)
    places_BT = (np.arange(11) >= 3) & (np.arange(11) < 3 + np.array([[3], [2]] * 2))
    both = jax.jit(functools.partial(scored, config))
    (_, alone_BTV), alone_gradient = both(built(config)[1], apart_rows(), places_BT)
    np.testing.assert_allclose(logits_BTV[0, PLACES["first"]], alone_BTV[0, 3:6], atol=1e-5)
    np.testing.assert_allclose(logits_BTV[0, PLACES["second"]], alone_BTV[1, 3:5], atol=1e-5)
    # Four rows hold both answers, or two rows each of them.
    same_gradients(gradient, jax.tree.map(lambda x: 2 * x, alone_gradient))


def test_a_mesh_shares_prompts_too(tiny, built, mesh):
    config = tiny(layer_pattern=("local", "global"), sliding_window=3)
    params = built(config)[1]
    tokens_BT, told = shared_row()
    where = sharding.parameter_shardings(parameter_rules(config), params, mesh)
    given = sharding.global_batch({name: x[None] for name, x in (told | {"tokens_BT": tokens_BT}).items()}, mesh)
    given = {name: x[0] for name, x in given.items()}
    given["places_BT"] = np.isin(told["segments_BT"], (1, 2))
    found = jax.jit(functools.partial(scored, config))(jax.device_put(params, where), **given)
    (value, logits_BTV), gradient = shared_scores(config, built)
    np.testing.assert_allclose(found[0][0], value, rtol=1e-5)
    np.testing.assert_allclose(found[0][1], logits_BTV, atol=1e-5)
    same_gradients(found[1], gradient)


def test_only_its_own_answers_see_a_shared_prompt(tiny, built):
    config = tiny()
    _, params = built(config)

    def logits(piece=None, token=None):
        pieces = [(tokens if i != piece else [token] * len(tokens), *rest) for i, (tokens, *rest) in enumerate(SHARED)]
        tokens_BT, told = shared_row(pieces)
        return np.asarray(compiled(config)(params, tokens_BT, **told))[0]

    before = logits()
    for piece, sees in ((0, {"first", "second"}), (1, {"first"}), (2, {"second"}), (3, {"neighbour"}), (4, set())):
        change = np.abs(logits(piece, 7) - before)
        for name, place in PLACES.items():
            assert (change[place].max() > 1e-3) if name in sees else not change[place].any(), (piece, name)
        assert piece == 0 or not change[:3].any()


def test_a_segment_that_is_its_own_parent_has_none(tiny, built):
    config = tiny(layer_pattern=("local", "nope"), sliding_window=3)
    _, params = built(config)
    own = compiled(config)(params, TOKENS_BT, **PACKED, parents_BT=SEGMENTS_BT)
    np.testing.assert_allclose(own, compiled(config)(params, TOKENS_BT, **PACKED), atol=1e-6)


def test_parents_without_segments_are_refused(tiny, built):
    model, params = built(tiny())
    with pytest.raises(ValueError, match="parents_BT name segments, and segments_BT is not given"):
        model.hidden(params, TOKENS_BT, parents_BT=SEGMENTS_BT)


def test_positions_are_counted_from_zero_unless_told(tiny, built):
    config = tiny()
    _, params = built(config)
    told = compiled(config)(params, TOKENS_BT, positions_BT=np.tile(np.arange(T), (B, 1)))
    np.testing.assert_array_equal(compiled(config)(params, TOKENS_BT), told)


def test_a_row_may_be_a_single_token(tiny, built):
    config = tiny()
    _, params = built(config)
    np.testing.assert_allclose(
        compiled(config)(params, TOKENS_BT[:, :1]), compiled(config)(params, TOKENS_BT)[:, :1], atol=1e-5
    )


# ---- dropout ----


def test_dropout_is_off_without_a_key_and_keyed_with_one(tiny, built):
    plain, dropping = tiny(), tiny(dropout=0.5)
    _, params = built(plain)
    forward = compiled(dropping)
    np.testing.assert_array_equal(forward(params, TOKENS_BT), compiled(plain)(params, TOKENS_BT))
    one, same, other = (forward(params, TOKENS_BT, dropout_key=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-3 and np.abs(one - forward(params, TOKENS_BT)).max() > 1e-3


def test_each_layer_and_each_branch_drops_other_elements(tiny):
    config = tiny(dropout=0.5, width=256, output_bias=True, mlp_bias=True, tied_head=False)
    model = build(config)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), jax.eval_shape(model.init, jax.random.key(0)))
    params["final_norm"]["scale"] += 1.0
    # Nothing but the biases reaches the stream: attention adds 0 or 2, the mlp 0 or 20, in each of two layers.
    params["blocks"]["attention"]["output"]["bias"] += 1.0
    params["blocks"]["mlp"]["down"]["bias"] += 10.0
    hidden = np.asarray(jax.jit(model.hidden)(params, TOKENS_BT, dropout_key=jax.random.key(0)))
    for row in hidden.reshape(-1, 256):
        levels = np.unique(np.round(row / row[row > 0].min(), 2))
        np.testing.assert_allclose(levels, [0, 1, 2, 10, 11, 12, 20, 21, 22], atol=0.02)
    assert len(np.unique(hidden[:, :, 0])) > 2


# ---- the same numbers by other programs ----


def loss(config, params, **options):
    model = build(config)
    hidden_BTD = model.hidden(params, jnp.asarray(TOKENS_BT), **PACKED, **options)
    return -jnp.mean(model.score(params, hidden_BTD, jnp.roll(TOKENS_BT, -1, axis=1))[0])


@functools.cache
def loss_and_gradient(config, built):
    _, params = built(config)
    return jax.jit(jax.value_and_grad(functools.partial(loss, config, dropout_key=jax.random.key(1))))(params)


@pytest.mark.parametrize(
    "changes",
    [
        dict(remat="full"),
        dict(remat="projections"),
        dict(unroll=2),
        dict(unroll=0),
        dict(attention="dot_product"),
    ],
    ids=str,
)
def test_how_a_program_runs_changes_neither_loss_nor_gradient(tiny, built, changes):
    base = tiny(num_layers=3, dropout=0.3)
    value, gradient = loss_and_gradient(base, built)
    other, other_gradient = loss_and_gradient(tiny(num_layers=3, dropout=0.3, **changes), built)
    np.testing.assert_allclose(other, value, atol=1e-6)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(gradient))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5 * largest), other_gradient, gradient)


def test_remat_of_scanned_layers_needs_less_than_a_third_of_the_temporary_memory(tiny):
    def temporary_bytes(remat):
        model = build(tiny(num_layers=8, width=32, mlp_width=128, unroll=1, remat=remat))
        gradient = jax.jit(jax.grad(lambda params, tokens_BT: jnp.sum(jnp.square(model.hidden(params, tokens_BT)))))
        shapes = jax.eval_shape(model.init, jax.random.key(0)), jax.ShapeDtypeStruct((4, 128), jnp.int32)
        return gradient.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    full, projections, none = map(temporary_bytes, ("full", "projections", "none"))
    assert full < none / 3 and full < projections < none / 2


@pytest.mark.parametrize("narrow", [dict(activation_dtype="bfloat16"), dict(operand_dtype="bfloat16")], ids=str)
def test_bfloat16_loses_less_than_a_hundredth_of_a_nat(tiny, built, narrow):
    _, params = built(tiny())
    exact = loss_and_gradient(tiny(), built)[0]
    found, gradient = jax.jit(
        jax.value_and_grad(functools.partial(loss, tiny(**({"operand_dtype": "bfloat16"} | narrow))))
    )(params)
    assert 0 < abs(found - exact) <= 1e-2
    assert {x.dtype for x in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}


def test_the_score_of_hidden_states_is_that_of_the_logits(tiny, built):
    config = tiny(logit_soft_cap=1.5, tied_head=False)
    model, params = built(config)
    logits_BTV = compiled(config)(params, TOKENS_BT)
    hidden_BTD = jax.jit(model.hidden)(params, TOKENS_BT)
    for temperature in (1.0, 0.7):
        score = jax.jit(functools.partial(model.score, temperature=temperature))
        logp_BT, logz_BT, _ = score(params, hidden_BTD, TOKENS_BT)
        np.testing.assert_allclose(logp_BT, token_logprobs(logits_BTV / temperature, TOKENS_BT), atol=1e-5)
        np.testing.assert_allclose(logz_BT, jax.nn.logsumexp(logits_BTV / temperature, axis=-1), atol=1e-5)


# ---- parameters ----

PUBLISHED = {
    "llama3_8b": 8_030_261_248,
    "llama3_2_1b": 1_235_814_400,
    "mistral_7b": 7_241_732_096,
    "qwen2_7b": 7_615_616_512,
    "qwen2_5_0_5b": 494_032_768,
    "qwen3_0_6b": 596_049_920,
    "smollm2_135m": 134_515_008,
    "gemma2_2b": 2_614_341_888,
    "gemma3_1b": 999_885_952,
    "olmo2_1b": 1_484_916_736,
}


def abstract_params(config):
    return jax.eval_shape(build(config).init, jax.random.key(0))


def test_every_architecture_has_a_published_count():
    functions = inspect.getmembers(architectures, inspect.isfunction)
    assert {name for name, _ in functions if not name.startswith("_")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_its_published_number_of_parameters_and_one_rule_for_each(name, make_mesh):
    config = section(DecoderConfig, getattr(architectures, name)())
    params = abstract_params(config)
    assert tree.size(params) == PUBLISHED[name]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    on = make_mesh(2, 4, 1) if config.num_kv_heads % 2 else make_mesh(2, 2, 2)
    placed = sharding.parameter_shardings(parameter_rules(config), params, on)
    parts = on.shape["fsdp"] * on.shape["tensor"]
    whole = [leaf.size for leaf, where in zip(jax.tree.leaves(params), jax.tree.leaves(placed), strict=True)
             if math.prod(where.shard_shape(leaf.shape)) * parts != leaf.size]  # fmt: skip
    assert sum(whole) < 1e-3 * PUBLISHED[name]


def test_every_rule_is_some_parameters_and_every_parameter_has_one(tiny):
    used = set()
    everything = dict(qkv_bias=True, output_bias=True, mlp_bias=True, post_norm=True, tied_head=False)
    everything |= dict(scalar_head=True, critic=True)
    for qk_norm in ("none", "head", "all"):
        config = tiny(qk_norm=qk_norm, **everything)
        rules = parameter_rules(config)
        letters = tree.match(rules, abstract_params(config))
        jax.tree.map(
            lambda leaf, row: len(leaf.shape) == len(row) or pytest.fail(f"{leaf} {row}"),
            abstract_params(config),
            letters,
        )
        used |= {pattern for pattern, _ in rules if any(re.fullmatch(pattern, name) for name in tree.names(letters))}
    assert used == {pattern for pattern, _ in rules}


def test_blocks_are_stacked_and_optional_parts_are_absent(tiny):
    params = abstract_params(tiny(num_layers=5))
    assert {leaf.shape[0] for leaf in jax.tree.leaves(params["blocks"])} == {5}
    assert set(params) == {"embedding", "blocks", "final_norm"}
    assert not any("bias" in name or "post_norm" in name or "query_norm" in name for name in tree.names(params))
    assert type(params) is dict and type(params["blocks"]) is dict


def test_each_kind_of_parameter_starts_with_its_documented_deviation(tiny):
    sizes = dict(vocab_size=512, width=128, mlp_width=256, num_heads=8, num_kv_heads=4, head_width=32, num_layers=3)
    config = tiny(
        **sizes, tied_head=False, qkv_bias=True, mlp_bias=True, output_bias=True, qk_norm="head", post_norm=True
    )
    params = jax.jit(build(config).init)(jax.random.key(0))
    wide, residual = 128**-0.5, 6**-0.5
    expected = {
        "embedding/table": 0.02,
        "head/kernel": wide,
        "blocks/attention/query/kernel": wide,
        "blocks/attention/key/kernel": wide,
        "blocks/attention/value/kernel": wide,
        "blocks/attention/output/kernel": (8 * 32) ** -0.5 * residual,
        "blocks/mlp/gate/kernel": wide,
        "blocks/mlp/up/kernel": wide,
        "blocks/mlp/down/kernel": 256**-0.5 * residual,
    }
    for name, leaf in zip(tree.names(params), jax.tree.leaves(params), strict=True):
        leaf = np.asarray(leaf)
        if name.endswith(("kernel", "table")):
            np.testing.assert_allclose(leaf.std(), expected.pop(name), rtol=0.02)
            assert abs(leaf.mean()) < 0.02 * leaf.std() and np.abs(leaf).max() < 2.3 * leaf.std()
            assert len(np.unique(leaf)) > 0.9 * leaf.size or leaf.size > 2**17, "layers or parts that are copies"
        else:
            np.testing.assert_array_equal(leaf, np.full(leaf.shape, 1.0 if name.endswith("scale") else 0.0))
    assert expected == {}


def test_scales_start_so_that_a_norm_scales_by_one_whatever_its_offset(tiny):
    params = jax.jit(build(tiny(norm_offset=1.0)).init)(jax.random.key(0))
    np.testing.assert_array_equal(params["final_norm"]["scale"], np.zeros(16))


def test_a_seed_decides_all_parameters_and_a_part_more_changes_no_other(tiny):
    tied, own_head = build(tiny()), build(tiny(tied_head=False))
    one, same, other = (jax.jit(tied.init)(jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert np.any(np.asarray(one["embedding"]["table"]) != other["embedding"]["table"])
    more = jax.jit(own_head.init)(jax.random.key(0))
    more.pop("head")
    jax.tree.map(np.testing.assert_array_equal, one, more)


def test_the_model_is_pure_functions_over_a_dict(tiny):
    model = build(tiny())
    assert all(callable(function) for name, function in model._asdict().items() if name != "config")
    assert not isinstance(model.init, types.MethodType)


# ---- every field does something ----

CHANGES = dict(
    vocab_size=42, num_layers=3, width=18, mlp_width=26, num_heads=2, num_kv_heads=1, head_width=8, activation="gelu",
    norm_eps=1e-4, norm_offset=1.0, pre_norm=False, post_norm=False, qk_norm="all", qkv_bias=False, output_bias=True,
    mlp_bias=True,
    tied_head=False, scalar_head=True, critic=True, embedding_scale=2.0, attention_scale=0.5, attention_soft_cap=3.0,
    logit_soft_cap=3.0,
    layer_pattern=("global", "local"), sliding_window=3, dropout=0.2, activation_dtype="bfloat16",
    operand_dtype="bfloat16",
    attention="dot_product", remat="full", unroll=2, loss_chunk=3,
)  # fmt: skip
ROPE_CHANGES = dict(
    theta=11.0, local_theta=7.0, scaling="yarn", factor=3.0, original_length=9, low_frequency=0.5, high_frequency=2.0
)  # fmt: skip
ROPE = dict(theta=10.0, scaling="llama3", factor=2.0, original_length=6, low_frequency=0.1, high_frequency=0.9)
BASE = dict(
    post_norm=True, qkv_bias=True, qk_norm="head", layer_pattern=("local", "global"), sliding_window=2, dropout=0.1
)


def program(config):
    """The text of the program of the loss, and the numbers in it."""
    closed = jax.make_jaxpr(functools.partial(loss, config, dropout_key=jax.random.key(0)))(abstract_params(config))
    return str(closed.jaxpr), [
        np.asarray(x).tobytes() for x in closed.consts if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    ]


def test_every_field_is_tried():
    assert set(CHANGES) == set(DecoderConfig.__dataclass_fields__) - {"rope"}
    assert set(ROPE_CHANGES) == set(DecoderConfig.__dataclass_fields__["rope"].type.__dataclass_fields__)


@pytest.fixture(scope="module")
def base_program(tiny):
    assert program(tiny(**BASE, rope=ROPE)) == program(tiny(**BASE, rope=ROPE))
    return program(tiny(**BASE, rope=ROPE))


@pytest.mark.parametrize("field", CHANGES)
def test_every_field_of_the_model_changes_its_program(tiny, base_program, field):
    needed = {"scalar_head": True} if field == "critic" else {}
    assert program(tiny(**(BASE | needed | {field: CHANGES[field]}), rope=ROPE)) != base_program


@pytest.mark.parametrize("field", ROPE_CHANGES)
def test_every_field_of_rope_changes_the_models_program(tiny, base_program, field):
    assert program(tiny(**BASE, rope=ROPE | {field: ROPE_CHANGES[field]})) != base_program


@pytest.mark.parametrize("critic", [False, True])
def test_a_policy_is_the_language_model_of_one_with_more_heads(tiny, critic):
    model = build(tiny(scalar_head=True, critic=critic))
    params, tokens_BT = model.init(jax.random.key(0)), jnp.arange(6).reshape(2, 3)
    alone, kept = policy(model, params)
    assert alone is build(tiny()) is not model and kept.keys() == alone.init(jax.random.key(0)).keys()
    assert (alone.forward(kept, tokens_BT) == model.forward(params, tokens_BT)).all()
    assert policy(alone, kept) == (alone, kept)
