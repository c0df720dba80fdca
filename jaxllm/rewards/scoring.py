"""Rewards in a run: which rules count how much, and a pool of processes that scores completions beside the device.

A rule that hangs is killed with its process after a time limit, and one that fails says so: neither ends a run, and
neither is taken for a reward of 0.
"""

import contextlib
import importlib
import importlib.util
import math
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as OutOfTime
from dataclasses import dataclass
from functools import partial
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any, NamedTuple

import pebble

from jaxllm.configure import nearest
from jaxllm.rewards import style, verifiers
from jaxllm.text.chat import Conversation

RULES = {**verifiers.RULES, **style.RULES}
LEARNED = ("model", "judge")  # kinds that a model scores, on the device
KINDS = (*RULES, *LEARNED)
_LIBRARIES = {
    "math": ("math_verify",),
    "accuracy": ("math_verify", "reasoning_gym"),
}  # slow to import, each where it is


@dataclass(frozen=True)
class Term:
    """One part of a reward.

    kind: a rule of ``RULES``, or one of ``LEARNED``.
    weight: what its score is multiplied with; 0: it is only watched.
    path: the run directory of a learned kind.
    limit: tokens, of "length" and "overlong"; 0: the most that a completion may have.
    buffer: tokens before the limit over which "overlong" falls.
    """

    kind: str
    weight: float = 1.0
    path: str = ""
    limit: int = 0
    buffer: int = 0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} is no reward{nearest(self.kind, KINDS)}")
        if not math.isfinite(self.weight):
            raise ValueError(f"weight={self.weight} of a reward {self.kind!r} is not a finite number")
        if bool(self.path) != (self.kind in LEARNED):
            raise ValueError(f"path={self.path!r} of a reward {self.kind!r}: {LEARNED} need a run, a rule has none")
        for name in ("limit", "buffer"):
            value, has = getattr(self, name), name in verifiers.OPTIONS.get(self.kind, ())
            if value < 0 or (value and not has):
                raise ValueError(f"{name}={value} of a reward {self.kind!r}: 0 or more tokens, and 0 where unused")
        if self.kind == "overlong" and (not self.buffer or 0 < self.limit < self.buffer):
            raise ValueError(f"buffer={self.buffer} of a reward 'overlong': above 0 and at most limit={self.limit}")


class Outcome(NamedTuple):
    """What the rules say of one completion.

    values: name of a term -> its score, and name/part for what else a rule tells, such as accuracy/unparsed. A score
    that there is none of is NaN. failure: "", "timeout", or "error: ...".
    """

    values: dict[str, float]
    failure: str = ""


Submit = Callable[[Conversation, str, Mapping[str, Any]], "Future[Outcome]"]


def weighted(terms: Mapping[str, Term], values: Mapping[str, Any]) -> Any:
    """The sum of weight * value over the terms; values are numbers, or arrays of them. A term of weight 0 adds none,
    be its value NaN.
    """
    return sum((term.weight * values[name] for name, term in terms.items() if term.weight), 0.0)


def outcome(terms: Mapping[str, Term], prompt: Conversation, completion: str, record: Mapping[str, Any]) -> Outcome:
    """What the rules among the terms say of one completion. Whatever a rule raises is a failure with its message."""
    values, failures = {}, []
    for name, term in terms.items():
        if term.kind in LEARNED:
            continue
        try:
            values |= _scores(name, _rule(term)(prompt, completion, record))
        except Exception as error:
            values[name] = math.nan
            failures.append(f"{name}: {type(error).__name__}: {error}")
    return Outcome(values, f"error: {'; '.join(failures)}" if failures else "")


@contextlib.contextmanager
def pool(terms: Mapping[str, Term], *, workers: int, time_limit: float) -> Iterator[Submit]:
    """A function (prompt, completion, record) -> future of its `Outcome`, which never raises, in so many processes.

    time_limit: seconds for one completion; the process of one that takes longer is killed and replaced. With 0 workers
    the rules run in the calling thread, without a limit. What is unfinished at the end is cancelled. Raises
    ``ValueError`` for a number of workers below 0, or a limit not above 0.
    """
    if workers < 0 or not time_limit > 0:
        raise ValueError(f"workers={workers}, time_limit={time_limit}: 0 or more processes, more than 0 seconds")
    if not workers:
        yield partial(_at_once, terms)
        return
    processes = _Processes(terms, workers, time_limit)
    try:
        yield processes.submit
    finally:
        processes.close()


class _Processes:
    """A pool of processes, started again should they all be gone."""

    def __init__(self, terms: Mapping[str, Term], workers: int, time_limit: float):
        self._terms, self._workers, self._time_limit = dict(terms), workers, time_limit
        self._unfinished: set[Future] = set()
        self._pool = self._started()

    def submit(self, prompt: Conversation, completion: str, record: Mapping[str, Any]) -> "Future[Outcome]":
        if not self._pool.active:
            self._end()
            self._pool = self._started()
        done: Future[Outcome] = Future()
        self._unfinished.add(done)
        done.add_done_callback(self._unfinished.discard)
        asked = [self._time_limit, self._terms, prompt, completion, dict(record)]
        task = self._pool.schedule(_mortal, asked, timeout=self._time_limit)
        task.add_done_callback(lambda task: _settle(done, task, self._terms))
        return done

    def close(self) -> None:
        self._end()
        for done in tuple(self._unfinished):
            done.cancel()

    def _started(self) -> pebble.ProcessPool:
        context = _Context()
        context.set_forkserver_preload([__name__])
        return pebble.ProcessPool(self._workers, initializer=_prepare, initargs=[self._terms], context=context)

    def _end(self) -> None:
        self._pool.stop()
        self._pool.join()


def _at_once(terms: Mapping[str, Term], prompt: Conversation, completion: str, record: Mapping) -> "Future[Outcome]":
    done: Future[Outcome] = Future()
    done.set_result(outcome(terms, prompt, completion, record))
    return done


def _mortal(time_limit: float, *asked: Any) -> Outcome:
    """`outcome`, in a process that ends of itself should nobody be left to end it."""
    signal.setitimer(signal.ITIMER_REAL, 2 * time_limit + 1)
    try:
        return outcome(*asked)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _settle(done: "Future[Outcome]", task: "Future[Outcome]", terms: Mapping[str, Term]) -> None:
    none = {name: math.nan for name, term in terms.items() if term.kind not in LEARNED}
    try:
        done.set_result(task.result())
    except CancelledError:
        done.cancel()
    except OutOfTime:
        done.set_result(Outcome(none, "timeout"))
    except Exception as error:  # the process died, or the record cannot be sent to it
        done.set_result(Outcome(none, f"error: {type(error).__name__}: {error}"))


def _rule(term: Term) -> Callable[..., Any]:
    options = {name: getattr(term, name) for name in verifiers.OPTIONS.get(term.kind, ())}
    return partial(RULES[term.kind], **options) if options else RULES[term.kind]


def _scores(name: str, given: float | Mapping[str, float]) -> dict[str, float]:
    parts = dict(given) if isinstance(given, Mapping) else {"score": given}
    values = {name if part == "score" else f"{name}/{part}": float(value) for part, value in parts.items()}
    if not math.isfinite(values[name]):
        raise ValueError(f"a score of {values[name]}")
    return values


def _prepare(terms: Mapping[str, Term]) -> None:
    """Imports what the terms may need, so that no completion's time goes by on it."""
    for library in {name for term in terms.values() for name in _LIBRARIES.get(term.kind, ())}:
        if importlib.util.find_spec(library):
            importlib.import_module(library)


class _Process(ForkServerProcess):
    """A process that does not import the script that runs, as multiprocessing's do: that one imports JAX.

    It is not forked from this process either, which has JAX's threads.
    """

    _hiding = threading.Lock()

    @staticmethod
    def _Popen(process):
        with _Process._hiding:
            main = sys.modules["__main__"]
            sys.modules["__main__"] = types.ModuleType("__main__")
            try:
                return ForkServerProcess._Popen(process)
            finally:
                sys.modules["__main__"] = main


class _Context(ForkServerContext):
    Process = _Process
