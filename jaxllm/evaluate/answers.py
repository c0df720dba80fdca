"""A model's answers to prompts given as ids, and how near they come to references: ROUGE-L, exact match, length."""

import functools
import re
from collections.abc import Collection, Iterator, Sequence
from statistics import fmean
from typing import NamedTuple

import jax
import numpy as np

from jaxllm.generate import Completions, SamplerConfig, generate
from jaxllm.model import Model
from jaxllm.text.special_tokens import END_ID, EOS_ID, PAD_ID
from jaxllm.text.tokenizer import Tokenizer
from jaxllm.tree import Tree

STOP_IDS = (END_ID, EOS_ID)
Prompts = Sequence[Sequence[int]]


class Answer(NamedTuple):
    """tokens: exactly the ids that were sampled. ended: whether by the last of them, and not by their number."""

    tokens: list[int]
    ended: bool


class Row(NamedTuple):
    """A prompt, its reference and its answer as texts, and what their comparison gave."""

    prompt: str
    reference: str
    answer: str
    rouge_l: float
    exact: bool
    tokens: int
    ended: bool


def answers(
    model: Model,
    params: Tree,
    prompts: Prompts,
    key: jax.Array,
    *,
    max_new_tokens: int,
    sampler: SamplerConfig,
    batch_size: int,
) -> list[Answer]:
    """The answer to each prompt, up to the end of the turn or of the document, or ``max_new_tokens``.

    Prompts of similar lengths share a batch, and every batch has one size, so that few programs are compiled. Greedy
    answers do not depend on ``batch_size``, others do. Raises as ``generate`` does.
    """
    how = dict(max_new_tokens=max_new_tokens, sampler=sampler, batch_size=batch_size)
    found = dict(answered(model, params, prompts, key, **how))
    return [found[number] for number in range(len(prompts))]


def answered(
    model: Model,
    params: Tree,
    prompts: Prompts,
    key: jax.Array,
    *,
    max_new_tokens: int,
    sampler: SamplerConfig,
    batch_size: int,
    known: Collection[int] = (),
) -> Iterator[tuple[int, Answer]]:
    """(number of the prompt, its answer) as they come, the longest prompts first, without those that are ``known``.

    What is sampled for a prompt is what ``answers`` samples, whatever is known: an interrupted work continues as if it
    had not been.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    by_length = sorted(range(len(prompts)), key=lambda number: len(prompts[number]), reverse=True)
    for start in range(0, len(prompts), batch_size):
        numbers = by_length[start : start + batch_size]
        if all(number in known for number in numbers):
            continue
        # The last batch is filled up with its last prompt: another size would be compiled for.
        rows = numbers + numbers[-1:] * (min(batch_size, len(prompts)) - len(numbers))
        batch, batch_key = _padded([prompts[number] for number in rows]), jax.random.fold_in(key, start // batch_size)
        how = dict(max_new_tokens=max_new_tokens, sampler=sampler, stop_ids=STOP_IDS)
        sampled = _sampled(generate(model, params, *batch, batch_key, **how))
        yield from ((number, answer) for number, answer in zip(numbers, sampled, strict=False) if number not in known)


def compared(tokenizer: Tokenizer, prompts: Prompts, references: Prompts, found: Sequence[Answer]) -> list[Row]:
    """Each answer beside its prompt and its reference, both ids; a reference is read up to its stop token."""
    rows = []
    for prompt, ids, answer in zip(prompts, references, found, strict=True):
        reference, text = _text(tokenizer, ids), _text(tokenizer, answer.tokens)
        rows.append(
            Row(
                prompt=tokenizer.decode(prompt),
                reference=reference,
                answer=text,
                rouge_l=rouge_l(reference, text),
                exact=reference.strip() == text.strip(),
                tokens=len(answer.tokens),
                ended=answer.ended,
            )
        )
    return rows


def scores(rows: Sequence[Row]) -> dict[str, float]:
    """Means over the rows: ``rouge_l``, ``exact_match`` and ``answers_ended`` in [0, 1], and ``answer_tokens``."""
    if not rows:
        raise ValueError("no answer to score: hold out at least one conversation (data.validation)")
    return {
        "rouge_l": fmean(row.rouge_l for row in rows),
        "exact_match": fmean(row.exact for row in rows),
        "answer_tokens": fmean(row.tokens for row in rows),
        "answers_ended": fmean(row.ended for row in rows),
    }


def rouge_l(reference: str, answer: str) -> float:
    """F-measure of the longest common subsequence of words, in [0, 1] (Lin 2004, "ROUGE", section 3.1).

    The package rouge-score counts it. Words are runs of letters and digits of any script, in lower case, not stemmed.
    """
    return _rouge().score(reference, answer)["rougeL"].fmeasure


@functools.cache
def _rouge():
    # Imported where it is used: it brings nltk, which takes as long to load as jax.
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rougeL"], tokenizer=_Words())


class _Words:
    """The words of a text. The package's own are of a-z and 0-9 only: an answer in Greek would have none."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


def _sampled(done: Completions) -> list[Answer]:
    rows = (tokens_T[mask_T].tolist() for tokens_T, mask_T in zip(done.tokens_BT, done.mask_BT, strict=True))
    return [Answer(tokens, tokens[-1] in STOP_IDS) for tokens in rows]


def _text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    stop = next((place for place, token in enumerate(ids) if token in STOP_IDS), len(ids))
    return tokenizer.decode(ids[:stop])


def _padded(rows: Prompts) -> tuple[np.ndarray, np.ndarray]:
    lengths_B = np.array([len(row) for row in rows])
    prompts_BT = np.full((len(rows), lengths_B.max()), PAD_ID, np.int32)
    for prompt_T, row in zip(prompts_BT, rows, strict=True):
        prompt_T[: len(row)] = row
    return prompts_BT, lengths_B
