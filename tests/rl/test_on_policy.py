import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.generate import SamplerConfig
from jaxllm.rl.on_policy import on_policy, rows
from jaxllm.text.special_tokens import PAD_ID

PROMPTS, COMPLETIONS = [[2, 40], [2, 41, 42, 43]], [[50, 51, 8], [52]]
SHAPE = dict(batch_size=4, micro_batches=2, length=12, max_new_tokens=5, stop_ids=(8, 3), seed=7)


def test_a_row_is_a_prompt_and_its_completion_whose_tokens_alone_are_targets():
    batch = rows(PROMPTS, COMPLETIONS, length=6, micro_batches=2)
    assert {name: array.shape for name, array in batch.items()} == dict.fromkeys(batch, (2, 1, 6))
    assert batch["tokens_BT"][0, 0].tolist() == [2, 40, 50, 51, PAD_ID, PAD_ID]
    assert batch["targets_BT"][0, 0].tolist() == [40, 50, 51, 8, PAD_ID, PAD_ID]
    assert batch["positions_BT"][0, 0].tolist() == [0, 1, 2, 3, 0, 0]
    assert batch["segments_BT"][1, 0].tolist() == [1, 1, 1, 1, 0, 0]
    for row, completion in enumerate(COMPLETIONS):
        assert batch["targets_BT"][row, 0][batch["mask_BT"][row, 0]].tolist() == completion


def test_a_sample_longer_than_a_row_is_refused_with_both_lengths():
    with pytest.raises(ValueError, match="a sample has 4 pairs of tokens, a row 3: raise data.sequence_length"):
        rows(PROMPTS, COMPLETIONS, length=3, micro_batches=1)


@pytest.fixture
def policy(tiny, built):
    model, params = built(tiny(vocab_size=64))
    return model, jax.tree.map(lambda x: 3 * jnp.asarray(x), params)


def test_the_steps_on_policy_are_the_fraction_that_was_asked_for_and_repeat(policy):
    model, params = policy
    given = {"tokens_BT": np.zeros((2, 2, 12))}

    def own(fraction, **changes):
        rollout = on_policy(model, PROMPTS, fraction=fraction, sampler=SamplerConfig(), **SHAPE | changes)
        return [rollout(params, given, step)[0] for step in range(12)]

    first, again, other = own(0.5), own(0.5), own(0.5, seed=8)
    sampled = [batch is not given for batch in first]
    assert 2 <= sum(sampled) <= 10 and sampled == [batch is not given for batch in again]
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a["tokens_BT"], b["tokens_BT"])
    assert any(not np.array_equal(a["tokens_BT"], b["tokens_BT"]) for a, b in zip(first, other, strict=True))
    assert all(batch is given for batch in own(0.0)) and all(batch is not given for batch in own(1.0))


def test_what_is_trained_on_are_the_prompts_and_what_the_policy_says_to_them(policy):
    model, params = policy
    greedy = on_policy(model, PROMPTS, fraction=1.0, sampler=SamplerConfig(temperature=0.0), **SHAPE)
    batch, told = greedy(params, {}, 0)
    assert told == {}
    tokens_BT, mask_BT = (batch[name].reshape(4, 12) for name in ("tokens_BT", "mask_BT"))
    logits_BTV = jax.jit(model.forward)(params, tokens_BT)
    likeliest_BT = np.argmax(logits_BTV, axis=-1)
    np.testing.assert_array_equal(batch["targets_BT"].reshape(4, 12)[mask_BT], likeliest_BT[mask_BT])
    assert {tuple(row[: int(np.argmax(mask)) + 1]) for row, mask in zip(tokens_BT, mask_BT, strict=True)} <= set(
        map(tuple, PROMPTS)
    )
    assert mask_BT.sum(axis=1).max() <= 5


def test_prompts_without_room_for_an_answer_are_not_asked_and_none_is_an_error(policy):
    model, params = policy
    asked = on_policy(model, [*PROMPTS, [2] * 8], fraction=1.0, sampler=SamplerConfig(), **SHAPE)
    batch, _ = asked(params, {}, 0)
    assert (batch["tokens_BT"] == 2).sum() == 4
    with pytest.raises(ValueError, match="no prompt leaves room for 5 tokens in a row of 5: lower loop.sample_tokens"):
        on_policy(model, PROMPTS, fraction=1.0, sampler=SamplerConfig(), **SHAPE | {"length": 5})
