import json
import math

import pytest
import sacrebleu

from jaxllm.evaluate import replies as module
from jaxllm.evaluate.answers import Answer, corpus_bleu, sentence_bleu
from jaxllm.evaluate.measures import measured
from jaxllm.evaluate.replies import Asking, Question, held_out, metrics, of_file, of_tasks, replies
from jaxllm.rewards.scoring import Term
from jaxllm.text.chat import Conversation
from jaxllm.text.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
HERE = dict(workers=0, max_new_tokens=32)


def message(role, content):
    return {"role": role, "content": content}


def asked(content, *references, **more):
    return Question(Conversation((message("user", content),)), references, **more)


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


@pytest.fixture
def told(monkeypatch):
    """A function: questions, what is answered to each in turn, options -> the items, without a model."""

    def told(questions, texts, length=200, **how):
        said = [Answer([*TOKENIZER.encode(text), TOKENIZER.end_id], True) for text in texts]
        monkeypatch.setattr(module, "answered", lambda *given, **how: enumerate(said))
        return replies(None, None, TOKENIZER, questions, Asking(**HERE | how), length=length)

    return told


def values(items, samples=1):
    return {metric.name: measured(metric, [item["scores"] for item in items]) for metric in metrics(samples)}


# ---- what is asked ----


@pytest.mark.parametrize(
    "record, references, answers",
    [
        ({"prompt": "q", "references": ["a", "b"]}, ("a", "b"), ()),
        ({"prompt": "q", "answers": ["1", "one"]}, ("1", "one"), ("1", "one")),
        ({"prompt": "q", "answer": ["1", "one"]}, ("1", "one"), ("1", "one")),
        ({"prompt": "q", "references": ["It is 1."], "answer": "1"}, ("It is 1.",), ("1",)),
        ({"question": "q", "answer": "so\n#### 1"}, ("1",), ("1",)),
        ({"prompt": "q", "answer": 7}, ("7",), ("7",)),
        ({"prompt": "q", "response": "r"}, ("r",), ()),
        ({"prompt": "q", "completion": "r"}, ("r",), ()),
        ({"instruction": "q", "output": "r"}, ("r",), ()),
        ({"messages": [message("user", "q"), message("assistant", "r")]}, ("r",), ()),
        ({"prompt": "q", "chosen": "r", "rejected": "s"}, ("r",), ()),
        ({"prompt": "q"}, (), ()),
    ],
)
def test_records_of_every_format_give_a_prompt_and_what_is_right(tmp_path, record, references, answers):
    (found,) = of_file(jsonl(tmp_path / "a.jsonl", [record]))
    assert found.prompt == Conversation((message("user", "q"),))
    assert (found.references, found.answers) == (references, answers)


def test_a_record_that_asks_nothing_is_named_with_its_place(tmp_path):
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: .*'text'.* are the fields of no format"):
        of_file(jsonl(tmp_path / "a.jsonl", [{"prompt": "q"}, {"text": "b"}]))
    for wrong in ([], [""], [3]):
        with pytest.raises(ValueError, match=r"b\.jsonl, line 1: field 'answers' holds .* list of one or more texts"):
            of_file(jsonl(tmp_path / "b.jsonl", [{"prompt": "q", "answers": wrong}]))


@pytest.mark.parametrize("fields", [{"answer": " "}, {"solution": ""}, {"answer": "so\n#### "}, {"response": "\n"}])
def test_a_blank_is_no_right_answer(tmp_path, fields):
    with pytest.raises(
        ValueError, match=r"a\.jsonl, line 1: a right answer is '.*': give a text that is not blank, or"
    ):
        of_file(jsonl(tmp_path / "a.jsonl", [{"prompt": "q", **fields}]))


def test_a_held_out_answer_that_says_nothing_is_no_reference(monkeypatch):
    """As one that only calls a tool."""
    prompt = asked("q").prompt
    monkeypatch.setattr(module.questions, "held_out_answers", lambda config: [(prompt, ""), (prompt, "r")])
    assert held_out({"data": {"sources": {"chat": {}}}}) == [asked("q"), asked("q", "r")]


def test_problems_of_tasks_are_held_out_and_grouped():
    found = of_tasks({"addition": 2, "logic": 1}, 5)
    assert [question.group for question in found] == ["addition:2"] * 5 + ["logic:1"] * 5
    assert all(question.answers == (question.record["answer"],) and not question.references for question in found)
    assert len({repr(question.prompt) for question in found}) == 10
    with pytest.raises(ValueError, match="kind='additions' is no source of problems.*addition"):
        of_tasks({"additions": 1}, 5)


def test_a_run_of_texts_holds_out_no_question():
    with pytest.raises(ValueError, match="no sources to hold conversations out of: give --files"):
        held_out({"data": {"sequence_length": 8}})


# ---- scores ----


def test_any_accepted_reference_is_right_but_for_blanks_around_it(told):
    items = told([asked("a", "Paris", "in Paris"), asked("b", "Rome"), asked("c", "x")], [" in Paris\n", "rome", "x y"])
    assert [item["scores"]["exact_match"] for item in items] == [1.0, 0.0, 0.0]
    assert [item["scores"]["contains"] for item in items] == [1.0, 0.0, 1.0]
    assert [item["scores"]["rouge_l"] for item in items] == [1.0, 1.0, pytest.approx(2 / 3)]
    assert items[0]["answers"] == [" in Paris\n"] and items[0]["references"] == ["Paris", "in Paris"]
    assert items[0]["scores"]["answer_tokens"] == 11 and items[0]["scores"]["answers_ended"] == 1.0


def test_what_a_question_lacks_is_not_counted_as_wrong(told):
    items = told([asked("a", "x"), asked("b", answers=("4",)), asked("c")], ["x", "It is so: the answer is 4.", "y"])
    found = values(items)
    assert {name: measure.count for name, measure in found.items()} == {
        "exact_match": 1, "contains": 1, "bleu": 1, "rouge_l": 1, "accuracy": 1, "format": 1, "pass@1": 1,
        "answer_tokens": 3, "answers_ended": 3,
    }  # fmt: skip
    assert found["accuracy"].value == found["pass@1"].value == 1.0 and found["format"].value == 0.0


def test_verifiers_take_any_accepted_answer_and_know_the_format(told):
    questions = [asked("a", answers=("one", "1")), asked("b", answers=("2",)), asked("c", answers=("3",))]
    said = ["<think>so</think><answer>1</answer>", "<think>so</think><answer>3</answer>", "3"]
    items = told(questions, said)
    assert [item["scores"]["accuracy"] for item in items] == [1.0, 0.0, 1.0]
    assert [item["scores"]["format"] for item in items] == [1.0, 1.0, 0.0]


def test_the_checker_of_a_task_gets_what_its_record_has(told):
    record = {"checker": "countdown", "numbers": [3, 5], "target": 8, "answer": "3+5"}
    items = told([asked("a", answers=("3+5",), record=record)] * 2, ["5+3", "8"])
    assert [item["scores"]["accuracy"] for item in items] == [1.0, 0.0]


def test_a_verifier_that_fails_gives_no_score_and_says_so(told):
    (item,) = told([asked("a", answers=("x",), record={"checker": "numeric"})], ["4"])
    assert "accuracy" not in item["scores"] and "pass@1" not in item["scores"] and "no number" in item["failures"][0]


def test_samples_give_unbiased_pass_at_k(told):
    items = told([asked("a", "4", answers=("4",)), asked("b", "5", answers=("5",))],
                 ["4", "5", "4", "6", "1", "1", "1", "1"], samples=4, temperature=1.0)  # fmt: skip
    assert items[0]["answers"] == ["4", "5", "4", "6"]
    scores = items[0]["scores"]
    assert scores["accuracy"] == scores["exact_match"] == scores["pass@1"] == 0.5
    assert scores["pass@2"] == pytest.approx(5 / 6) and scores["pass@4"] == 1.0
    found = values(items, samples=4)
    assert found["pass@2"].value == pytest.approx(5 / 12) and found["pass@4"].value == 0.5
    assert [name for name in values(items[:1]) if name.startswith("pass")] == ["pass@1"]


def test_a_prompt_that_leaves_no_room_is_told_apart_and_keeps_its_place(told):
    items = told([asked("a" * 30, "x"), asked("b", "x")], ["x"], length=60)
    assert items[0]["too_long"] and items[0]["scores"] == {} and items[1]["scores"]["exact_match"] == 1.0
    with pytest.raises(ValueError, match="none of 1 prompts leaves room for max_new_tokens=32 in 60 tokens: lower"):
        told([asked("a" * 90)], [], length=60)


def test_what_cannot_be_sampled_is_refused():
    with pytest.raises(ValueError, match="samples=0 must be at least 1"):
        Asking(samples=0)
    with pytest.raises(ValueError, match="samples=4 at temperature=0 are all the same: set a temperature above 0"):
        Asking(samples=4)


def test_verifiers_run_in_processes_with_a_time_limit(told):
    (item,) = told([asked("a", answers=("4",))], ["4"], workers=1)
    assert item["scores"]["accuracy"] == 1.0
    assert module._TERMS == {"accuracy": Term("accuracy"), "format": Term("format")}


# ---- BLEU ----


def test_bleu_of_a_corpus_is_the_packages_from_sums_of_counts():
    said = ["the cat sat on the mat today", "a dog, barks loudly at me!", "nothing like it", "the the the the"]
    right = [["the cat sat on the mat", "a cat sat"], ["A dog barks loudly at me."], ["it is so"], ["the cat"]]
    found = [sentence_bleu(references, text) for references, text in zip(right, said, strict=True)]
    sums = [sum(each) for each in zip(*(counts for _, counts in found), strict=True)]
    columns = [[references[place] if place < len(references) else None for references in right] for place in range(2)]
    assert corpus_bleu(sums) == pytest.approx(sacrebleu.corpus_bleu(said, columns).score)
    assert 5 < corpus_bleu(sums) < 95
    for (score, _), references, text in zip(found, right, said, strict=True):
        assert score == pytest.approx(sacrebleu.sentence_bleu(text, references).score)


def test_bleu_of_items_is_the_corpus_and_not_the_mean_of_sentences(told):
    items = told([asked("a", "one two three four"), asked("b", "x y")], ["one two three four", "z"])
    found = values(items)["bleu"]
    one = sacrebleu.corpus_bleu(["one two three four", "z"], [["one two three four", "x y"]]).score
    assert found.value == pytest.approx(one) and found.count == 2
    assert math.isfinite(found.low) and items[0]["scores"]["sentence_bleu"] == pytest.approx(100)


def test_empty_texts_have_a_bleu():
    assert sentence_bleu(["a b"], "")[0] == 0.0 and corpus_bleu(sentence_bleu(["a b"], "")[1]) == 0.0


def test_a_corpus_without_long_matches_is_smoothed_as_published_numbers_are():
    right, said = ["the cat sat on a mat"], "the cat lay in a mat"
    found = corpus_bleu(sentence_bleu(right, said)[1])
    assert found == pytest.approx(sacrebleu.corpus_bleu([said], [right]).score) and found > 5


def test_counts_of_all_samples_add_up(told):
    (item,) = told([asked("a", "one two")], ["one two", "one"], samples=2, temperature=1.0)
    assert item["scores"]["bleu_counts"] == [3, 1, 0, 0, 3, 1, 0, 0, 3, 4]


# ---- with a model ----


def test_the_batch_size_changes_no_answer(tiny, built):
    """C18: sampled ones too."""
    model, params = built(tiny(vocab_size=288))
    questions = [asked("q" * number, "x", answers=("4",)) for number in (1, 9, 3, 5)]
    found = []
    for batch_size in (1, 8, 64):
        how = Asking(samples=2, temperature=1.0, max_new_tokens=6, batch_size=batch_size, workers=0)
        found.append(replies(model, params, TOKENIZER, questions, how, length=64))
    assert found[0] == found[1] == found[2]
    assert len({answer for item in found[0] for answer in item["answers"]}) > 4
