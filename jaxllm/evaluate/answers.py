"""A model's answers to prompts given as ids, and how near they come to references: ROUGE-L, BLEU, exact match."""

import functools
import re
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from statistics import fmean
from typing import NamedTuple

import jax

from jaxllm.generate import Request, SamplerConfig, completions
from jaxllm.model import Model
from jaxllm.text.tokenizer import Tokenizer
from jaxllm.tree import Tree

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
    stop_ids: tuple[int, ...],
    batch_size: int,
) -> list[Answer]:
    """The answer to each prompt, up to the first of ``stop_ids`` (a tokenizer's), or ``max_new_tokens``.

    What is sampled for a prompt depends on it, its number and the key, not on ``batch_size``: how many are sampled at
    once. Raises as ``completions`` does.
    """
    how = dict(max_new_tokens=max_new_tokens, sampler=sampler, stop_ids=stop_ids, batch_size=batch_size)
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
    stop_ids: tuple[int, ...],
    batch_size: int,
    known: Collection[int] = (),
) -> Iterator[tuple[int, Answer]]:
    """(number of the prompt, its answer) as they finish, the longest prompts first, without those that are ``known``.

    What is sampled for a prompt is what ``answers`` samples, whatever is known: an interrupted work continues as if it
    had not been.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    lengths = [len(prompt) for prompt in prompts]
    by_length = sorted(range(len(prompts)), key=lengths.__getitem__, reverse=True)
    queue = deque(Request(number, prompts[number], max_new_tokens) for number in by_length if number not in known)
    how = dict(slots=batch_size, length=max(lengths, default=0) + max_new_tokens, sampler=sampler, stop_ids=stop_ids)
    for number, tokens, _, ended in completions(model, params, queue, key, **how):
        yield number, Answer(tokens.tolist(), ended)


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


def sentence_bleu(references: Sequence[str], answer: str) -> tuple[float, list[int]]:
    """BLEU of one answer against all references together, 0 to 100, and the counts that add up to a corpus's.

    The package sacrebleu counts, as published numbers are (Post 2018, arXiv:1804.08771): its own tokens, cased; of a
    single answer over the orders that it has words for. The counts are matches and n-grams of orders 1 to 4, and the
    lengths of the answer and of the nearest reference.
    """
    found = _bleu().sentence_score(answer, list(references))
    return found.score, [*found.counts, *found.totals, found.sys_len, found.ref_len]


def corpus_bleu(counts: Sequence[float]) -> float:
    """BLEU of a corpus, 0 to 100, from the sums of what ``sentence_bleu`` counts of its answers."""
    *grams, answers_length, references_length = (round(count) for count in counts)
    lengths = dict(sys_len=answers_length, ref_len=references_length)
    return _bleu().compute_bleu(grams[:4], grams[4:], **lengths, smooth_method="exp").score


@functools.cache
def _bleu():
    from sacrebleu.metrics import BLEU

    return BLEU(effective_order=True)


@functools.cache
def _rouge():
    # Imported where it is used: it brings nltk, which takes as long to load as jax.
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rougeL"], tokenizer=_Words())


class _Words:
    """The words of a text. The package's own are of a-z and 0-9 only: an answer in Greek would have none."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


def _text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    stop = next((place for place, token in enumerate(ids) if token in tokenizer.stop_ids), len(ids))
    return tokenizer.decode(ids[:stop])
