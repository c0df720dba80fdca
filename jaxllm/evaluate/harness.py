"""A run as a model of EleutherAI's lm-eval (https://github.com/EleutherAI/lm-evaluation-harness), an optional package.

Requests are read as its own models read them: a document begins with ``bos_ids``, blanks at the end of a context belong
to the continuation, what is too long loses its beginning. No text spells a control token, but in a chat template.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxllm.data import conversations
from jaxllm.evaluate.answers import answers
from jaxllm.evaluate.scoring import Span, span_logps, spoken, text_span
from jaxllm.evaluate.suites import Run
from jaxllm.generate import SamplerConfig
from jaxllm.rewards.answers import TAGS
from jaxllm.text import chat
from jaxllm.text.chat import Conversation

MAX_NEW_TOKENS = 256  # where a task does not say, as its own models have it
_KNOWN = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}


class Harness:
    """lm-eval's three kinds of requests; each request has ``args``."""

    def __init__(self, run: Run, *, batch_size: int = 8, seed: int = 0):
        self.run, self.batch_size, self.seed = run, batch_size, seed
        self.templated = False

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether greedy decoding writes it) of each (context, continuation)."""
        spans = [self._span(*request.args).within(self.run.length) for request in requests]
        how = dict(length=self.run.length, batch_size=self.batch_size, doing="loglikelihood")
        found = spoken(self.run.model, self.run.params, spans, **how)
        return list(zip(found.logps.tolist(), found.greedy.tolist(), strict=True))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each (text,), whole, but for what opens and ends a document: window after window of the
        run's length sees one token before it, the last one as much as the length leaves room for.
        """
        windows = [self._windows(*request.args) for request in requests]
        flat = [window for several in windows for window in several]
        how = dict(length=self.run.length, batch_size=self.batch_size, doing="loglikelihood_rolling")
        logps = span_logps(self.run.model, self.run.params, flat, **how)
        ends = np.cumsum([len(several) for several in windows])[:-1]
        return [float(part.sum()) for part in np.split(logps, ends)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What is written after each (context, options), up to the first of ``until``: without that, and without any
        control token but the tags of thought and answer.

        Options are ``until``, ``max_gen_toks``, ``do_sample``, ``temperature``, ``top_p`` and ``top_k``; others raise
        ``ValueError``. A context that is too long loses its beginning.
        """
        alike = defaultdict(list)
        for number, request in enumerate(requests):
            alike[_sampling(request.args[1])].append(number)
        found: dict[int, str] = {}
        for (sampler, count), numbers in alike.items():
            texts = self._written([requests[number].args[0] for number in numbers], sampler, count)
            for number, text in zip(numbers, texts, strict=True):
                found[number] = _until(text, requests[number].args[1])
        return [found[number] for number in range(len(requests))]

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """The conversation as the run's own template spells it. From then on control tokens are read in contexts."""
        self.templated = True
        messages = tuple(map(conversations.message, chat_history))
        start = "" if add_generation_prompt else messages[-1]["content"]
        before = messages if add_generation_prompt else messages[:-1]
        return self.run.tokenizer.decode(chat.prompt(Conversation(before), self.run.tokenizer, start=start))

    @property
    def tokenizer_name(self) -> str:
        """What tells this tokenizer's requests from another's, for lm-eval's caches."""
        return self.run.tokenizer.fingerprint

    def chat_template(self, chat_template: bool | str = False) -> str:
        """What tells the template from another, for lm-eval's caches."""
        return self.run.tokenizer.template or chat.JINJA

    def _span(self, context: str, continuation: str) -> Span:
        if not self.templated:
            return text_span(self.run.tokenizer, context, continuation)
        before = self._ids(context)
        return Span([*before, *self.run.tokenizer.encode(continuation)], len(before))

    def _ids(self, text: str) -> list[int]:
        """The ids of a templated text, which opens its document itself."""
        tokenizer = self.run.tokenizer
        spelled = {name: token for token, name in tokenizer.special_tokens.items()}
        parts = tokenizer.special_pattern.split(text)
        return [token for part in parts for token in ([spelled[part]] if part in spelled else tokenizer.encode(part))]

    def _windows(self, text: str) -> list[Span]:
        tokenizer, length = self.run.tokenizer, self.run.length
        ids = [(tokenizer.bos_ids or (tokenizer.eos_id,))[-1], *tokenizer.encode(text)]
        scored = ((start + 1, min(start + length, len(ids) - 1)) for start in range(0, len(ids) - 1, length))
        return [Span(ids[max(0, last - length) : last + 1], first - max(0, last - length)) for first, last in scored]

    def _written(self, contexts: Sequence[str], sampler: SamplerConfig, count: int) -> list[str]:
        tokenizer, room = self.run.tokenizer, self.run.length - count
        if room < 1:
            raise ValueError(f"max_gen_toks={count} leaves no room for a context in {self.run.length} tokens: lower it")
        read = self._ids if self.templated else tokenizer.opening
        prompts = [read(context)[-room:] for context in contexts]
        how = dict(max_new_tokens=count, sampler=sampler, stop_ids=tokenizer.stop_ids, batch_size=self.batch_size)
        found = answers(self.run.model, self.run.params, prompts, jax.random.key(self.seed), **how)
        unsaid = {token for token, spelled in tokenizer.special_tokens.items() if spelled not in TAGS}
        return [tokenizer.decode(token for token in answer.tokens if token not in unsaid) for answer in found]


def harness(run: Run, *, batch_size: int = 8, seed: int = 0) -> Any:
    """The run as lm-eval takes it: ``lm_eval.simple_evaluate(model=harness(run), tasks=[...])``.

    Raises ``ImportError`` with what to install where lm-eval is missing.
    """
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise ImportError("EleutherAI's harness is the package lm-eval: pip install lm-eval") from error

    class Evaluated(Harness, LM):
        def __init__(self):
            LM.__init__(self)
            Harness.__init__(self, run, batch_size=batch_size, seed=seed)

    return Evaluated()


def evaluated(
    run: Run, tasks: Sequence[str], *, batch_size: int = 8, include_path: str | None = None, **options: Any
) -> dict[str, dict[str, Any]]:
    """task -> metric -> value of lm-eval's tasks; ``options`` are those of its ``simple_evaluate``.

    include_path: a folder with further tasks. Raises ``ImportError`` where lm-eval is missing, and as it does.
    """
    model = harness(run, batch_size=batch_size)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path)
    return simple_evaluate(model=model, tasks=list(tasks), task_manager=manager, **options)["results"]


def _sampling(options: Mapping[str, Any]) -> tuple[SamplerConfig, int]:
    if unknown := set(options) - _KNOWN:
        raise ValueError(f"options {sorted(unknown)} of generate_until are not known: {sorted(_KNOWN)} are")
    drawn = options.get("do_sample", options.get("temperature", 0) > 0)
    chosen = {"temperature": float(options.get("temperature", 1.0)) if drawn else 0.0}
    chosen |= {name: options[name] for name in ("top_p", "top_k") if drawn and name in options}
    return SamplerConfig(**chosen), int(options.get("max_gen_toks", MAX_NEW_TOKENS))


def _until(text: str, options: Mapping[str, Any]) -> str:
    until = options.get("until") or []
    ends = [text.find(end) for end in ([until] if isinstance(until, str) else until) if end]
    return text[: min((end for end in ends if end >= 0), default=len(text))]
