import gzip
import json
import sys
import types
from collections import Counter

import pytest

from jaxllm.data import problems as module
from jaxllm.data import tasks
from jaxllm.data.problems import ProblemSource, problems
from jaxllm.text.chat import Conversation, Malformed

ADDITION = ProblemSource("addition", level=2)


def asked(problem):
    return problem.prompt.messages[-1]["content"]


def texts(found):
    return [asked(problem) for problem in found]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


@pytest.fixture
def questions(tmp_path):
    """A file of 40 questions with answers."""
    return write(tmp_path / "questions.jsonl", [{"question": f"q{n}?", "answer": f"way\n#### {n}"} for n in range(40)])


# ---- one by one ----


@pytest.mark.parametrize("kind", tasks.TASKS)
def test_problems_follow_from_their_number_and_the_seed_alone(kind):
    first, again, other = (problems({"a": ProblemSource(kind, level=2)}, seed=seed) for seed in (1, 1, 2))
    batches = [first.batch(step, 4) for step in range(3)]
    assert [again.batch(step, 4) for step in (2, 0, 1)] == [batches[2], batches[0], batches[1]]
    assert [first.problem(number) for number in range(12)] == sum(batches, [])
    assert texts(sum(batches, [])) != texts(other.batch(0, 12))
    assert len(set(texts(sum(batches, [])))) > 6


def test_training_and_validation_lie_on_their_sides_whatever_the_seed():
    first, other = (problems({"a": ADDITION}, validation=0.2, seed=seed) for seed in (1, 2))
    for problem in first.batch(0, 150):
        assert not tasks.is_held_out(problem.prompt, 0.2)
    validation = first.validation(60)
    assert all(tasks.is_held_out(problem.prompt, 0.2) for problem in validation)
    assert len({tasks.key(problem.prompt) for problem in validation}) == 60
    assert other.validation(60) == validation and first.validation(30) == validation[:30]
    shown = tasks.demonstrations({"addition": 2}, 0, 300, share=0.2)
    assert not {record["messages"][0]["content"] for record in shown} & set(texts(validation))


def test_validation_ends_where_there_is_nothing_new(monkeypatch):
    monkeypatch.setattr(tasks, "LONGEST_SEARCH", 300)
    few = problems({"a": ProblemSource("addition", level=1)}, validation=0.2)
    found = few.validation(1000)
    everything = {f"{x}+{y}=?" for x in range(10) for y in range(10)}
    keys = {tasks.key(_prompt(text)) for text in everything if tasks.is_held_out(_prompt(text), 0.2)}
    assert {tasks.key(problem.prompt) for problem in found} == keys and len(found) == len(keys)
    assert problems({"a": ADDITION}, validation=0).validation(5) == []


def _prompt(text):
    return Conversation(({"role": "user", "content": text},))


# ---- mixtures ----


def test_sources_are_mixed_by_their_weights_and_each_goes_on_where_it_stopped(questions):
    sources = {"file": {"kind": "file", "path": questions, "weight": 3}, "sums": {"kind": "sums", "weight": 1.0}}
    mixed = problems(sources, validation=0.2, seed=5)
    found = mixed.batch(0, 1200)
    assert Counter(problem.record["task"] for problem in found[:1000]) == {"file": 750, "sums": 250}
    counts = [Counter(p.record["task"] for p in found[cut : cut + 100])["file"] for cut in range(0, 1000, 100)]
    assert 55 < min(counts) and max(counts) < 95
    of_file = [problem for problem in found if problem.record["task"] == "file"]
    alone = problems({"file": sources["file"]}, validation=0.2, seed=5)
    assert of_file == alone.batch(0, len(of_file))
    of_sums = [problem for problem in found if problem.record["task"] == "sums"]
    assert of_sums == problems({"sums": sources["sums"]}, validation=0.2, seed=5).batch(0, len(of_sums))


def test_sources_of_one_task_ask_different_problems():
    found = problems({"a": ADDITION, "b": ADDITION}, seed=1).batch(0, 200)
    assert len(set(texts(found))) > 180


def test_validation_has_as_many_problems_of_each_source_and_no_prompt_twice():
    easy = ProblemSource("addition", level=1)
    same = {"a": easy, "b": easy, "c": ProblemSource("sums")}
    found = problems(same, validation=0.4).validation(22)
    assert len(found) == len({tasks.key(problem.prompt) for problem in found}) == 22
    assert Counter(problem.record["task"] for problem in found) == {"addition": 16, "sums": 6}


# ---- files ----


def test_fewer_than_no_held_out_problems_are_refused():
    drawn = problems({"a": ProblemSource("addition")})
    assert drawn.validation(0) == []
    with pytest.raises(ValueError, match="heldout=-2 must be at least 0"):
        drawn.validation(-2)


def test_each_problem_of_a_file_comes_once_in_an_epoch_in_an_order_of_its_own(tmp_path, questions):
    made = problems({"a": ProblemSource("file", path=questions)}, validation=0.2, seed=1)
    size, held = made.report["a"]["training"], made.report["a"]["validation"]
    assert size + held == 40 and held > 0
    epochs = [texts(made.problem(number) for number in range(size * e, size * (e + 1))) for e in range(3)]
    assert len(set(epochs[0])) == size and all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0] and epochs[0] != sorted(epochs[0])
    validation = made.validation(99)
    assert len(validation) == held and not set(texts(validation)) & set(epochs[0])
    (tmp_path / "back.jsonl").write_text("\n".join(reversed((tmp_path / "questions.jsonl").read_text().splitlines())))
    back = problems({"a": ProblemSource("file", path=f"{tmp_path}/back.jsonl")}, validation=0.2)
    assert texts(back.validation(99)) == texts(validation)  # in whatever order a file has them
    other = problems({"a": ProblemSource("file", path=questions)}, validation=0.2, seed=2)
    assert texts(other.batch(0, size)) != epochs[0] and other.validation(99) == validation


FOUND = {  # a record -> what is asked, what of the record is kept
    "gsm8k": ({"question": "q", "answer": "6*2=12\nso\n#### 12"}, "q", {"answer": "12", "solution": "6*2=12\nso"}),
    "prompt": ({"prompt": "q", "answer": "a"}, "q", {"answer": "a", "solution": ""}),
    "a number": ({"prompt": "q", "answer": 7}, "q", {"answer": "7", "solution": ""}),
    "math": (
        {"problem": "q", "solution": "so \\boxed{5}", "level": 3},
        "q",
        {"answer": "so \\boxed{5}", "solution": "so \\boxed{5}", "level": 3},
    ),
    "math with an answer": (
        {"problem": "q", "solution": "so \\boxed{5}", "answer": "5"},
        "q",
        {"answer": "5", "solution": "so \\boxed{5}"},
    ),
    "messages": (
        {"messages": [{"role": "user", "content": "q"}], "answer": "a"},
        "q",
        {"answer": "a", "solution": ""},
    ),
    "a conversation": (
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]},
        "q",
        {},
    ),
    "messages as a prompt": (
        {"prompt": [{"role": "user", "content": "q"}], "answer": "a"},
        "q",
        {"answer": "a", "solution": ""},
    ),
    "alpaca": ({"instruction": "q", "input": "", "output": "r"}, "q", {"instruction": "q", "input": "", "output": "r"}),
    "a prompt alone": ({"prompt": "q", "topic": "t"}, "q", {"topic": "t"}),
    "an answer with a score": (
        {"problem": "q", "answer": "a", "score": 0.5},
        "q",
        {"answer": "a", "solution": "", "score": 0.5},
    ),
    "a preference": ({"prompt": "q", "chosen": "c", "rejected": "r"}, "q", {}),
    "a transcript": ({"chosen": "\n\nHuman: q\n\nAssistant: c", "rejected": "\n\nHuman: q\n\nAssistant: r"}, "q", {}),
    "thumbs": ({"prompt": "q", "completion": "c", "label": True}, "q", {"label": True}),
    "a checker of its own": (
        {"prompt": "q", "answer": "1+2", "checker": "countdown", "numbers": [1, 2], "target": 3},
        "q",
        {"answer": "1+2", "solution": "", "checker": "countdown", "numbers": [1, 2], "target": 3},
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_a_record_of_each_format_asks_its_question(name):
    value, question, kept = FOUND[name]
    (problem,) = module.of_record(value, ProblemSource("file", path="x"), "it")
    assert [(message["role"], message["content"]) for message in problem.prompt.messages] == [("user", question)]
    assert problem.record == {**kept, "task": "it"}


def test_what_the_system_says_comes_first_and_tools_are_kept():
    value = {"system": "Be kind.", "prompt": "q", "answer": "a", "tools": [{"name": "t"}]}
    (problem,) = module.of_record(value, ProblemSource("file", path="x"), "it")
    assert [message["role"] for message in problem.prompt.messages] == ["system", "user"]
    assert problem.prompt.tools == ({"name": "t"},)


def test_files_are_read_as_any_source_is_and_what_is_in_them_is_counted(tmp_path):
    records = [{"prompt": f"q{n}", "answer": "1"} for n in range(30)]
    records += [records[3], {"prompt": "no answer"}, {"prompt": "q3 is q5?", "answer": "1"}, {"prompt": "q5 is q3?"}]
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    made = problems({"a": {"kind": "file", "path": f"{tmp_path}/*.gz"}}, validation=0.3)
    report = made.report["a"]
    assert report["training"] + report["validation"] == 33
    assert report["repeated"] == 1 and report["without_answer"] == 2
    assert (
        "answer" not in {problem.record["task"]: problem.record for problem in made.batch(0, 99)} and report["content"]
    )


@pytest.mark.parametrize(
    "value, reason, message",
    [
        ({"text": "q"}, "unknown_format", "rename"),
        ({"prompt": 3}, "not_text", "field 'prompt' holds int"),
        ({"prompt": "q", "answer": ["a"]}, "not_text", "the answer 'answer' is list"),
        ({"prompt": "q", "answer": True}, "not_text", "the answer 'answer' is bool"),
        ({"prompt": [{"role": "robot", "content": "q"}]}, "unknown_role", "robot"),
        ({"prompt": "\ud800"}, "lone_surrogate", "mend"),
    ],
)
def test_a_bad_record_is_an_error_with_its_place_or_counted(tmp_path, value, reason, message):
    path = write(tmp_path / "a.jsonl", [*({"prompt": f"q{n}"} for n in range(9)), value])
    with pytest.raises(Malformed, match=f"a.jsonl, line 10: .*{message}.*on_error='skip'"):
        problems({"a": ProblemSource("file", path=path)}, validation=0)
    made = problems({"a": ProblemSource("file", path=path, on_error="skip")}, validation=0)
    assert made.report["a"]["training"] == 9 and made.report["a"][reason] == 1


def test_a_text_is_no_problem(tmp_path):
    (tmp_path / "a.txt").write_text("what?")
    with pytest.raises(Malformed, match="a.txt, line 1: a text is no problem"):
        problems({"a": ProblemSource("file", path=str(tmp_path))})


def test_a_file_may_name_its_answer_and_its_checker(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "q", "target": "x+1", "answer": "y"}])
    made = problems({"a": ProblemSource("file", path=path, answer="target", checker="math")}, validation=0)
    record = made.problem(0).record
    assert record["answer"] == "x+1" and record["checker"] == "math"


# ---- what the system asks for ----


def test_a_source_may_ask_for_the_format_without_changing_sides(questions):
    plain, framed = (
        problems({"a": ProblemSource("addition", level=2, system=system)}, validation=0.3) for system in ("", "think")
    )
    assert texts(framed.batch(0, 30)) == texts(plain.batch(0, 30)) and texts(framed.validation(9)) == texts(
        plain.validation(9)
    )
    for problem in (*framed.batch(0, 3), *framed.validation(3)):
        assert [message["role"] for message in problem.prompt.messages] == ["system", "user"]
        said = problem.prompt.messages[0]["content"]
        assert all(tag in said for tag in ("<think>", "</think>", "<answer>", "</answer>"))
    of_file = problems({"a": ProblemSource("file", path=questions, system="think")}, validation=0.3)
    for problem in (of_file.problem(0), *of_file.validation(1)):
        assert problem.prompt.messages[0] == framed.problem(0).prompt.messages[0]
    own = problems({"a": ProblemSource("addition", system="Be brief.")}).problem(0)
    assert own.prompt.messages[0] == {"role": "system", "content": "Be brief."}


# ---- reasoning-gym ----


@pytest.fixture
def gym(monkeypatch):
    """A stand-in for the package: what it is asked for, and entries that tell the seed."""

    def create(name, *, size, seed):
        assert (name, size) == ("chain_sum", 1)
        return [{"question": f"{seed}?", "answer": seed % 7, "metadata": {"seed": seed}}]

    factory = types.SimpleNamespace(DATASETS={"chain_sum": None})
    monkeypatch.setitem(sys.modules, "reasoning_gym", types.SimpleNamespace(create_dataset=create, factory=factory))


def test_reasoning_gym_gives_problems_with_all_that_its_own_score_needs(gym):
    made = problems({"a": ProblemSource("reasoning_gym", name="chain_sum")}, validation=0.3)
    batch = made.batch(0, 40)
    assert len(set(texts(batch))) == 40 and made.batch(0, 40) == batch
    assert not any(tasks.is_held_out(problem.prompt, 0.3) for problem in batch)
    assert all(tasks.is_held_out(problem.prompt, 0.3) for problem in made.validation(9))
    record, seed = batch[0].record, int(asked(batch[0])[:-1])
    assert record["entry"] == {"question": f"{seed}?", "answer": seed % 7, "metadata": {"seed": seed}}
    assert (record["checker"], record["dataset"], record["answer"]) == ("reasoning_gym", "chain_sum", str(seed % 7))


def test_reasoning_gym_that_is_not_there_or_lacks_a_data_set_is_said(gym, monkeypatch):
    with pytest.raises(ValueError, match="name='chain_sam' is no data set of reasoning-gym; did you mean 'chain_sum'"):
        problems({"a": ProblemSource("reasoning_gym", name="chain_sam")})
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match="pip install reasoning-gym"):
        problems({"a": ProblemSource("reasoning_gym", name="chain_sum")})


# ---- what decides, and what is refused ----


def test_the_fingerprint_is_of_all_that_decides_a_problem(tmp_path, questions):
    def fingerprint(path=questions, *, validation=0.1, seed=0, **fields):
        sources = {"a": {"kind": "file", "path": path, **fields}, "b": ADDITION}
        return problems(sources, validation=validation, seed=seed).fingerprint

    first = fingerprint()
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_text((tmp_path / "questions.jsonl").read_text())
    assert fingerprint() == first == fingerprint(str(moved))
    changed = write(tmp_path / "changed.jsonl", [{"question": f"q{n}?", "answer": "1"} for n in range(40)])
    others = [fingerprint(changed), fingerprint(validation=0.2), fingerprint(seed=1), fingerprint(system="think")]
    others += [fingerprint(checker="math"), fingerprint(weight=2.0)]
    others += [problems({"a": ProblemSource("addition", level=level)}).fingerprint for level in (1, 2)]
    others += [problems({"a": ADDITION}, validation=0.2).fingerprint]
    assert len({first, *others}) == 10


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"kind": "adition"}, "kind='adition' is no source of problems; did you mean 'addition'"),
        ({"kind": "addition", "weight": 0}, "weight=0 of problems 'addition'"),
        ({"kind": "addition", "level": 0}, "level=0 of problems 'addition'"),
        ({"kind": "file", "path": "x", "level": 2}, "level=2 of problems 'file'"),
        ({"kind": "file"}, "path='' and name='' of problems 'file'"),
        ({"kind": "addition", "path": "x"}, "path='x' and name='' of problems 'addition'"),
        ({"kind": "reasoning_gym"}, "path='' and name='' of problems 'reasoning_gym'"),
        ({"kind": "addition", "checker": "math"}, "answer='' and checker='math' are of a file, not of 'addition'"),
        ({"kind": "file", "path": "x", "on_error": "stop"}, "on_error='stop' is not one of"),
    ],
)
def test_a_source_that_means_nothing_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ProblemSource(**fields)


def test_what_asks_nothing_is_refused(questions):
    with pytest.raises(ValueError, match="at least one source"):
        problems({})
    with pytest.raises(ValueError, match="validation=1: at least one source, and a share below 1"):
        problems({"a": ADDITION}, validation=1)
    with pytest.raises(ValueError, match="the least is below 1 of 1000"):
        problems({"a": ADDITION, "b": ProblemSource("sums", weight=1e-5)})
    with pytest.raises(ValueError, match="of problems 'a' none is not held out: change the share"):
        problems({"a": ADDITION}, validation=1 - 1e-15)
    with pytest.raises(ValueError, match="has no problem to train on: .*'validation': 40"):
        problems({"a": ProblemSource("file", path=questions)}, validation=1 - 1e-15)
