import json

import numpy as np
import pytest

from jaxllm.data import examples
from jaxllm.data.config import DataConfig, SourceConfig
from jaxllm.data.examples import TRAIN, VALIDATION, labelled, resolved
from jaxllm.text.chat import Conversation


def records_of(count):
    """Five different answers to each question: the prompt, not the record, decides the side."""
    return [{"prompt": f"question {i // 5}", "response": f"answer {i}", "kind": i % 3} for i in range(count)]


def source_of(tmp_path, records, **fields):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(record if isinstance(record, str) else json.dumps(record) + "\n" for record in records))
    return SourceConfig(str(path), **{"format": "prompt_response", **fields})


def sides(source, **fields):
    config = DataConfig(sources={"a": source}, **{"packing": "best_fit_whole", "validation": 0.3, **fields})
    found = {}
    for label, example in labelled(source, config):
        found.setdefault(label, []).append(example)
    return found


def first_messages(found):
    return {example.content.messages[0]["content"] for example in found}


def test_a_prompt_never_lies_on_both_sides_whatever_its_answers(tmp_path):
    found = sides(source_of(tmp_path, records_of(500)))
    asked, held_out = first_messages(found[TRAIN]), first_messages(found[VALIDATION])
    assert not asked & held_out and len(asked) + len(held_out) == 100
    assert len(found[VALIDATION]) == 5 * len(held_out) and 15 < len(held_out) < 45


def test_the_whole_prompt_decides_the_side_with_its_system_message_and_tools(tmp_path):
    def prompt(**more):
        return {"messages": [{"role": "system", "content": more.pop("system", "")}, {"role": "user", "content": "a"},
                             {"role": "assistant", "content": "b"}], **more}  # fmt: skip

    records = [prompt(system=str(i)) for i in range(50)] + [prompt(tools=[{"name": str(i)}]) for i in range(50)]
    found = sides(source_of(tmp_path, records, format="messages"))
    assert 10 < len(found[VALIDATION]) < 50
    keys = [example.key for some in found.values() for example in some]
    assert len(set(keys)) == 100


def test_conversations_that_begin_with_an_answer_are_told_apart_by_all_of_it(tmp_path):
    records = [{"messages": [{"role": "assistant", "content": str(i)}]} for i in range(100)]
    found = sides(source_of(tmp_path, records, format="messages"))
    assert 10 < len(found[VALIDATION]) < 50


def test_a_held_out_file_keeps_its_prompts_out_of_the_training(tmp_path):
    (tmp_path / "held.jsonl").write_text(json.dumps({"prompt": "question 3", "response": "another answer"}))
    found = sides(source_of(tmp_path, records_of(50), validation_path=str(tmp_path / "held.jsonl")))
    assert first_messages(found[VALIDATION]) == {"question 3"} and len(found[VALIDATION]) == 1
    assert len(found["in_validation"]) == 5 and len(found[TRAIN]) == 45


def test_response_tuning_takes_the_prompts_from_the_training_and_leaves_the_held_out_whole(tmp_path):
    whole, tuned = (sides(source_of(tmp_path, records_of(100), response_only=only)) for only in (False, True))
    assert tuned[VALIDATION] == whole[VALIDATION]
    assert [example.key for example in tuned[TRAIN]] == [example.key for example in whole[TRAIN]]
    assert [example.content for example in tuned[TRAIN]] == [
        Conversation(example.content.messages[1:]) for example in whole[TRAIN]
    ]


def test_auto_asks_the_first_record_and_any_other_format_stays(tmp_path):
    source = source_of(tmp_path, records_of(3), format="auto")
    assert resolved(source).format == "prompt_response"
    assert resolved(source_of(tmp_path, records_of(3), format="alpaca")).format == "alpaca"
    with pytest.raises(ValueError, match=r"a.jsonl, line 1: \['text'\] are the fields of no format"):
        resolved(source_of(tmp_path, [{"text": "a"}], format="auto"))


BAD = ["{\n", '{"prompt": "a"}\n', '{"prompt": "a", "response": ""}\n', "[]\n", '{"prompt": "a", "response": " "}\n']


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (BAD[0], "not JSON"),
        (BAD[1], "no field 'response'"),
        (BAD[2], r"message 2 \(assistant\) says nothing"),
        (BAD[3], "list is not an object with named fields"),
        (BAD[4], "message 2"),
    ],
)
def test_a_bad_record_is_an_error_with_its_file_and_line(tmp_path, bad, message):
    with pytest.raises(ValueError, match=f"a.jsonl, line 3: {message}"):
        sides(source_of(tmp_path, [*records_of(2), bad, *records_of(2)]))


def test_bad_records_are_skipped_and_counted_by_reason_on_request(tmp_path):
    found = sides(source_of(tmp_path, [*records_of(50), *BAD], on_error="skip"))
    kept = len(found.pop(TRAIN)) + len(found.pop(VALIDATION))
    assert kept == 50
    assert {reason: len(some) for reason, some in found.items()} == {
        "not_json": 1, "no_field": 1, "empty_answer": 2, "not_an_object": 1,
    }  # fmt: skip


def test_bad_texts_are_skipped_too(tmp_path):
    found = sides(source_of(tmp_path, [{"text": "a"}, {"text": 1}, {"text": ""}], format="text", on_error="skip"))
    assert {label: len(some) for label, some in found.items()} == {TRAIN: 1, "not_text": 1, "empty": 1}


def test_a_tag_and_a_score_are_read_from_the_record(tmp_path):
    source = source_of(tmp_path, records_of(9), tag="kind", select="highest", keep=3, score_field="kind")
    found = [example for some in sides(source).values() for example in some]
    assert sorted((example.task, example.score) for example in found) == sorted((str(i % 3), i % 3) for i in range(9))
    for fields in (dict(tag="prose"), dict(select="lowest", keep=3, score_field="prompt")):
        name = fields.get("tag") or fields["score_field"]
        with pytest.raises(ValueError, match=f"a.jsonl, line 1: field '{name}' holds .*, not .*; add it, or mend it"):
            sides(source_of(tmp_path, records_of(9), **fields))
    with pytest.raises(ValueError, match="line 1: field 'kind' is NaN"):
        nan = {"prompt": "a", "response": "b", "kind": float("nan")}
        sides(source_of(tmp_path, [nan], select="lowest", keep=3, score_field="kind"))


def test_a_text_is_its_own_key_and_a_tag_may_lie_beside_it(tmp_path):
    source = source_of(tmp_path, [{"text": "a", "kind": "x"}], format="text", tag="kind")
    ((label, example),) = labelled(source, DataConfig(sources={"a": source}))
    assert (example.content, example.text, example.task, example.key) == ("a", "a", "x", examples.content_key("a"))
    assert label == TRAIN and example.read == np.int64((tmp_path / "a.jsonl").stat().st_size)
