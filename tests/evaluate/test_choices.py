import json

import jax
import numpy as np
import pytest

from jaxllm.evaluate.choices import METRICS, Question, of_file, scored
from jaxllm.text import chat
from jaxllm.text.chat import Conversation
from jaxllm.text.special_tokens import BOS_ID
from jaxllm.text.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
RECORDS = [
    {"question": "The sky is", "choices": ["blue", "a very long green thing", "é"], "answer": 0},
    {"prompt": "Two and two make ", "choices": ["4", "five"], "answer": 1},
    {"question": "x", "choices": ["yes", "no", "it may be", "never"], "answer": 3},
]


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


@pytest.fixture
def path(tmp_path):
    return jsonl(tmp_path / "choices.jsonl", RECORDS)


@pytest.fixture(scope="module")
def model(tiny, built):
    return built(tiny(vocab_size=288))


def alone(model, before, after):
    """Log-probability of the ids after those before, by a whole forward pass of this sequence alone."""
    model, params = model
    ids = np.array([[*before, *after]])
    logp_TV = np.float64(jax.nn.log_softmax(jax.jit(model.forward)(params, ids)[0]))
    return sum(logp_TV[len(before) + place - 1, token] for place, token in enumerate(after))


@pytest.mark.parametrize("form", ["text", "chat"])
@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_a_choice_has_the_likelihood_that_it_has_alone_whatever_the_batch(model, path, form, batch_size):
    questions = of_file(path, form=form)
    items = scored(*model, TOKENIZER, questions, form=form, length=64, batch_size=batch_size)
    for question, item, record in zip(questions, items, RECORDS, strict=True):
        asked = record.get("question", record.get("prompt"))
        # A blank at the end of a document's question belongs to the choice; the assistant begins without one.
        before, between = [BOS_ID, *asked.rstrip().encode()], asked[len(asked.rstrip()) :] + " "
        before = (
            [before[0], *TOKENIZER.encode(asked.rstrip())]
            if form == "text"
            else chat.prompt(question.prompt, TOKENIZER)
        )
        expected = [
            alone(model, before, TOKENIZER.encode((between if form == "text" else "") + choice))
            for choice in record["choices"]
        ]
        np.testing.assert_allclose(item["logps"], expected, rtol=1e-6, atol=1e-5)
        sizes = {
            "accuracy": lambda text: 1,
            "accuracy_per_character": len,
            "accuracy_per_byte": lambda text: len(text.encode()),
        }
        for name, size in sizes.items():
            best = np.argmax([each / size(text) for each, text in zip(expected, record["choices"], strict=True)])
            assert item["scores"][name] == float(best == record["answer"]), name
        assert item["said"] == np.argmax(expected) and item["answer"] == record["answer"]
    assert list(items[0]["scores"]) == [metric.name for metric in METRICS]


def test_characters_and_bytes_are_different_norms(model, monkeypatch):
    from jaxllm.evaluate import choices

    monkeypatch.setattr(choices, "span_logps", lambda *given, **how: np.array([-3.0, -6.2, -5.0]))
    question = Question(Conversation(({"role": "user", "content": "q"},)), ("ab", "ééé", "abc"), 1)
    (item,) = scored(*model, TOKENIZER, [question], form="text", length=64, batch_size=2)
    # Per token the first is the likeliest, per character the first too, per byte the second.
    assert item["said"] == 0
    assert item["scores"] == {"accuracy": 0.0, "accuracy_per_character": 0.0, "accuracy_per_byte": 1.0}


def test_what_is_too_long_loses_its_beginning_and_is_counted(model):
    question = Question(Conversation(({"role": "user", "content": "abcdefghij" * 3},)), ("one", "other"), 0)
    (item,) = scored(*model, TOKENIZER, [question], form="text", length=16, batch_size=2)
    kept = TOKENIZER.encode(("abcdefghij" * 3 + " one")[-17:])
    assert item["logps"][0] == pytest.approx(alone(model, kept[:-4], kept[-4:]), abs=1e-5)
    assert item["cut"] == 1 + 30 + 6 - 17
    with pytest.raises(ValueError, match="4 tokens to score are more than 3 that are read: raise --sequence_length"):
        scored(*model, TOKENIZER, [question], form="text", length=3, batch_size=2)


@pytest.mark.parametrize(
    "record, message",
    [
        (
            {"choices": ["a", "b"], "answer": 0},
            r"\['answer', 'choices'\] asks nothing: name the question one of prompt",
        ),
        ({"prompt": "q", "choices": ["a"], "answer": 0}, "'choices' is .* give a list of two or more texts"),
        ({"prompt": "q", "choices": ["a", ""], "answer": 0}, "give a list of two or more texts"),
        ({"prompt": "q", "choices": "ab", "answer": 0}, "give a list of two or more texts"),
        ({"prompt": "q", "choices": ["a", "b"], "answer": 2}, "'answer' is 2: give the number .* from 0 to 1"),
        ({"prompt": "q", "choices": ["a", "b"], "answer": "a"}, "'answer' is 'a'"),
        ({"prompt": "q", "choices": ["a", "b"], "answer": True}, "'answer' is True"),
        ({"prompt": "q", "choices": ["a", "b"]}, "'answer' is None"),
        ({"prompt": "q", "system": "s", "choices": ["a", "b"], "answer": 0}, "2 messages are no text: .* --chat"),
    ],
)
def test_a_record_that_is_no_question_is_named_with_its_place(tmp_path, record, message):
    path = jsonl(tmp_path / "c.jsonl", [RECORDS[0], record])
    with pytest.raises(ValueError, match=rf"c\.jsonl, line 2: .*{message}"):
        of_file(path, form="text")


def test_a_conversation_may_be_asked_in_a_chat(tmp_path, path):
    record = {"prompt": "q", "system": "s", "choices": ["a", "b"], "answer": 0}
    (question,) = of_file(jsonl(tmp_path / "c.jsonl", [record]), form="chat")
    assert [message["role"] for message in question.prompt.messages] == ["system", "user"]
    with pytest.raises(ValueError, match="form='talk' is not one of"):
        of_file(path, form="talk")
