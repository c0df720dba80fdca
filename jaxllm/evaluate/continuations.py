"""What a model writes after prompts given as text."""

from collections.abc import Sequence

import jax
import numpy as np

from jaxllm.generate import SamplerConfig, generate
from jaxllm.model import Model
from jaxllm.text.special_tokens import BOS_ID, EOS_ID, PAD_ID
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
) -> list[str]:
    """The text sampled after each prompt, each read as the start of a document, up to its end or ``max_new_tokens``."""
    rows = [[BOS_ID, *tokenizer.encode(prompt)] for prompt in prompts]
    lengths_B = np.array([len(row) for row in rows])
    prompts_BT = np.full((len(rows), max(lengths_B)), PAD_ID, np.int32)
    for prompt_T, row in zip(prompts_BT, rows, strict=True):
        prompt_T[: len(row)] = row
    done = generate(model, params, prompts_BT, lengths_B, key, max_new_tokens=max_new_tokens, sampler=sampler)
    return [
        tokenizer.decode(tokens_T[mask_T & (tokens_T != EOS_ID)])
        for tokens_T, mask_T in zip(done.tokens_BT, done.mask_BT, strict=True)
    ]
