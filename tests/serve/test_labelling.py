import json
from collections import Counter

import jax
import numpy as np
import pytest

from jaxllm.data import conversations
from jaxllm.evaluate.answers import Answer, answered
from jaxllm.evaluate.judges import Judgement, by_score
from jaxllm.generate import SamplerConfig
from jaxllm.serve import labelling
from jaxllm.serve.labelling import BEST, PAIR, Candidate, candidate, write
from jaxllm.text import chat
from jaxllm.text.chat import Conversation
from jaxllm.text.special_tokens import END_ID, EOS_ID, IDS
from jaxllm.text.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
HOW = dict(samples=3, made_by={"step": 3}, max_new_tokens=6, sampler=SamplerConfig(), batch_size=4, seed=0)
PROMPTS = [Conversation(({"role": "user", "content": "q" * length},)) for length in (3, 9, 1, 5, 2, 7, 4)]
TOOLS = ({"name": "add", "parameters": {}},)


def said(text, ended=True):
    return Answer([*TOKENIZER.encode(text), *([END_ID] if ended else [])], ended)


def by_length(prompts, answers):
    return np.array([float(len(answer)) for answer in answers])


# ---- candidates and choices ----


def test_a_candidate_is_the_message_that_an_answer_spells_and_its_text():
    call = '{"name": "add", "arguments": {}}'
    ids = [*TOKENIZER.encode("é "), IDS["<|tool_call|>"], *TOKENIZER.encode(call), END_ID]
    found = candidate(Answer(ids, True), TOKENIZER)
    assert found.text == f"é <|tool_call|>{call}"
    assert found.message == {"role": "assistant", "content": "é ", "tool_calls": [json.loads(call)]}
    assert candidate(Answer(ids[2:], True), TOKENIZER).message["content"] == " "  # a call alone says something
    assert candidate(Answer([*TOKENIZER.encode("x"), EOS_ID], True), TOKENIZER).text == "x"


@pytest.mark.parametrize("answer", [said("cut", ended=False), said(""), said(" \n")])
def test_an_answer_that_was_cut_or_is_empty_is_no_candidate(answer):
    assert candidate(answer, TOKENIZER) is None


CANDIDATES = [Candidate(text, {"role": "assistant", "content": text}) for text in "abcd"]


def test_a_pair_is_the_best_against_the_worst_and_a_tie_is_none():
    prompt = Conversation(({"role": "system", "content": "s"}, {"role": "user", "content": "q"}), TOOLS)
    record = PAIR.record(prompt, CANDIDATES, np.array([1.0, 3.0, -2.0, 3.0]))
    assert record == {
        "prompt": list(prompt.messages),
        "tools": list(TOOLS),
        "chosen": [{"role": "assistant", "content": "b"}],
        "rejected": [{"role": "assistant", "content": "c"}],
        "score_chosen": 3.0,
        "score_rejected": -2.0,
    }
    assert "tools" not in PAIR.record(PROMPTS[0], CANDIDATES, np.arange(4.0))
    assert PAIR.record(prompt, CANDIDATES, np.ones(4)) == "tie"


def test_the_best_is_a_conversation_to_train_on():
    prompt = Conversation(({"role": "user", "content": "q"},), TOOLS)
    record = BEST.record(prompt, CANDIDATES, np.array([1.0, 3.0, -2.0, 3.0]))
    answered = (*prompt.messages, {"role": "assistant", "content": "b"})
    assert conversations.conversation(record, conversations.detected(record)) == Conversation(answered, TOOLS)
    assert record["score"] == 3.0
    assert BEST.record(prompt, CANDIDATES[:1], np.array([7.0]))["score"] == 7.0


# ---- what is written ----

# Answers to the prompt of each length; those of three and nine letters are a case each.
SAID = {
    1: ["x", "yy", "zzz"],  # z against x
    2: ["x", "x", "yy"],  # y against x
    3: ["x", "x", "x"],  # identical
    4: ["x", "y", "z"],  # a tie
    5: ["", "yy", None],  # one is left
    7: [None, "yy", "x"],  # y against x
    9: [None, None, None],  # all are cut
}


@pytest.fixture
def speaking(monkeypatch):
    """Answers as SAID has them, the longest prompts first, and a list of the rows that were asked."""
    asked = []

    def answered(model, params, prompts, key, *, known=(), **how):
        for row in sorted(range(len(prompts)), key=lambda row: -len(prompts[row])):
            if row not in known:
                asked.append(row)
                text = SAID[len(prompts[row]) - 4][row % 3]
                yield row, said("cu" if text is None else text, ended=text is not None)

    monkeypatch.setattr(labelling, "answered", answered)
    return asked


def label(path, judge=None, **how):
    return write(path, PROMPTS, None, None, TOKENIZER, judge or by_score(by_length), **HOW | how)


def written(path):
    return {record.pop("task"): record for record in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def test_every_prompt_gives_a_pair_or_is_counted_with_the_reason(speaking, tmp_path):
    labels = label(tmp_path / "out.jsonl", choice=PAIR)
    assert labels.counts == {"written": 3, "identical": 1, "tie": 1, "cut": 2}
    found = written(tmp_path / "out.jsonl")
    assert {n: (r["chosen"][0]["content"], r["rejected"][0]["content"]) for n, r in found.items()} == {
        2: ("zzz", "x"),
        4: ("yy", "x"),
        5: ("yy", "x"),
    }
    for number, record in found.items():
        assert record["prompt"] == list(PROMPTS[number].messages)
        assert (record["score_chosen"], record["score_rejected"]) == tuple(
            len(record[name][0]["content"]) for name in ("chosen", "rejected")
        )
    dropped = {number: record["dropped"] for number, record in written(tmp_path / "out.jsonl.dropped").items()}
    assert dropped == {0: "identical", 6: "tie", 3: "cut", 1: "cut"}
    # Pairs: 3 of one letter, 1 of two, 3 of four, 1 of seven; of all but the tie's the longer one wins.
    assert labels.report == {"ties": 3 / 8, "longer_wins": 1.0}


def test_the_best_needs_one_answer_alone_and_no_difference(speaking, tmp_path):
    labels = label(tmp_path / "out.jsonl", choice=BEST)
    assert labels.counts == {"written": 6, "cut": 1}
    found = written(tmp_path / "out.jsonl")
    assert {n: r["messages"][-1]["content"] for n, r in found.items()} == {
        0: "x",
        2: "zzz",
        3: "yy",
        4: "yy",
        5: "yy",
        6: "x",
    }


def test_a_judge_without_scores_chooses_by_its_verdicts(speaking, tmp_path):
    def judge(prompts, firsts, seconds):
        wins = np.array([float(len(a) < len(b)) for a, b in zip(firsts, seconds, strict=True)])
        return Judgement(wins, None, {"position_bias": 0.25})

    labels = label(tmp_path / "out.jsonl", judge, choice=PAIR)
    record = written(tmp_path / "out.jsonl")[2]
    assert (record["chosen"][0]["content"], record["rejected"][0]["content"]) == ("x", "zzz")
    assert (record["score_chosen"], record["score_rejected"]) == (1.0, 0.0)
    assert labels.report == {"position_bias": 0.25}


def test_what_the_judge_reports_is_averaged_over_its_pairs_and_kept_for_the_next_call(speaking, tmp_path, monkeypatch):
    monkeypatch.setattr(labelling, "TOGETHER", 2)
    counts = []

    def judge(prompts, firsts, seconds):
        counts.append(len(prompts))
        told = {"bias": float(len(counts)), "seldom": 5.0 if len(counts) == 2 else float("nan")}
        return Judgement(np.arange(len(prompts)) % 2, None, told)

    report = label(tmp_path / "out.jsonl", judge, choice=PAIR).report
    assert len(counts) > 2 and len(set(counts)) > 1
    assert report == {"bias": pytest.approx(np.dot(counts, range(1, len(counts) + 1)) / sum(counts)), "seldom": 5.0}
    assert label(tmp_path / "out.jsonl", judge, choice=PAIR).report == report


@pytest.mark.parametrize("together", [1, 2, 32])
@pytest.mark.parametrize("stop", [0, 1, 3])
def test_work_that_was_interrupted_anywhere_ends_as_if_it_had_not_been(speaking, tmp_path, monkeypatch, together, stop):
    label(tmp_path / "whole.jsonl", choice=PAIR)
    monkeypatch.setattr(labelling, "TOGETHER", together)
    remaining, score = iter(range(stop)), by_score(by_length)

    def interrupted(*given):
        if next(remaining, None) is None:
            raise KeyboardInterrupt
        return score(*given)

    with pytest.raises(KeyboardInterrupt) if together < 32 or not stop else pytest.MonkeyPatch.context():
        label(tmp_path / "out.jsonl", interrupted, choice=PAIR)
    with (tmp_path / "out.jsonl").open("ab") as file:
        file.write(b'{"task": 5, "pro')
    before = {**written_whole(tmp_path / "out.jsonl"), **written(tmp_path / "out.jsonl.dropped")}
    speaking.clear()
    labels = label(tmp_path / "out.jsonl", choice=PAIR)
    assert {row // 3 for row in speaking} == set(range(7)) - set(before)
    assert labels.report["longer_wins"] == 1.0
    for name in ("{}.jsonl", "{}.jsonl.dropped"):
        assert written(tmp_path / name.format("out")) == written(tmp_path / name.format("whole"))
    assert labels.counts == Counter(written=3, identical=1, tie=1, cut=2)


def written_whole(path):
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return {json.loads(line)["task"]: line for line in lines if line.endswith("\n")}


def test_pairs_of_another_making_are_never_mixed_and_a_pair_needs_two_samples(speaking, tmp_path):
    label(tmp_path / "out.jsonl", choice=PAIR)
    with pytest.raises(ValueError, match="made by something else:\n  step: 3 there, 4 here"):
        label(tmp_path / "out.jsonl", choice=PAIR, made_by={"step": 4})
    with pytest.raises(ValueError, match="samples=1 must be at least 2: answers to choose from"):
        label(tmp_path / "new.jsonl", choice=PAIR, samples=1)
    assert sum(label(tmp_path / "one.jsonl", choice=BEST, samples=1).counts.values()) == 7


def test_what_is_judged_is_what_the_model_samples(tiny, built, tmp_path, monkeypatch):
    """Each prompt so many times, as ids that the chat template gives, and no sample of a prompt like the other."""
    model, params = built(tiny(vocab_size=288))
    asked = []

    def ending(*given, **how):
        asked.append(given[2])
        return ((row, Answer([*answer.tokens, END_ID], True)) for row, answer in answered(*given, **how))

    monkeypatch.setattr(labelling, "answered", ending)
    labels = write(tmp_path / "a.jsonl", PROMPTS[:2], model, params, TOKENIZER, by_score(by_length), choice=BEST, **HOW)
    assert labels.counts == {"written": 2}
    (ids,) = asked
    assert ids == [chat.prompt(PROMPTS[n], TOKENIZER) for n in (0, 0, 0, 1, 1, 1)]
    how = {name: HOW[name] for name in ("max_new_tokens", "sampler", "batch_size")} | {"stop_ids": TOKENIZER.stop_ids}
    texts = [TOKENIZER.decode(answer.tokens) for _, answer in answered(model, params, ids, jax.random.key(0), **how)]
    assert len(set(texts)) == 6
    longest = {max(texts[:3], key=len), max(texts[3:], key=len)}
    assert {record["messages"][-1]["content"] for record in written(tmp_path / "a.jsonl").values()} == longest
