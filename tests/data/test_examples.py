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


@pytest.mark.parametrize("format, good", [("auto", "response"), ("preference", "chosen")])
def test_a_bad_first_record_is_skipped_where_the_format_is_detected(tmp_path, format, good):
    records = [{"prompt": f"question {i}", good: f"answer {i}", "rejected": "no"} for i in range(20)]
    for bad, reason in (("{\n", "not_json"), ('{"text": "a"}\n', "no_field")):
        source = resolved(source_of(tmp_path, [bad, *records], format=format, on_error="skip"))
        assert source.format == {"auto": "prompt_response", "preference": "pairs"}[format]
        assert {label: len(some) for label, some in sides(source, validation=0).items()} == {TRAIN: 20, reason: 1}
        with pytest.raises(ValueError, match="a.jsonl, line 1: "):
            resolved(source_of(tmp_path, [bad, *records], format=format))
    with pytest.raises(ValueError, match=r"a.jsonl, line 1: \['a'\] are the fields of no"):
        resolved(source_of(tmp_path, [{"a": 1}, {"b": 1}], format=format, on_error="skip"))


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
    with pytest.raises(ValueError, match=f"a.jsonl, line 3: {message}.*; or leave such records out, .*on_error=.skip"):
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
    for number in (float("nan"), 10**400):
        with pytest.raises(ValueError, match="line 1: field 'kind' is NaN, or too large for a float, and has no rank"):
            record = {"prompt": "a", "response": "b", "kind": number}
            sides(source_of(tmp_path, [record], select="lowest", keep=3, score_field="kind"))


def test_a_text_is_its_own_key_and_a_tag_may_lie_beside_it(tmp_path):
    source = source_of(tmp_path, [{"text": "a", "kind": "x"}], format="text", tag="kind")
    ((label, example),) = labelled(source, DataConfig(sources={"a": source}))
    assert (example.content, example.text, example.task, example.key) == ("a", "a", "x", examples.content_key("a"))
    assert label == TRAIN and example.read == np.int64((tmp_path / "a.jsonl").stat().st_size)


# ---- preferences ----


def pairs_of(count):
    return [
        {"prompt": f"question {i // 5}", "chosen": f"good {i}", "rejected": f"bad {i}", "kind": str(i % 3)}
        for i in range(count)
    ]


def preferences_of(tmp_path, records, **fields):
    return source_of(tmp_path, records, **{"format": "preference", **fields})


def said(messages):
    return messages[-1]["content"] if messages else None


def answers_of(found):
    return [(said(example.content.prompt.messages), said(example.content.first), said(example.content.second))
            for example in found]  # fmt: skip


def test_the_format_of_preferences_is_asked_of_the_first_record(tmp_path):
    assert resolved(preferences_of(tmp_path, pairs_of(1))).format == "pairs"
    thumbs = [{"prompt": "a", "completion": "b", "label": True}]
    assert resolved(preferences_of(tmp_path, thumbs)).format == "thumbs"
    assert resolved(preferences_of(tmp_path, thumbs, format="pairs")).format == "pairs"
    with pytest.raises(ValueError, match=r"a.jsonl, line 1: \['text'\] are the fields of no preference"):
        resolved(preferences_of(tmp_path, [{"text": "a"}]))


def test_preferences_lie_on_the_side_on_which_conversations_with_their_prompt_lie(tmp_path):
    chats = sides(source_of(tmp_path, records_of(500)))
    found = sides(preferences_of(tmp_path, pairs_of(500), format="pairs"))
    for side in (TRAIN, VALIDATION):
        assert {prompt for prompt, _, _ in answers_of(found[side])} == first_messages(chats[side])
    assert len(found[TRAIN]) + len(found[VALIDATION]) == 500
    expected = [(record["prompt"], record["chosen"], record["rejected"]) for record in pairs_of(500)]
    assert sorted(answers_of(found[TRAIN] + found[VALIDATION])) == sorted(expected)


def test_a_dialogue_lies_on_the_side_of_its_first_question(tmp_path):
    records = [
        {"chosen": f"\n\nHuman: {i // 4}\n\nAssistant: {i}\n\nHuman: more\n\nAssistant: a",
         "rejected": f"\n\nHuman: {i // 4}\n\nAssistant: {i}\n\nHuman: more\n\nAssistant: b"}
        for i in range(200)
    ]  # fmt: skip
    found = sides(preferences_of(tmp_path, records, format="pairs"))
    first = {side: {each.content.prompt.messages[0]["content"] for each in found[side]} for side in (TRAIN, VALIDATION)}
    assert not first[TRAIN] & first[VALIDATION] and len(first[TRAIN]) + len(first[VALIDATION]) == 50


def test_held_out_prompts_are_kept_out_of_the_training_preferences(tmp_path):
    (tmp_path / "held.jsonl").write_text(json.dumps({"prompt": "question 3", "chosen": "yes", "rejected": "no"}))
    path = str(tmp_path / "held.jsonl")
    for answers, count in (("paired", 1), ("chosen", 1)):
        found = sides(preferences_of(tmp_path, pairs_of(50), format="pairs", answers=answers, validation_path=path))
        assert len(found[VALIDATION]) == count
        assert len(found["in_validation"]) == 5 * count and len(found[TRAIN]) == 45 * count


def test_a_record_of_several_answers_gives_a_preference_of_each_two(tmp_path):
    records = [{"prompt": "q", "responses": ["a", "b", "c"], "scores": [3, 1, 3], "kind": "x"}]
    found = sides(preferences_of(tmp_path, records, format="scored", tag="kind"), validation=0.0)
    assert answers_of(found[TRAIN]) == [("q", "a", "b"), ("q", "c", "b")]
    assert [example.task for example in found[TRAIN]] == ["x", "x"]
    assert len({example.key for some in found.values() for example in some}) == 1
    assert [example.dropped for example in found["tie"]] == ["tie"]
    best = sides(preferences_of(tmp_path, records, format="scored", pairs="best_worst"), validation=0.0)
    assert answers_of(best[TRAIN]) == [("q", "a", "b")]


def test_what_cannot_be_learned_from_is_dropped_and_counted_and_what_is_malformed_an_error(tmp_path):
    flaws = [
        {"prompt": "q", "chosen": "a", "rejected": "b", "tie": True},
        {"prompt": "q", "chosen": "a", "rejected": "a"},
        {"prompt": "q", "chosen": "a", "rejected": ""},
    ]
    for answers, per_pair in (("paired", 1), ("alone", 2), ("chosen", 1)):
        source = preferences_of(tmp_path, [*pairs_of(20), *flaws], format="pairs", answers=answers)
        found = sides(source, validation=0.0)
        assert {label: len(some) for label, some in found.items()} == {
            TRAIN: 20 * per_pair, "tie": 1, "identical": 1, "empty_answer": 1,
        }  # fmt: skip
    bad = [*pairs_of(2), {"prompt": "q", "chosen": "a"}]
    with pytest.raises(ValueError, match="a.jsonl, line 3: no field 'rejected'"):
        sides(preferences_of(tmp_path, bad, format="pairs"))
    found = sides(preferences_of(tmp_path, bad, format="pairs", on_error="skip"), validation=0.0)
    assert {label: len(some) for label, some in found.items()} == {TRAIN: 2, "no_field": 1}


def test_chosen_answers_alone_are_conversations(tmp_path):
    records = [*pairs_of(5), {"prompt": "q", "chosen": "a", "rejected": "b", "system": "s"}]
    found = sides(preferences_of(tmp_path, records, format="pairs", answers="chosen"), validation=0.0)
    assert all(isinstance(example.content, Conversation) for example in found[TRAIN])
    assert [said(example.content.messages) for example in found[TRAIN]] == [*(f"good {i}" for i in range(5)), "a"]
    assert [each["role"] for each in found[TRAIN][-1].content.messages] == ["system", "user", "assistant"]
    thumbs = [{"prompt": "q", "completion": "a", "label": label} for label in (True, False)]
    found = sides(preferences_of(tmp_path, thumbs, format="thumbs", answers="chosen"), validation=0.0)
    assert {label: len(some) for label, some in found.items()} == {TRAIN: 1, "no_chosen": 1}


# ---- answers alone, each beside an answer to another prompt ----


def number(answer):
    return int(answer.split()[1])


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_each_answer_alone_lies_beside_one_to_another_prompt_of_its_side(tmp_path, share):
    source = preferences_of(tmp_path, pairs_of(200), format="pairs", answers="alone")
    found = sides(source, validation=share)
    assert set(found) == ({TRAIN, VALIDATION} if share else {TRAIN})
    first_seen = []
    for some in found.values():
        own = {first for _, first, _ in answers_of(some)}
        for example, (prompt, first, second) in zip(some, answers_of(some), strict=True):
            assert prompt == f"question {number(first) // 5}" != f"question {number(second) // 5}" and second in own
            assert example.content.scores[0] == first.startswith("good") and np.isnan(example.content.scores[1])
            assert first.split()[0] == second.split()[0]  # liked ones as often as they are liked
        given = [second for _, _, second in answers_of(some)]
        assert all(given.count(second) <= 2 for second in given)  # the first and the third prompt share the second's
        first_seen += own
    assert sorted(first_seen) == sorted(record[name] for record in pairs_of(200) for name in ("chosen", "rejected"))


def test_answers_to_a_prompt_get_those_to_the_one_before_in_their_order(tmp_path):
    counts = {"a": 2, "b": 3, "c": 1, "d": 2}
    records = [{"prompt": p, "completion": f"{p}{i}", "label": True} for p, n in counts.items() for i in range(n)]
    found = sides(preferences_of(tmp_path, records, format="thumbs", answers="alone"), validation=0.0)[TRAIN]
    assert [(first, second) for _, first, second in answers_of(found)] == [
        ("a0", "b0"), ("a1", "b1"), ("b0", "a0"), ("b1", "a1"), ("b2", "a0"), ("c0", "b0"), ("d0", "c0"), ("d1", "c0"),
    ]  # fmt: skip


def test_a_side_with_a_single_prompt_has_no_other_answers(tmp_path):
    records = [{"prompt": "q", "completion": str(i), "label": True} for i in range(3)]
    found = sides(preferences_of(tmp_path, records, format="thumbs", answers="alone"), validation=0.0)
    assert [(example.dropped, example.content.second) for example in found["no_other_prompt"]] == [
        ("no_other_prompt", ())
    ] * 3


def test_an_answer_with_a_score_alone_is_neither_liked_nor_disliked(tmp_path):
    records = [{"prompt": str(i), "response": "a", "score": i} for i in range(3)]
    for answers, label in (("paired", TRAIN), ("chosen", TRAIN), ("alone", "no_verdict")):
        found = sides(preferences_of(tmp_path, records, format="scored", answers=answers), validation=0.0)
        assert {name: len(some) for name, some in found.items()} == {label: 3}


def test_what_the_training_leaves_out_is_not_given_to_others(tmp_path):
    (tmp_path / "held.jsonl").write_text(
        "".join(json.dumps({"prompt": p, "chosen": f"held {p}", "rejected": "no"}) + "\n" for p in ("question 3", "x"))
    )
    path = str(tmp_path / "held.jsonl")
    flawed = {"prompt": "flawed", "chosen": "same", "rejected": "same"}
    records = [*pairs_of(20), flawed, *pairs_of(40)[20:]]
    found = sides(preferences_of(tmp_path, records, format="pairs", answers="alone", validation_path=path))
    assert len(found["in_validation"]) == 10 and len(found["identical"]) == 1
    given = {second for _, _, second in answers_of(found[TRAIN])}
    assert not given & {"same", "no", *(f"{kind} {i}" for kind in ("good", "bad") for i in range(15, 20))}
    assert {second for _, _, second in answers_of(found[VALIDATION])} == {"held x", "held question 3", "no"}


def test_the_text_of_a_unit_is_that_of_both_its_documents(tmp_path):
    (example,) = sides(preferences_of(tmp_path, pairs_of(1), format="pairs"), validation=0.0)[TRAIN]
    assert example.text == "question 0\ngood 0\nquestion 0\nbad 0"
