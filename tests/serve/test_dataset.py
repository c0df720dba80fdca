import json

import jax
import jax.numpy as jnp
import pytest

from jaxllm.data import conversations
from jaxllm.evaluate.answers import Answer, answers
from jaxllm.generate import SamplerConfig
from jaxllm.serve import dataset
from jaxllm.serve.dataset import Task, prefixes, questions, write
from jaxllm.text import chat
from jaxllm.text.chat import Conversation
from jaxllm.text.special_tokens import BOS_ID, END_ID, EOS_ID, IDS
from jaxllm.text.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
HOW = dict(max_new_tokens=6, sampler=SamplerConfig(), stop_ids=(END_ID, EOS_ID), batch_size=3, seed=0)
MADE_BY = {"step": 3, "prompts": "a.jsonl"}
TOOLS = ({"name": "add", "parameters": {}},)


def message(role, content):
    return {"role": role, "content": content}


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def spelled(tasks):
    return [TOKENIZER.decode(task.prompt) for task in tasks]


# ---- what is asked ----


def test_a_conversation_asks_up_to_its_last_answer_and_one_without_an_answer_asks_all_of_it(tmp_path):
    turns = [message("system", "s"), message("user", "a"), message("assistant", "b"), message("user", "c")]
    records = [
        {"messages": [*turns, message("assistant", "d")], "tools": TOOLS},
        {"messages": turns},
        {"messages": [message("user", "<|end|>")]},
    ]
    path = jsonl(tmp_path / "a.jsonl", records)
    tasks = questions(path, TOKENIZER)
    expected = [
        Conversation(tuple(turns), TOOLS),
        Conversation((turns[0], turns[1])),
        Conversation((records[2]["messages"][0],)),
    ]
    assert [task.prompt for task in tasks] == [chat.prompt(conversation, TOKENIZER) for conversation in expected]
    assert spelled(questions(path, TOKENIZER, limit=2)) == spelled(tasks)[:2]


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "a", "input": "b", "output": "c"},
        {"conversations": [{"from": "human", "value": "a\n\nb"}, {"from": "gpt", "value": "c"}]},
        {"prompt": "a\n\nb", "completion": "c"},
    ],
)
def test_every_format_of_conversations_is_asked(tmp_path, record):
    assert spelled(questions(jsonl(tmp_path / "a.jsonl", [record]), TOKENIZER)) == [
        "<|bos|><|user|>a\n\nb<|end|><|assistant|>"
    ]


def test_an_answer_becomes_the_last_message_of_its_conversation_as_training_reads_it(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"messages": [message("user", "é")], "tools": TOOLS}])
    (task,) = questions(path, TOKENIZER)
    call = '{"name": "add", "arguments": {}}'
    ids = [
        IDS["<think>"],
        *TOKENIZER.encode("hm"),
        IDS["</think>"],
        IDS["<|tool_call|>"],
        *TOKENIZER.encode(call),
        END_ID,
    ]
    record = task.record(Answer(ids, True))
    (rendered,) = chat.render([conversations.conversation(json.loads(json.dumps(record)), "messages")], TOKENIZER)
    assert rendered.tokens.tolist() == [*task.prompt, *ids]
    assert record["messages"][0] == message("user", "é") and len(record["messages"]) == 2


def test_answers_that_were_cut_or_say_nothing_are_left_out_with_the_reason(tmp_path):
    (task,) = questions(jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "response": "b"}]), TOKENIZER)
    assert task.record(Answer(TOKENIZER.encode("so"), False)) == "cut"
    assert (
        task.record(Answer([*TOKENIZER.encode(" \n"), END_ID], True)) == task.record(Answer([EOS_ID], True)) == "empty"
    )


def test_texts_are_continued_from_their_first_tokens_and_short_ones_are_not_asked(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"body": "abcdef"}, {"body": "abc"}, {"body": "abcd"}, {"body": "x" * 9}])
    tasks = prefixes(path, TOKENIZER, field="body", length=3, limit=2)
    assert [task.prompt for task in tasks] == [[BOS_ID, *TOKENIZER.encode("abc")]] * 2
    more = TOKENIZER.encode("!é")
    for answer in (Answer([*more, EOS_ID], True), Answer(more, False)):
        assert tasks[0].record(answer) == {"text": "abc!é"}


def test_what_cannot_be_asked_is_refused(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"messages": [message("user", "a")]}, {"messages": [message("king", "a")]}])
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: message 1 has role 'king'"):
        questions(path, TOKENIZER)
    texts = jsonl(tmp_path / "b.jsonl", [{"text": "a"}])
    with pytest.raises(
        ValueError, match="b.jsonl holds nothing to ask: give a source with conversations, or with longer"
    ):
        prefixes(texts, TOKENIZER)
    with pytest.raises(ValueError, match="prefix_tokens=0 must be at least 1"):
        prefixes(texts, TOKENIZER, length=0)


# ---- what is written ----


@pytest.fixture(scope="module")
def teacher(tiny, built):
    model, params = built(tiny(vocab_size=288))
    return model, jax.tree.map(jnp.asarray, params)


def record_of(answer):
    """Leaves out answers with an even first token, so that there are some of both kinds."""
    return "even" if answer.tokens[0] % 2 == 0 else {"text": TOKENIZER.decode(answer.tokens)}


TASKS = [Task([BOS_ID, *range(40, 40 + length)], record_of) for length in (3, 9, 1, 5, 2, 7, 4)]


def written(path):
    return {record["task"]: record for record in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "new" / "out.jsonl"
    return path, write(path, TASKS, *teacher, made_by=MADE_BY, **HOW)


def test_every_answer_is_written_or_counted_with_the_reason(teacher, whole):
    path, counts = whole
    how = {name: value for name, value in HOW.items() if name != "seed"}
    found = answers(*teacher, [task.prompt for task in TASKS], jax.random.key(0), **how)
    records = [record_of(answer) for answer in found]
    kept = {number: {"task": number, **record} for number, record in enumerate(records) if record != "even"}
    assert written(path) == kept and 0 < len(kept) < 7
    dropped = written(path.with_name("out.jsonl.dropped"))
    assert dropped == {number: {"task": number, "dropped": "even"} for number in set(range(7)) - set(kept)}
    assert counts == {"written": len(kept), "even": 7 - len(kept)}


@pytest.mark.parametrize("stop", [0, 1, 2, 4])
@pytest.mark.parametrize("cut", [0, 5])
def test_work_that_was_interrupted_anywhere_ends_as_if_it_had_not_been(teacher, whole, tmp_path, stop, cut):
    path, remaining = tmp_path / "out.jsonl", iter(range(stop))
    names = ("out.jsonl", "out.jsonl.dropped")

    def interrupted(answer):
        if next(remaining, None) is None:
            # What was answered before lies on the disk already, should this be a kill.
            assert sum((tmp_path / name).read_text().count("\n") for name in names) == stop
            raise KeyboardInterrupt
        return record_of(answer)

    with pytest.raises(KeyboardInterrupt):
        write(path, [task._replace(record=interrupted) for task in TASKS], *teacher, made_by=MADE_BY, **HOW)
    for name in names:
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) - cut])
    assert write(path, TASKS, *teacher, made_by=MADE_BY, **HOW) == whole[1]
    for name in names:
        assert written(tmp_path / name) == written(whole[0].with_name(name))
        assert len(written(tmp_path / name)) == (tmp_path / name).read_text().count("\n")


def test_finished_work_samples_nothing(teacher, whole, monkeypatch):
    path, counts = whole
    monkeypatch.setattr(dataset, "answered", lambda *given, known, **how: iter(known ^ set(range(7))))
    before = path.read_bytes()
    assert write(path, TASKS, *teacher, made_by=MADE_BY, **HOW) == counts
    assert path.read_bytes() == before


def test_another_seed_gives_other_answers(teacher, whole, tmp_path):
    write(tmp_path / "out.jsonl", TASKS, *teacher, made_by=MADE_BY, **HOW | dict(seed=1))
    assert written(tmp_path / "out.jsonl") != written(whole[0])


def test_answers_of_another_making_are_never_mixed(teacher, whole, tmp_path):
    path, _ = whole
    with pytest.raises(ValueError, match=r"made by something else:\n  step: 3 there, 4 here\nUse another --out"):
        write(path, TASKS, *teacher, made_by=MADE_BY | {"step": 4}, **HOW)
    other = tmp_path / "mine.jsonl"
    other.write_text("precious\n")
    with pytest.raises(
        ValueError, match="mine.jsonl exists and nothing beside it says what made it; use another --out"
    ):
        write(other, TASKS, *teacher, made_by=MADE_BY, **HOW)
    assert other.read_text() == "precious\n"
