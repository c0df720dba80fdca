import json

import pytest

from jaxllm.evaluate.questions import held_out, held_out_answers, of_file
from jaxllm.text.chat import Conversation


def message(role, content):
    return {"role": role, "content": content}


def asked(*contents):
    return Conversation(tuple(message("user", content) for content in contents))


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def config(path, format="auto", **data):
    source = dict(path=path, format=format, packing="best_fit_whole")
    known = dict(
        stage_steps=[0], validation=0.3, split="document", sequence_length=64, packing="concatenated", cache="",
        workers=0, prefetch=4, shuffle_seed=0,
    )  # fmt: skip
    replay = {"text": {"path": "embedded"}} if format == "auto" else {}
    return {"data": known | data | {"sources": replay | {"chat": source}}}


# ---- of a file ----


def test_lines_of_a_text_file_are_questions(tmp_path):
    (tmp_path / "a.txt").write_text("Où?\n\n  \nWhat?\nOù?\n", encoding="utf-8")
    assert of_file(str(tmp_path / "a.txt")) == [asked("Où?"), asked("What?")]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "a", "response": "b"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "completion": "b", "label": True},
        {"prompt": "a", "responses": ["b", "c"], "scores": [1, 2]},
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
        {"instruction": "a", "output": "b"},
        {"messages": [message("user", "a"), message("assistant", "b")]},
        {"messages": [message("user", "a")]},
        {"prompt": "a"},
        {"prompt": [message("user", "a")], "id": 3},
    ],
)
def test_records_of_every_format_are_asked_up_to_their_answer(tmp_path, record):
    assert of_file(jsonl(tmp_path / "a.jsonl", [record])) == [asked("a")]


def test_a_conversation_is_asked_up_to_its_last_answer_and_a_prompt_once(tmp_path):
    turns = [message("user", "a"), message("assistant", "b"), message("user", "c"), message("assistant", "d")]
    found = of_file(
        jsonl(tmp_path / "a.jsonl", [{"messages": turns}, {"messages": turns[:3]}, {"messages": turns[:2]}])
    )
    assert found == [Conversation(tuple(turns[:3])), asked("a")]


def test_a_record_that_asks_nothing_is_refused_with_its_place(tmp_path):
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: \['text'\] are the fields of no format"):
        of_file(jsonl(tmp_path / "a.jsonl", [{"prompt": "a"}, {"text": "b"}]))
    (tmp_path / "b.txt").write_text(" \n \n")
    with pytest.raises(ValueError, match="b.txt holds no question: write one on each line, or give conversations"):
        of_file(str(tmp_path / "b.txt"))


# ---- held out ----


@pytest.fixture
def chats(tmp_path):
    records = [{"prompt": f"question {number}", "response": "b"} for number in range(60)]
    return jsonl(tmp_path / "chat.jsonl", records)


@pytest.fixture
def pairs(tmp_path):
    records = [
        {"prompt": f"question {number}", "chosen": "b", "rejected": f"c{i}"} for number in range(60) for i in (1, 2)
    ]
    return jsonl(tmp_path / "pairs.jsonl", records)


def test_what_a_run_holds_out_of_conversations_it_holds_out_of_preferences_too(chats, pairs):
    found = held_out([config(chats)])
    assert 8 < len(found) < 30 and len({repr(each) for each in found}) == len(found)
    assert found == held_out([config(pairs, "preference")]) == held_out([config(pairs, "preference"), config(chats)])
    more = held_out([config(chats, validation=0.6)])
    assert len(more) > len(found) and [each for each in more if each in found] == found


def test_what_another_run_was_trained_on_is_not_asked(chats, pairs, tmp_path):
    some, more = config(chats), config(pairs, "preference", validation=0.6)
    assert held_out([more, some]) == held_out([some]) == held_out([some, more])
    other = jsonl(tmp_path / "other.jsonl", [{"prompt": f"other {number}", "response": "b"} for number in range(60)])
    assert held_out([some, config(other)]) == held_out([some]) != held_out([config(other), some])
    with pytest.raises(
        ValueError, match=r"of 0 prompts that the first run holds out .* hold out some \(data.validation\)"
    ):
        held_out([config(chats, validation=0.0)])
    with pytest.raises(ValueError, match=r"of \d\d prompts .* the others were trained on all"):
        held_out([some, config(chats, validation=0.0)])


def test_the_order_is_not_that_of_the_file(chats):
    numbers = [int(each.messages[0]["content"].split()[1]) for each in held_out([config(chats)])]
    assert numbers != sorted(numbers)


def test_what_is_held_out_comes_with_the_answer_that_the_data_give(chats, pairs):
    for given in (config(chats), config(pairs, "preference")):
        found = held_out_answers(given)
        assert [prompt for prompt, _ in found] == held_out([given]) and {answer for _, answer in found} == {"b"}
