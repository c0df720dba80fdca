import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.evaluate import answers
from jaxllm.evaluate.continuations import continuations
from jaxllm.generate import Completion, SamplerConfig
from jaxllm.text.special_tokens import BOS_ID, EOS_ID
from jaxllm.text.tokenizer import byte_tokenizer

GREEDY = SamplerConfig(temperature=0.0)
PROMPTS = ["a", "", "longer é prompt", "b"]


@pytest.fixture(scope="module")
def loud(tiny, built):
    """A byte model with scaled logits, so that no two are close and greedy means the same however it is worked out."""
    model, params = built(tiny(vocab_size=288))
    return model, jax.tree.map(lambda x: 3 * jnp.asarray(x), params)


def likeliest(model, params, tokens):
    """The likeliest token after these, by a forward pass over all of them."""
    padded = np.zeros((1, 24), np.int32)
    padded[0, : len(tokens)] = tokens
    logits_BTV = jax.jit(model.forward)(params, padded)
    return int(np.argmax(logits_BTV[0, len(tokens) - 1]))


def one_by_one(model, params, prompt, count):
    tokenizer, tokens = byte_tokenizer(), [BOS_ID, *byte_tokenizer().encode(prompt)]
    start = len(tokens)
    for _ in range(count):
        tokens.append(likeliest(model, params, tokens))
        if tokens[-1] == EOS_ID:
            return tokenizer.decode(tokens[start:-1])
    return tokenizer.decode(tokens[start:])


def test_greedy_continuations_of_any_length_are_those_of_whole_forward_passes(loud):
    model, params = loud
    texts = continuations(model, params, byte_tokenizer(), PROMPTS, jax.random.key(0), max_new_tokens=5, sampler=GREEDY)
    assert texts == [one_by_one(model, params, prompt, 5) for prompt in PROMPTS]
    assert len(set(texts)) > 1


def test_a_continuation_does_not_depend_on_its_neighbours(loud):
    model, params = loud
    ask = lambda prompts: continuations(  # noqa: E731
        model, params, byte_tokenizer(), prompts, jax.random.key(0), max_new_tokens=4, sampler=GREEDY
    )
    assert [ask([prompt])[0] for prompt in PROMPTS] == ask(PROMPTS)


@pytest.mark.parametrize("stop", byte_tokenizer().stop_ids)
def test_a_text_ends_before_the_end_of_the_document_or_the_turn_and_never_shows_it(loud, stop):
    """The head of the stop token is that of the first greedy token, a little longer."""
    model, params = loud
    first = likeliest(model, params, [BOS_ID, *byte_tokenizer().encode("a")])
    table_VD = params["embedding"]["table"]
    ending = params | {"embedding": {"table": table_VD.at[stop].set(1.01 * table_VD[first])}}
    texts = continuations(model, ending, byte_tokenizer(), ["a"], jax.random.key(0), max_new_tokens=4, sampler=GREEDY)
    assert texts == [""]


def test_a_prompt_is_read_as_the_caller_says(loud):
    model, params = loud
    how = dict(max_new_tokens=5, sampler=GREEDY)
    read = lambda prompt: [BOS_ID, *byte_tokenizer().encode(prompt + "!")]  # noqa: E731
    found = continuations(model, params, byte_tokenizer(), PROMPTS, jax.random.key(0), **how, read=read)
    assert found == [one_by_one(model, params, prompt + "!", 5) for prompt in PROMPTS]


def test_the_key_decides_what_is_sampled(loud):
    model, params = loud
    soft = jax.tree.map(lambda x: x / 3, params)
    ask = lambda seed: continuations(  # noqa: E731
        model, soft, byte_tokenizer(), PROMPTS, jax.random.key(seed), max_new_tokens=8, sampler=SamplerConfig()
    )
    assert ask(0) == ask(0) != ask(1)


def test_every_token_asked_for_is_decoded_together(loud):
    """Bytes of one character come as several tokens: joined they are that character, alone they would be U+FFFD."""
    model, params = loud
    tokens_BT = np.array([byte_tokenizer().encode("é☃")])

    done = Completion(0, tokens_BT[0], np.zeros(tokens_BT.shape[1]), False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "completions", lambda *_, **__: [done])
        texts = continuations(
            model, params, byte_tokenizer(), ["x"], jax.random.key(0), max_new_tokens=5, sampler=GREEDY
        )
    assert texts == ["é☃"]
