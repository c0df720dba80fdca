import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxllm.rewards import scoring, style, verifiers
from jaxllm.rewards.scoring import Outcome, Term, outcome, weighted
from jaxllm.text.chat import Conversation

ROOT = Path(scoring.__file__).parents[2]
PROMPT = Conversation(({"role": "user", "content": "1+2=?"},))
GOOD = "<think>1+2=3</think><answer>1+2</answer>"
RECORD = {"numbers": [1, 2], "target": 3, "completion_tokens": 8, "max_new_tokens": 10, "ended": True}
ENDLESS = RECORD | {"numbers": range(10**15)}
TERMS = {"right": Term("countdown"), "form": Term("format", 0.1), "learned": Term("model", path="runs/reward")}
VALUES = {"right": 1.0, "right/unparsed": 0.0, "form": 1.0}
TIME_LIMIT = 0.3


@pytest.fixture(scope="module")
def submit():
    with scoring.pool(TERMS, workers=1, time_limit=TIME_LIMIT) as submit:
        submit(PROMPT, GOOD, RECORD).result(60)  # started
        yield submit


# ---- terms ----


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"kind": "acuracy"}, "kind='acuracy' is no reward; did you mean 'accuracy'"),
        ({"kind": "numeric", "weight": math.nan}, "weight=nan of a reward 'numeric' is not a finite number"),
        ({"kind": "model"}, "path='' of a reward 'model'"),
        ({"kind": "numeric", "path": "x"}, "path='x' of a reward 'numeric'"),
        ({"kind": "numeric", "limit": 3}, "limit=3 of a reward 'numeric'"),
        ({"kind": "length", "buffer": 3}, "buffer=3 of a reward 'length'"),
        ({"kind": "length", "limit": -3}, "limit=-3 of a reward 'length'"),
        ({"kind": "overlong"}, "buffer=0 of a reward 'overlong': above 0"),
        ({"kind": "overlong", "limit": 4, "buffer": 5}, "buffer=5 of a reward 'overlong': above 0 and at most limit=4"),
    ],
)
def test_a_term_that_means_nothing_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Term(**fields)


def test_every_rule_and_every_learned_kind_is_a_kind():
    assert set(scoring.KINDS) == {*verifiers.RULES, *style.RULES, "model", "judge"}
    assert len(verifiers.RULES) + len(style.RULES) == len(scoring.RULES)
    assert all(Term(kind) for kind in scoring.RULES if kind != "overlong") and Term("judge", path="longer")


def test_a_total_is_the_sum_of_weights_times_values():
    terms = {"a": Term("format", 2.0), "b": Term("ended", -0.5), "c": Term("style", 0.0)}
    assert weighted(terms, {"a": 1.0, "b": 1.0, "c": math.nan, "other": 9.0}) == 1.5
    assert math.isnan(weighted(terms, {"a": math.nan, "b": 1.0, "c": 0.0}))
    arrays = {"a": np.array([1.0, 0.0]), "b": np.array([0.0, 1.0]), "c": np.array([5.0, 5.0])}
    assert weighted(terms, arrays).tolist() == [2.0, -0.5]
    with pytest.raises(KeyError):
        weighted(terms, {"a": 1.0, "c": 1.0})


# ---- what the rules say ----


def test_an_outcome_has_each_rule_by_the_term_s_name_with_its_parts_and_options():
    assert outcome(TERMS, PROMPT, GOOD, RECORD) == Outcome(VALUES)
    assert outcome(TERMS, PROMPT, "?", RECORD) == Outcome({"right": 0.0, "right/unparsed": 1.0, "form": 0.0})
    terms = {"long": Term("length", limit=4), "over": Term("overlong", buffer=4), "mild": Term("overlong", buffer=8)}
    assert outcome(terms, PROMPT, GOOD, RECORD).values == {"long": 2.0, "over": -0.5, "mild": -0.75}


def test_a_rule_that_raises_is_a_failure_with_its_message_and_no_reward(monkeypatch):
    def infinite(prompt, completion, record):
        return math.inf

    monkeypatch.setitem(scoring.RULES, "ended", infinite)
    terms = {"a": Term("numeric"), "b": Term("format"), "c": Term("ended")}
    values, failure = outcome(terms, PROMPT, GOOD, {})
    assert math.isnan(values["a"]) and values["b"] == 1 and math.isnan(values["c"])
    assert failure.startswith("error: a: ValueError: a record with [] has no 'answer'")
    assert failure.endswith("; c: ValueError: a score of inf")


def test_without_workers_the_rules_run_at_once():
    with scoring.pool(TERMS, workers=0, time_limit=1) as submit:
        future = submit(PROMPT, GOOD, RECORD)
        assert future.done() and future.result() == Outcome(VALUES)


@pytest.mark.parametrize("workers, time_limit", [(-1, 1.0), (0, 0.0), (1, -1.0), (0, math.nan)])
def test_a_pool_of_no_sense_is_refused(workers, time_limit):
    message = f"workers={workers}, time_limit={time_limit}: 0 or more processes"
    with pytest.raises(ValueError, match=message), scoring.pool(TERMS, workers=workers, time_limit=time_limit):
        pass


# ---- processes ----


def test_processes_say_what_the_rules_say(submit):
    completions = [GOOD, "?", "<answer>1-2</answer>", ""] * 8
    futures = [submit(PROMPT, completion, RECORD) for completion in completions]
    assert [future.result(60) for future in futures] == [outcome(TERMS, PROMPT, c, RECORD) for c in completions]


def test_a_rule_that_hangs_is_ended_and_the_others_go_on(submit):
    began = time.perf_counter()
    hanging, next_one = submit(PROMPT, GOOD, ENDLESS), submit(PROMPT, GOOD, RECORD)
    values, failure = hanging.result(60)
    assert failure == "timeout" and set(values) == {"right", "form"} and all(map(math.isnan, values.values()))
    assert time.perf_counter() - began >= TIME_LIMIT
    assert next_one.result(60) == Outcome(VALUES)


def test_a_failure_in_a_process_says_why(submit):
    assert submit(PROMPT, GOOD, {}).result(60).failure == "error: right: KeyError: 'numbers'"
    values, failure = submit(PROMPT, GOOD, RECORD | {"unsendable": lambda: 1}).result(60)
    assert math.isnan(values["right"]) and failure.startswith("error: ") and "<lambda>" in failure
    assert submit(PROMPT, GOOD, RECORD).result(60) == Outcome(VALUES)


def test_a_process_that_dies_fails_its_completion_and_is_replaced_even_while_it_waits(submit):
    hanging = submit(PROMPT, GOOD, ENDLESS)
    time.sleep(TIME_LIMIT / 3)
    kill_workers()
    values, failure = hanging.result(60)
    assert math.isnan(values["form"]) and failure.startswith("error: ") or failure == "timeout"
    assert submit(PROMPT, GOOD, RECORD).result(60) == Outcome(VALUES)
    kill_workers()
    time.sleep(0.3)  # until that is noticed
    assert submit(PROMPT, GOOD, RECORD).result(60) == Outcome(VALUES)


def kill_workers():
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGKILL)


def test_what_is_unfinished_at_the_end_is_cancelled_and_an_unused_pool_ends_too():
    with scoring.pool(TERMS, workers=1, time_limit=50) as submit:
        futures = [submit(PROMPT, GOOD, ENDLESS) for _ in range(3)]
    assert all(future.cancelled() for future in futures)
    with scoring.pool(TERMS, workers=1, time_limit=50):
        pass


def test_a_process_that_nobody_is_left_to_end_ends_of_itself_after_twice_the_time(monkeypatch):
    left = []

    def asked(*args):
        left.append(signal.getitimer(signal.ITIMER_REAL)[0])
        return outcome(*args)

    monkeypatch.setattr(scoring, "outcome", asked)
    assert scoring._mortal(30.0, TERMS, PROMPT, GOOD, RECORD) == Outcome(VALUES)
    assert 60 < left[0] <= 61 and signal.getitimer(signal.ITIMER_REAL)[0] == 0


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
sys.modules["jax"] = sys  # stands for the JAX that a script imports
print("imported", flush=True)

from jaxllm.rewards import scoring
from jaxllm.text.chat import Conversation


class Spy:
    def __reduce__(self):
        return eval, ("[name for name in ('jax', 'pebble') if name in __import__('sys').modules]",)


if __name__ == "__main__":
    with scoring.pool({{"a": scoring.Term("exact")}}, workers=1, time_limit=9) as submit:
        for answer in ("['pebble']", "['jax', 'pebble']"):
            record = {{"answer": Spy()}}
            print(submit(Conversation(()), answer, record).result().values["a"], flush=True)
"""


def test_a_process_imports_neither_the_script_that_runs_nor_jax(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT)))
    ran = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert ran.stdout.split() == ["imported", "1.0", "0.0"], ran.stderr
