"""What reinforcement learning asks: problems by their number, out of tasks, files or a library, mixed by weights.

Problem k depends on the seed and on k alone, so that a resumed run asks what an uninterrupted one would, in O(1). What
is held out follows from the words of a prompt alone: whoever shares the prompts shares the sides, whatever the seed.
"""

import functools
import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from jaxllm.configure import nearest
from jaxllm.data import conversations, preferences, tasks
from jaxllm.data.config import ON_ERROR
from jaxllm.data.made import require
from jaxllm.data.sources import DocumentSource, Reading
from jaxllm.data.tasks import HELD_OUT, TASKS, THINK_FIRST, Problem
from jaxllm.text import chat
from jaxllm.text.chat import Conversation, Malformed

FILE, LIBRARY, THINK = "file", "reasoning_gym", "think"
KINDS = (*TASKS, FILE, LIBRARY)
PROMPTS, ANSWERS = ("prompt", "question", "problem"), ("answer", "solution")
_CYCLE = 1000  # problems after which a mixture repeats: the grain of its weights
_CONTENT = {"messages", "conversations", "chosen", "rejected", "prompt", "question", "problem", "completion"}


@dataclass(frozen=True)
class ProblemSource:
    """One source of problems.

    kind: a task of ``data.tasks.TASKS``, "file", or "reasoning_gym", the package.
    weight: its share, relative to the other sources'.
    level: how hard a task is, from 1.
    path: of kind "file": a file, folder or glob of records with a prompt and, for what is checked, an answer.
    name: of kind "reasoning_gym": which of its data sets.
    answer: field of a file that holds the answer; empty: "answer" or else "solution".
    checker: what compares a file's answers, in the words of the rewards: "numeric", "exact", "math"; empty: the answer
      tells which of the first two.
    on_error: "raise" at a bad record of a file, or "skip" and count it.
    system: what the system says before each prompt; "think" stands for a request to think and then answer in tags.
    """

    kind: str
    weight: float = 1.0
    level: int = 1
    path: str = ""
    name: str = ""
    answer: str = ""
    checker: str = ""
    on_error: str = "raise"
    system: str = ""

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} is no source of problems{nearest(self.kind, KINDS)}")
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"weight={self.weight} of problems {self.kind!r} is a finite number above 0")
        if self.level < 1 or (self.level > 1 and self.kind not in TASKS):
            raise ValueError(f"level={self.level} of problems {self.kind!r}: 1 or more, and of a task alone")
        if (self.kind == FILE) != bool(self.path) or (self.kind == LIBRARY) != bool(self.name):
            raise ValueError(
                f"path={self.path!r} and name={self.name!r} of problems {self.kind!r}: 'file' has a path and "
                "'reasoning_gym' a name, no other has either"
            )
        if (self.answer or self.checker) and self.kind != FILE:
            raise ValueError(f"answer={self.answer!r} and checker={self.checker!r} are of a file, not of {self.kind!r}")
        if self.on_error not in ON_ERROR:
            raise ValueError(f"on_error={self.on_error!r} is not one of {ON_ERROR}")


class Pool(Protocol):
    """The problems of one source. report: what is known of it, by which it can be told from another."""

    report: dict[str, Any]

    def training(self, number: int) -> Problem:
        """Training problem ``number``, of endlessly many; the seed decides which."""

    def validation(self) -> Iterator[Problem]:
        """What is held out, in an order of its own; endless, and with repetitions, where it is drawn."""


class Problems:
    """All sources together; see `problems`.

    fingerprint: hex digest of all that decides problem k. report: what is known of each source.
    """

    def __init__(self, pools: Mapping[str, Pool], mixture: Sequence[int], fingerprint: str):
        self._pools, self._mixture = list(pools.values()), np.asarray(mixture)
        self.fingerprint = fingerprint
        self.report = {name: pool.report for name, pool in pools.items()}

    def problem(self, number: int) -> Problem:
        """Training problem ``number``, from 0, of endlessly many."""
        cycle, place = divmod(number, len(self._mixture))
        source = self._mixture[place]
        before, each = (int(np.sum(part == source)) for part in (self._mixture[:place], self._mixture))
        return self._pools[source].training(cycle * each + before)

    def batch(self, step: int, count: int) -> list[Problem]:
        """The problems of a step: ``count`` of them, in a row with those of the next step."""
        return [self.problem(number) for number in range(step * count, (step + 1) * count)]

    def validation(self, count: int) -> list[Problem]:
        """At most ``count`` held-out problems, as many of each source as of any other, no prompt twice."""
        require(0, heldout=count)
        found: dict[int, Problem] = {}
        share = -(-count // len(self._pools))
        for pool in self._pools:
            found |= _distinct(pool.validation(), share, found)
        return list(found.values())[:count]


def problems(
    sources: Mapping[str, ProblemSource | Mapping[str, Any]], *, validation: float = HELD_OUT, seed: int = 0
) -> Problems:
    """The problems of these sources, name -> source.

    validation: the share of all prompts that is held out. Raises ``ValueError`` where there are no sources, where a
    source has no problem to train on, and for a file that cannot be read.
    """
    made = {
        name: source if isinstance(source, ProblemSource) else ProblemSource(**source)
        for name, source in sources.items()
    }
    if not made or not 0 <= validation < 1:
        raise ValueError(f"sources={list(made)}, validation={validation}: at least one source, and a share below 1")
    pools = {name: _pool(name, source, validation, seed) for name, source in made.items()}
    decided = [validation, seed, {name: [asdict(made[name]) | {"path": ""}, pools[name].report] for name in made}]
    fingerprint = hashlib.sha256(json.dumps(decided).encode()).hexdigest()
    return Problems(pools, _mixture([source.weight for source in made.values()], seed), fingerprint)


def _pool(name: str, source: ProblemSource, share: float, seed: int) -> Pool:
    if source.kind == FILE:
        return _Listed(name, source, share, seed)
    draw = _of_library(source) if source.kind == LIBRARY else functools.partial(_of_task, source)
    return _Drawn(name, source, draw, share, seed)


class _Drawn:
    """Problems drawn one by one until they lie on the right side."""

    def __init__(
        self, name: str, source: ProblemSource, draw: Callable[[random.Random], Problem], share: float, seed: int
    ):
        self._name, self._source, self._draw, self._share, self._seed = name, source, draw, share, seed
        self.report = {"kind": source.kind, "level": source.level}
        self.training(0)

    def training(self, number: int) -> Problem:
        return self._on_side(random.Random(f"{self._seed} {self._name} {number}"), held_out=False)

    def validation(self) -> Iterator[Problem]:
        draw = random.Random(f"validation {self._name}")  # not of the seed: runs are compared on the same problems
        while self._share:
            yield self._on_side(draw, held_out=True)

    def _on_side(self, draw: random.Random, *, held_out: bool) -> Problem:
        for _ in range(tasks.LONGEST_SEARCH):
            problem = self._draw(draw)
            if tasks.is_held_out(problem.prompt, self._share) == held_out:
                return _asked(problem, self._source)
        raise ValueError(f"of problems {self._name!r} none {'is' if held_out else 'is not'} held out: change the share")


def _of_task(source: ProblemSource, draw: random.Random) -> Problem:
    return TASKS[source.kind](draw, source.level)


def _of_library(source: ProblemSource) -> Callable[[random.Random], Problem]:
    """A draw from a data set of reasoning-gym, whose own function scores the answers."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError(
            f"problems {source.name!r} need the package reasoning-gym: pip install reasoning-gym"
        ) from error
    known = reasoning_gym.factory.DATASETS
    if source.name not in known:
        raise ValueError(f"name={source.name!r} is no data set of reasoning-gym{nearest(source.name, known)}")

    def draw(lot: random.Random) -> Problem:
        entry = dict(reasoning_gym.create_dataset(source.name, size=1, seed=lot.getrandbits(31))[0])
        prompt = Conversation(({"role": "user", "content": entry["question"]},))
        checked = {"checker": LIBRARY, "dataset": source.name, "entry": entry}
        return Problem(prompt, {"task": source.name, "answer": str(entry["answer"]), "solution": "", **checked})

    return draw


class _Listed:
    """The problems of files, each prompt once: an epoch asks each once, in an order of its own."""

    def __init__(self, name: str, source: ProblemSource, share: float, seed: int):
        self._name, self._source, self._lot = name, source, f"{seed} {name}"
        documents = DocumentSource(source.path)
        self._sides: tuple[list[Problem], list[Problem]] = ([], [])
        self.report = {"content": documents.fingerprint, **self._read(documents, share)}
        if not self._sides[0]:
            raise ValueError(f"{source.path} has no problem to train on: {self.report}; lower the held-out share")

    def training(self, number: int) -> Problem:
        epoch, place = divmod(number, len(self._sides[0]))
        return _asked(self._sides[0][_order(self._lot, epoch, len(self._sides[0]))[place]], self._source)

    def validation(self) -> Iterator[Problem]:
        return (_asked(problem, self._source) for problem in self._sides[1])

    def _read(self, documents: DocumentSource, share: float) -> dict[str, int]:
        counts, seen = Counter(training=0, validation=0, without_answer=0, repeated=0), set()
        for problem in _parsed(documents.records(), self._source, self._name, counts):
            if (asked := repr(problem.prompt)) in seen:
                counts["repeated"] += 1
                continue
            seen.add(asked)
            held_out = tasks.is_held_out(problem.prompt, share)
            self._sides[held_out].append(problem)
            counts["validation" if held_out else "training"] += 1
            counts["without_answer"] += "answer" not in problem.record
        self._sides[1].sort(key=lambda problem: tasks.key(problem.prompt))
        return dict(counts)


def _parsed(records: Reading, source: ProblemSource, task: str, counts: Counter) -> Iterator[Problem]:
    for record in records:
        try:
            yield from record.parsed(functools.partial(of_record, source=source, task=task))
        except Malformed as error:
            if source.on_error == "raise":
                raise error.or_skip() from error
            counts[error.reason] += 1


@functools.lru_cache(maxsize=8)
def _order(seed: str, epoch: int, size: int) -> np.ndarray:
    lot = hashlib.blake2b(seed.encode(), digest_size=8).digest()
    return np.random.default_rng([epoch, int.from_bytes(lot, "little")]).permutation(size)


def of_record(value: Any, source: ProblemSource, task: str) -> list[Problem]:
    """The problem that a record holds; none where it has preferences without two answers.

    A prompt is a field of ``PROMPTS``, as text or messages, what comes before the last answer of a conversation, or
    what preferences are about. Its record has the answer, where there is one, what comes before "####" as the solution,
    and all fields that are no part of the prompt. Raises Malformed where there is no prompt that makes sense.
    """
    if not isinstance(value, Mapping):
        raise Malformed("not_an_object", "a text is no problem; give objects with a prompt and an answer, as .jsonl")
    rest = {name: field for name, field in value.items() if name not in _CONTENT and name not in ANSWERS}
    checked = {"checker": source.checker} if source.checker else {}
    record = {**rest, "task": task, **_answer(value, source), **checked}
    found = [Problem(prompt, record) for prompt in _prompts(value)]
    for problem in found:
        chat.check(Conversation((*problem.prompt.messages, {"role": "assistant", "content": "?"})))
    return found


def _prompts(value: Mapping[str, Any]) -> list[Conversation]:
    try:
        kind = preferences.detected(value)
    except Malformed:
        kind = ""
    if kind and not set(ANSWERS) & value.keys():
        return [preference.prompt for preference in preferences.preferences(value, kind)[:1]]
    field = next((field for field in PROMPTS if field in value), "")
    if field:
        said = (*conversations.system(value), *conversations.turns(value, field, "user"))
        return [Conversation(said, conversations.tools(value))]
    whole = conversations.FORMATS[conversations.detected(value)](value)
    said = whole.messages
    while said and said[-1]["role"] != "user":
        said = said[:-1]
    return [whole._replace(messages=said)]


def _answer(value: Mapping[str, Any], source: ProblemSource) -> dict[str, str]:
    """{"answer", "solution"}; nothing where the record has no answer. GSM8K has both in one: a solution #### answer."""
    field = source.answer or next((field for field in ANSWERS if field in value), "")
    if field not in value:
        return {}
    given = value[field]
    if isinstance(given, bool) or not isinstance(given, str | int | float):
        raise Malformed("not_text", f"the answer {field!r} is {type(given).__name__} {given!r:.40}, not text; mend it")
    before, mark, after = str(given).rpartition("####")
    solution = before.strip() if mark else value.get("solution", "")
    return {"answer": after.strip() if mark else str(given), "solution": solution}


def _asked(problem: Problem, source: ProblemSource) -> Problem:
    """With what the system says, where the source has it so; it comes before what a record's own says."""
    if not source.system:
        return problem
    system = {"role": "system", "content": THINK_FIRST if source.system == THINK else source.system}
    return problem._replace(prompt=problem.prompt._replace(messages=(system, *problem.prompt.messages)))


def _distinct(found: Iterator[Problem], count: int, known: Mapping[int, Problem]) -> dict[int, Problem]:
    """The first ``count`` by the words of their prompts, none of them known; fewer where no new one comes any more."""
    new, repeated = {}, 0
    for problem in found:
        if len(new) == count or repeated == tasks.LONGEST_SEARCH:
            break
        place = tasks.key(problem.prompt)
        repeated = repeated + 1 if place in known or place in new else 0
        if not repeated:
            new[place] = problem
    return new


def _mixture(weights: Sequence[float], seed: int) -> np.ndarray:
    """The number of a source for each place of a cycle, each as often as its weight says, in a drawn order."""
    bounds = np.round(np.cumsum(weights) / np.sum(weights) * (_CYCLE if len(weights) > 1 else 1)).astype(int)
    counts = np.diff(bounds, prepend=0)
    if not counts.all():
        raise ValueError(
            f"weights={list(weights)}: the least is below 1 of {_CYCLE}; raise it, or leave its source out"
        )
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(weights)), counts))
