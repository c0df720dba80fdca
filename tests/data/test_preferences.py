import math

import pytest

from jaxllm.data.preferences import FORMATS, PAIRS, Preference, detected, preferences
from jaxllm.text.chat import Conversation, Malformed


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


ASKED, SYSTEM = Conversation((user("2 + 2?"),)), {"role": "system", "content": "Be brief"}
GOOD, BAD = (said("4"),), (said("5"),)
TOOLS = [{"name": "add"}]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {}}]}
FOUND = {"role": "tool", "content": "4"}
LONG = Conversation((user("Hi"), said("Hello\n\nyou"), user("2 + 2?")))
HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nyou\n\nHuman: 2 + 2?\n\nAssistant: "

CASES = {
    "texts": (
        "pairs",
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "source": "x"},
        [Preference(ASKED, GOOD, BAD)],
    ),
    "all that may be known": (
        "pairs",
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "margin": 3, "score_chosen": 5, "score_rejected": 1.5,
         "annotator": 7, "tie": False, "system": "Be brief"},
        [Preference(Conversation((SYSTEM, *ASKED.messages)), GOOD, BAD, 3.0, 5.0, 1.5, "7")],
    ),
    "a margin that is the difference of the scores": (
        "pairs",
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "chosen_rating": 4, "rejected_rating": 1.5},
        [Preference(ASKED, GOOD, BAD, 2.5, 4.0, 1.5)],
    ),
    "a score that only one has": (
        "pairs",
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "chosen_score": 4, "rejected_score": None},
        [Preference(ASKED, GOOD, BAD, 0.0, 4.0)],
    ),
    "a tie": (
        "pairs",
        {"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "tie": True, "annotator": "Ada"},
        [Preference(ASKED, GOOD, BAD, annotator="Ada", tie=True)],
    ),
    "messages and tools": (
        "pairs",
        {"prompt": [SYSTEM, user("2 + 2?")], "chosen": [CALL, FOUND, *GOOD], "rejected": [*BAD], "tools": TOOLS},
        [Preference(Conversation((SYSTEM, user("2 + 2?")), tuple(TOOLS)), (CALL, FOUND, *GOOD), BAD)],
    ),
    "transcripts as messages, as UltraFeedback has them": (
        "pairs",
        {"prompt": "2 + 2?", "messages": [user("2 + 2?"), *GOOD], "chosen": [user("2 + 2?"), *GOOD],
         "rejected": [user("2 + 2?"), *BAD], "score_chosen": 8.0, "score_rejected": 6.0},
        [Preference(ASKED, GOOD, BAD, 2.0, 8.0, 6.0)],
    ),
    "transcripts without a prompt, with tools and a system message": (
        "pairs",
        {"chosen": [*LONG.messages, CALL, FOUND, *GOOD], "rejected": [*LONG.messages, CALL, FOUND, *BAD],
         "tools": TOOLS, "system": "Be brief"},
        [Preference(Conversation((SYSTEM, *LONG.messages, CALL, FOUND), tuple(TOOLS)), GOOD, BAD)],
    ),
    "transcripts in which the assistant speaks twice, and differently the second time": (
        "pairs",
        {"chosen": [user("2 + 2?"), said("Well"), *GOOD], "rejected": [user("2 + 2?"), said("Well"), *BAD]},
        [Preference(ASKED, (said("Well"), *GOOD), (said("Well"), *BAD))],
    ),
    "an instruction with an input": (
        "pairs",
        {"instruction": "Add", "input": "2 and 2", "output": "4", "chosen": "4", "rejected": "5"},
        [Preference(Conversation((user("Add\n\n2 and 2"),)), GOOD, BAD)],
    ),
    "transcripts as texts, as HH-RLHF has them": (
        "pairs",
        {"chosen": HH + "4", "rejected": HH + "5\n"},
        [Preference(LONG, GOOD, BAD)],
    ),
    "a transcript with two turns of the assistant in a row": (
        "pairs",
        {"chosen": HH + "Wait\n\nAssistant: 4", "rejected": HH + "5"},
        [Preference(LONG, (said("Wait\n\n4"),), BAD)],
    ),
    "a transcript as the prompt": (
        "pairs",
        {"prompt": HH, "chosen": "4", "rejected": "5"},
        [Preference(LONG, GOOD, BAD)],
    ),
    "an answer that speaks of speakers": (
        "pairs",
        {"prompt": "2 + 2?", "chosen": "4\n\nHuman: ha", "rejected": "Assistant: 5"},
        [Preference(ASKED, (said("4\n\nHuman: ha"),), (said("Assistant: 5"),))],
    ),
    "answers with scores beside them": (
        "scored",
        {"prompt": "2 + 2?", "responses": ["5", "4", "four"], "scores": [1, 5, 4]},
        [
            Preference(ASKED, GOOD, BAD, 4.0, 5.0, 1.0),
            Preference(ASKED, (said("four"),), BAD, 3.0, 4.0, 1.0),
            Preference(ASKED, GOOD, (said("four"),), 1.0, 5.0, 4.0),
        ],
    ),
    "answers with scores inside them": (
        "scored",
        {"messages": [user("2 + 2?")], "completions": [{"text": "4", "score": 2}, {"content": "5", "rating": 2.0}]},
        [Preference(ASKED, GOOD, BAD, 0.0, 2.0, 2.0, tie=True)],
    ),
    "an answer with a score": (
        "scored",
        {"instruction": "2 + 2?", "response": "4", "score": 5, "annotator": "Ada"},
        [Preference(ASKED, GOOD, chosen_score=5.0, annotator="Ada")],
    ),
    "a thumb up": (
        "thumbs",
        {"prompt": [user("2 + 2?")], "completion": [*GOOD], "label": True},
        [Preference(ASKED, GOOD, chosen_score=1.0)],
    ),
    "a thumb down": (
        "thumbs",
        {"question": "2 + 2?", "answer": "5", "label": 0},
        [Preference(ASKED, rejected=BAD, rejected_score=0.0)],
    ),
}  # fmt: skip


def same(found, expected):
    """NaN equals NaN here."""
    return repr(found) == repr(expected)


@pytest.mark.parametrize(("format", "record", "expected"), CASES.values(), ids=CASES)
def test_a_record_of_each_format_is_recognised_and_becomes_its_preferences(format, record, expected):
    assert detected(record) == format
    found = preferences(record, format)
    assert same(found, expected)
    assert [each.flaw for each in found] == ["tie" if each.tie else "" for each in expected]


def test_every_format_is_tried():
    assert {format for format, _, _ in CASES.values()} == set(FORMATS)


def test_of_scored_answers_the_best_and_the_worst_may_be_taken_alone():
    record = {"prompt": "2 + 2?", "responses": ["3", "5", "4", "2"], "scores": [1, 2, 5, 1]}
    (found,) = preferences(record, "scored", pairs="best_worst")
    assert same(found, Preference(ASKED, GOOD, (said("2"),), 4.0, 5.0, 1.0))
    assert len(preferences(record, "scored")) == 6
    level = {"prompt": "2 + 2?", "responses": ["3", "5", "4"], "scores": [1, 1, 1]}
    assert [each.flaw for each in preferences(level, "scored", pairs="best_worst")] == ["tie"]
    assert set(PAIRS) == {"all", "best_worst"}


@pytest.mark.parametrize(
    ("record", "flaw"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "identical"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "empty_answer"),
        ({"prompt": "a", "chosen": "", "rejected": "b", "tie": True}, "tie"),
        ({"prompt": "a", "chosen": [], "rejected": [said("b")]}, "empty_answer"),
        ({"prompt": "a", "chosen": [{"role": "assistant", "content": None}], "rejected": "b"}, "empty_answer"),
        ({"prompt": [user("a"), said(""), user("b")], "chosen": "c", "rejected": "d"}, "empty_answer"),
        ({"chosen": HH, "rejected": HH + "4"}, "empty_answer"),
        ({"chosen": HH + "4", "rejected": HH + "4"}, "identical"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: b"}, "different_prompts"),
        ({"chosen": HH + "4", "rejected": HH + "4\n\nHuman: more\n\nAssistant: 5"}, "different_prompts"),
        ({"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a"}, "different_prompts"),
    ],
)
def test_what_cannot_be_learned_from_is_named(record, flaw):
    assert [each.flaw for each in preferences(record, "pairs")] == [flaw]


NAN = float("nan")


@pytest.mark.parametrize(
    ("format", "record", "reason", "message"),
    [
        ("pairs", "a text", "not_an_object", "a text is no record of format 'pairs'; give .json, .jsonl or .parquet"),
        ("pairs", {"prompt": "a", "chosen": "b"}, "no_field", r"no field 'rejected' in \['chosen', 'prompt'\]; rename"),
        ("pairs", {"prompt": "a", "chosen": 1, "rejected": "b"}, "not_text", "field 'chosen' holds int 1, not text"),
        ("pairs", {"chosen": "b", "rejected": "c"}, "no_prompt", "no prompt beside 'chosen', which is no transcript"),
        ("pairs", {"prompt": [], "chosen": "b", "rejected": "c"}, "no_prompt", "nobody asks: the prompt is empty"),
        ("pairs", {"prompt": [*GOOD], "chosen": "b", "rejected": "c"}, "no_prompt", "or the assistant speaks last"),
        ("pairs", {"prompt": "a", "chosen": [CALL, FOUND], "rejected": "b"}, "no_answer", "is not the assistant's"),
        ("pairs", {"prompt": "a", "chosen": "b\ud800", "rejected": "c"}, "lone_surrogate", "lone surrogate"),
        ("pairs", {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "big"}, "no_margin",
         "a margin is 'big', not a finite number of a size up to .*; mend it"),
        ("pairs", {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 10**400}, "no_margin", "a margin is 10000"),
        ("pairs", {"prompt": "a", "chosen": "b", "rejected": "c", "score_rejected": -1e39}, "no_score_rejected",
         r"is -1e\+39, not a finite number of a size up to 1e\+38"),
        ("pairs", {"prompt": "a", "chosen": "b", "rejected": "c", "tie": "false"}, "no_tie",
         "field 'tie' holds 'false', not true or false; mend it"),
        ("pairs", {"prompt": "a", "chosen": "b", "rejected": "c", "tie": 2}, "no_tie", "field 'tie' holds 2"),
        ("pairs", {"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": NAN}, "no_score_chosen", "is nan"),
        ("scored", {"prompt": "a", "responses": ["b", "c"]}, "no_score", "a score is None, not a finite number"),
        ("scored", {"prompt": "a", "responses": ["b", "c"], "scores": [1]}, "no_score",
         "2 answers in 'responses' with 1 scores; give each one"),
        ("scored", {"prompt": "a", "responses": [], "scores": []}, "no_score", "0 answers"),
        ("scored", {"prompt": "a", "responses": ["b", "c"], "scores": [1, True]}, "no_score", "a score is True"),
        ("scored", {"prompt": "a", "responses": "b", "scores": [1]}, "not_a_list", "field 'responses' holds str 'b'"),
        ("scored", {"prompt": "a", "answers": [{"score": 1}, {"score": 2}]}, "not_text", "an answer is {'score': 1}"),
        ("scored", {"prompt": "a", "response": "b", "score": math.inf}, "no_score", "a score is inf"),
        ("thumbs", {"prompt": "a", "completion": "b"}, "no_label", "field 'label' holds None, not true or false"),
        ("thumbs", {"prompt": "a", "completion": "b", "label": 2}, "no_label", "field 'label' holds 2"),
        ("thumbs", {"prompt": "a", "completion": "b", "label": 1.0}, "no_label", "field 'label' holds 1.0"),
        ("thumbs", {"completion": "b", "label": True}, "no_field", "no field 'prompt'"),
    ],
)  # fmt: skip
def test_a_record_not_of_its_format_is_named_with_the_mend(format, record, reason, message):
    with pytest.raises(Malformed, match=message) as error:
        preferences(record, format)
    assert error.value.reason == reason


@pytest.mark.parametrize("record", [{"prompt": "a", "completion": "b"}, {"text": "a"}, {"chosen": "a"}, "a text"])
def test_a_record_of_no_format_is_told_the_fields_of_each(record):
    with pytest.raises(Malformed, match=r"are the fields of no preference: pairs \(chosen and rejected, .*rename them"):
        detected(record)
