import pytest

from jaxllm.pipeline import transcript


def asked(answers, expected="81", kind="chat"):
    return transcript.transcript([{"prompt": "19+62=?", "kind": kind, "expected": expected}], answers)


@pytest.mark.parametrize(
    "answer, expected, right",
    [
        ("It is 81.", "81", True),
        ("It is 181.", "81", False),
        ("It is 8.", None, False),
        ("It is 81.", "", False),
        ("<think>81</think><answer>71</answer>", "81", False),
        ("<think>71</think><answer>81</answer>", "81", True),
        ("<think>81", "81", False),
        ("<think>81</think> so 71", "81", False),
        ("<answer>81", "81", True),
        ("Anna lives in Juno.\nI hope this helps.", "anna  lives\nin Juno.", True),
        ("The home of Anna is in Juno.", ["Anna lives in Juno.", "The home of Anna is in Juno."], True),
        ("The home of Anna is in Birk.", ["Anna lives in Juno.", "The home of Anna is in Juno."], False),
        ("a+b", "a.b", False),
    ],
)
def test_an_answer_is_right_where_it_holds_what_is_expected(answer, expected, right):
    assert transcript.holds(answer, expected) is right


def test_tags_thoughts_and_expected_words_are_marked():
    text = "<think>1+6=7</think><answer>7</answer><|end|>"
    assert transcript.marked(text, "7") == (
        '<span class="thought"><span class="tag">&lt;think&gt;</span>1+6=7'
        '<span class="tag">&lt;/think&gt;</span></span>'
        '<span class="tag">&lt;answer&gt;</span><mark>7</mark><span class="tag">&lt;/answer&gt;</span>'
        '<span class="tag">&lt;|end|&gt;</span>'
    )


@pytest.mark.parametrize(
    "text", ["<script>alert(1)</script>", "<b onclick='x'>", "a < b && c > d", "<think><i>", "a <i <b> & <u"]
)
def test_whatever_a_model_says_is_text(text):
    markup = transcript.marked(text, "alert(1)")
    assert markup.striptags() == text
    assert "<script" not in markup and "<b" not in markup and "<i>" not in markup


def test_each_question_has_the_answer_of_every_stage():
    (question,) = asked({"random": ["xyz"], "sft": [], "grpo": [" 81 "]}, kind="text")
    assert question["continued"] and question["expected"] == ("81",)
    assert [answer["stage"] for answer in question["answers"]] == ["random", "sft", "grpo"]
    assert [answer["asked"] for answer in question["answers"]] == [True, False, True]
    assert [answer["right"] for answer in question["answers"]] == [False, False, True]
    assert [answer["shown"] for answer in question["answers"]] == ["xyz", "", "<mark>81</mark>"]


def test_a_long_answer_is_folded_after_its_beginning_and_nothing_is_lost():
    text = "<&>" * 1000
    (question,) = asked({"random": [text]})
    answer = question["answers"][0]
    assert len(answer["shown"].striptags()) == transcript.LONGEST
    assert (answer["shown"] + answer["rest"]).striptags() == text
    (question,) = asked({"random": ["x" * (transcript.LONGEST + 50)]})
    assert question["answers"][0]["rest"] == ""


def test_the_telling_question_is_the_one_that_the_fewest_stages_answer():
    questions = [{"prompt": name, "expected": "yes"} for name in "abcd"]
    answers = {
        "random": ["no", "no", "yes", "no"],
        "sft": ["yes", "no", "no", "no"],
        "grpo": ["yes", "yes", "yes", "no"],
    }
    shown = transcript.transcript(questions, answers)
    assert transcript.telling(shown)["prompt"] == "b"
    assert transcript.telling(shown[2:]) is None
    assert transcript.telling([]) is None
