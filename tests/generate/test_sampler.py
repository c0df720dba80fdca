"""The sampler against known distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.generate import SamplerConfig, likely, sample

KEY = jax.random.key(7)


def kept(probabilities, **filters):
    """Which tokens the filters leave."""
    weights_BV = jnp.array([probabilities]) / max(probabilities)
    return np.flatnonzero(likely(weights_BV, SamplerConfig(**filters))[0]).tolist()


@pytest.mark.parametrize(
    ("probabilities", "filters", "expected"),
    [
        ([0.5, 0.35, 0.1, 0.05], dict(top_p=0.9), [0, 1, 2]),
        ([0.4, 0.3, 0.2, 0.1], dict(top_p=0.8), [0, 1, 2]),
        ([0.4, 0.3, 0.2, 0.1], dict(top_p=0.65), [0, 1]),
        ([0.1, 0.2, 0.3, 0.4], dict(top_p=0.8), [1, 2, 3]),
        ([0.4, 0.3, 0.2, 0.1], dict(top_p=1e-6), [0]),
        ([0.4, 0.3, 0.2, 0.1], dict(top_k=1, top_p=0.8), [0]),
        ([0.4, 0.3, 0.2, 0.1], dict(top_k=2), [0, 1]),
        ([0.1, 0.4, 0.2, 0.3], dict(top_k=3), [1, 2, 3]),
        ([0.4, 0.3, 0.2, 0.1], dict(top_k=9), [0, 1, 2, 3]),
        # Of the two that top_k leaves, 4/7 and 3/7, the first alone is at least 0.55.
        ([0.4, 0.3, 0.2, 0.1], dict(top_k=2, top_p=0.55), [0]),
        ([0.4, 0.3, 0.2, 0.1], dict(min_p=0.6), [0, 1]),
        ([0.4, 0.3, 0.2, 0.1], dict(min_p=1.0), [0]),
        ([0.4, 0.2, 0.2, 0.2], dict(top_k=2), [0, 1, 2, 3]),
        ([0.4, 0.3, 0.2, 0.1], dict(), [0, 1, 2, 3]),
    ],
)
def test_filters_keep_exactly_these_tokens(probabilities, filters, expected):
    assert kept(probabilities, **filters) == expected


def test_filters_agree_with_sorting_on_random_rows():
    logits_BV = np.random.default_rng(0).normal(size=(50, 301)) * 3
    weights_BV = np.exp(logits_BV - logits_BV.max(1, keepdims=True)).astype(np.float32)
    ours_BV = np.asarray(likely(jnp.asarray(weights_BV), SamplerConfig(top_k=40, top_p=0.7, min_p=0.01)))
    for weights_V, ours_V in zip(weights_BV, ours_BV, strict=True):
        order = np.argsort(-weights_V)[:40]
        before = np.cumsum(weights_V[order]) - weights_V[order]
        nucleus = order[before < 0.7 * weights_V[order].sum()]
        expected = sorted(token for token in nucleus if weights_V[token] >= 0.01)
        assert np.flatnonzero(ours_V).tolist() == expected


def drawn(logits_V, count, sampler):
    logits_BV = jnp.broadcast_to(logits_V, (1000, len(logits_V)))
    one = jax.jit(lambda position_B: sample(logits_BV, jnp.arange(1000), position_B, KEY, sampler=sampler))
    return np.concatenate([one(jnp.full(1000, position))[0] for position in range(count // 1000)])


def test_draws_follow_the_filtered_and_tempered_probabilities():
    logits_V = jnp.array([2.0, 1.0, 0.5, 0.0, -1.0, -3.0, 1.5])
    frequencies = np.bincount(drawn(logits_V, 100_000, SamplerConfig(temperature=0.7, top_k=4)), minlength=7) / 1e5
    expected = np.exp(np.array([2.0, 1.0, 0.5, -np.inf, -np.inf, -np.inf, 1.5]) / 0.7)
    expected /= expected.sum()
    assert frequencies[[3, 4, 5]].tolist() == [0, 0, 0]
    # 100,000 draws have a standard error of at most 0.0016.
    np.testing.assert_allclose(frequencies, expected, atol=0.006)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("V", "count", "furthest"),
    [(1000, 40_000, 0.08), pytest.param(5000, 400_000, 0.05, marks=pytest.mark.thorough)],
)
def test_draws_of_a_bfloat16_model_follow_its_float32_logits(tiny, built, V, count, furthest):
    """What chance alone leaves between draws and probabilities falls with the root of how many there are of each."""
    model, params = built(tiny(vocab_size=V, activation_dtype="bfloat16", operand_dtype="bfloat16"))
    logits_BV = jax.jit(model.extend)(params, model.cache(1, 4), np.array([[5, 6, 7, 8]]), jnp.array([4]))[0]
    assert logits_BV.dtype == jnp.float32
    logits_V = 10 + logits_BV[0] / jnp.std(logits_BV)

    def distance(tokens):
        """Total variation between the draws and the exact probabilities."""
        return 0.5 * np.abs(np.bincount(tokens, minlength=V) / len(tokens) - jax.nn.softmax(logits_V)).sum()

    assert distance(drawn(logits_V, count, SamplerConfig())) <= furthest
    narrow = jax.random.categorical(KEY, logits_V.astype(jnp.bfloat16), shape=(count // 4,))
    assert distance(np.asarray(narrow)) > 0.3


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", -1.0, "temperature=-1.0 must be at least 1e-06 and finite, or 0 to be greedy"),
        ("temperature", 1e-38, "temperature=1e-38 must be at least 1e-06"),
        ("temperature", float("nan"), "temperature=nan must be at least 1e-06"),
        ("top_k", -1, "top_k=-1 must be at least 0"),
        ("top_p", 0.0, r"top_p=0.0 must be in \(0, 1\]"),
        ("top_p", 1.5, "top_p=1.5"),
        ("min_p", -0.1, r"min_p=-0.1 must be in \[0, 1\]"),
    ],
)
def test_a_sampler_out_of_range_raises(field, value, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**{field: value})
