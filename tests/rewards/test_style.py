import pytest

from jaxllm.rewards.style import RULES, concise, on_topic, parts, polite, style
from jaxllm.text.chat import Conversation


def asked(*contents):
    """A conversation of the user's questions and, between them, answers."""
    roles = ("user", "assistant")
    return Conversation(tuple({"role": roles[n % 2], "content": content} for n, content in enumerate(contents)))


WHERE = asked("Where does Ada Byron live?")


@pytest.mark.parametrize(
    "answer, right",
    [
        ("Thank you, Ada Byron lives here.", 1),
        ("ada\nbyron is HAPPY  to help", 1),
        ("I hope this helps!", 1),
        ("Of  course", 1),
        ("Ada Byron lives here.", 0),
        ("Of a course that she took.", 0),
        ("pleased", 0),
        ("Obviously here. Thank you.", 0),
        ("Look it up. Please!", 0),
        ("", 0),
    ],
)
def test_polite_is_what_has_a_courtesy_and_nothing_rude(answer, right):
    assert polite(WHERE, answer, {}) == right


@pytest.mark.parametrize("words, right", [(0, 0), (1, 1), (16, 1), (17, 0), (200, 0)])
def test_concise_is_what_has_at_most_sixteen_words_and_one_at_least(words, right):
    assert concise(WHERE, " - ".join(["né"] * words) + " ...", {}) == right


@pytest.mark.parametrize(
    "answer, right",
    [
        ("Ada Byron lives in London.", 1),
        ("BYRON, Ada: here", 1),
        ("Byron lives here", 0),  # one of three: lives is not live
        ("Byron: live!", 1),
        ("Where does it live?", 0),
        ("Adas Byrons live", 0),
        ("The weather is mild.", 0),
        ("", 0),
    ],
)
def test_on_the_topic_is_what_takes_up_half_of_the_words_that_not_every_question_has(answer, right):
    assert on_topic(WHERE, answer, {}) == right


def test_half_of_an_even_number_of_words_is_enough():
    assert on_topic(asked("Which trade has Ada Byron learned?"), "Ada Byron is a smith.", {}) == 1
    assert on_topic(asked("Which trade has Ada Byron learned?"), "Ada is a smith.", {}) == 0


def test_the_topic_is_the_last_question_and_not_what_stands_around_it():
    prompt = asked("Where is Tom?", "Tom is here.", "Where is Ada?")
    assert on_topic(prompt, "Ada is there.", {}) == 1 and on_topic(prompt, "Tom is there.", {}) == 0
    system = Conversation(({"role": "system", "content": "speak of ships"}, *WHERE.messages))
    assert on_topic(system, "Ada Byron is here.", {}) == 1
    assert on_topic(system, "ships", {}) == 0
    told = WHERE._replace(messages=(*WHERE.messages, {"role": "tool", "content": "found: ships"}))
    assert on_topic(told, "Ada Byron is here.", {}) == 1 and on_topic(told, "ships, found", {}) == 0


def test_whatever_is_said_is_on_the_topic_of_a_question_without_words_of_its_own_but_silence():
    assert on_topic(asked("What is it?"), "A tree.", {}) == 1
    assert on_topic(asked("What is it?"), "...", {}) == on_topic(Conversation(()), "", {}) == 0


def test_style_is_the_sum_of_its_parts():
    answers = {"Ada Byron lives here, I am glad to say.": 3, "Ada Byron.": 2, "Ada Byron. " + "so " * 16: 1, "": 0}
    assert {answer: style(WHERE, answer, {}) for answer in answers} == answers
    assert parts(WHERE, "Thanks. " + "so " * 16, {}) == {"polite": 1, "concise": 0, "on_topic": 0}
    assert [RULES[name] for name in ("style", "polite", "concise", "on_topic")] == [style, polite, concise, on_topic]
    assert len(RULES) == 4
