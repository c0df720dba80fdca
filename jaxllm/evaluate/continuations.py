"""What a model writes after prompts given as text."""

from collections.abc import Callable, Sequence

import jax

from jaxllm.evaluate.answers import answers
from jaxllm.generate import SamplerConfig
from jaxllm.model import Model
from jaxllm.text.tokenizer import Tokenizer
from jaxllm.tree import Tree


def continuations(
    model: Model,
    params: Tree,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    key: jax.Array,
    *,
    max_new_tokens: int,
    sampler: SamplerConfig,
    read: Callable[[str], Sequence[int]] | None = None,
) -> list[str]:
    """The text sampled after each prompt, up to the end of the document or the turn, or ``max_new_tokens``.

    ``read`` makes ids of a prompt; unless told, it is the start of a document.
    """
    read = read or tokenizer.opening
    how = dict(max_new_tokens=max_new_tokens, sampler=sampler, batch_size=len(prompts), stop_ids=tokenizer.stop_ids)
    found = answers(model, params, [read(prompt) for prompt in prompts], key, **how)
    return [tokenizer.decode(token for token in answer.tokens if token not in tokenizer.stop_ids) for answer in found]
