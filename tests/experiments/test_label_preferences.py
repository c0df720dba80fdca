import json

import jax
import numpy as np
import pytest

from jaxllm import workdir
from jaxllm.data import preferences
from jaxllm.data.sources import DocumentSource
from jaxllm.evaluate.answers import Answer
from jaxllm.generate import SamplerConfig
from jaxllm.serve import labelling
from jaxllm.text.special_tokens import END_ID
from jaxllm.text.tokenizer import byte_tokenizer

FLAGS = ("--max_new_tokens=4", "--batch_size=2", "--seed=3", "--judge=rule:concise", "--samples=2", "--top_k=7")


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """What is sampled with, in the order of calls; every second answer is of forty words, the others of two."""
    calls = []

    def sampled(model, params, ids, key, *, known, **how):
        calls.append((params["embedding"]["table"], ids, jax.random.key_data(key).tolist(), how))
        for row in set(range(len(ids))) - known:
            yield row, Answer([*byte_tokenizer().encode("word " * (40 if row % 2 else 2)), END_ID], True)

    monkeypatch.setattr(labelling, "answered", sampled)
    return calls


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "questions.txt"
    path.write_text("Say a.\nSay be.\nSay see.\n")
    return path


def lines(path):
    return sorted(path.read_text(encoding="utf-8").splitlines()) if path.exists() else []


def test_pairs_are_written_that_preference_training_reads_and_the_same_command_changes_nothing(
    script, untrained_run, prompts, asked, tmp_path
):
    out = tmp_path / "out.jsonl"
    flags = (f"--workdir={untrained_run}", f"--prompts={prompts}", f"--out={out}", "--temperature=0.5", *FLAGS)
    status, printed, said = script("label_preferences.py", *flags)
    assert status == 0, said
    assert printed == f"{out}: 3 written\njudge: ties 0.000, longer_wins 0.000\n"
    found = [
        record.parsed(lambda value: preferences.preferences(value, preferences.detected(value)))
        for record in DocumentSource(str(out)).records()
    ]
    assert {each.prompt.messages[0]["content"] for (each,) in found} == {"Say a.", "Say be.", "Say see."}
    for (each,) in found:
        assert (each.chosen_score, each.rejected_score, each.margin) == (1, 0, 1)
        assert len(each.chosen[0]["content"]) < len(each.rejected[0]["content"])
    _, params, tokenizer = workdir.load(untrained_run)
    ((table, ids, key, how),) = asked
    np.testing.assert_array_equal(table, params["embedding"]["table"])
    assert [tokenizer.decode(each) for each in ids] == [
        f"<|bos|><|user|>Say {word}.<|end|><|assistant|>" for word in ("a", "be", "see") for _ in range(2)
    ]
    assert key == jax.random.key_data(jax.random.key(3)).tolist()
    assert how == dict(max_new_tokens=4, sampler=SamplerConfig(0.5, top_k=7), batch_size=2, stop_ids=(8, 3))
    before = lines(out)
    assert script("label_preferences.py", *flags)[:2] == (0, printed) and lines(out) == before
    assert (
        "judge: 'rule:concise' there, 'rule:polite' here"
        in script("label_preferences.py", *flags, "--judge=rule:polite")[0]
    )
    assert "step: 2 there, 1 here" in script("label_preferences.py", *flags, "--step=1")[0]
    prompts.write_text("Say nothing.\n")
    assert "source: '" in script("label_preferences.py", *flags)[0]


def test_the_best_answers_alone_are_conversations(script, untrained_run, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    flags = (f"--workdir={untrained_run}", f"--prompts={prompts}", f"--out={out}", *FLAGS, "--best", "--limit=2")
    status, _, said = script("label_preferences.py", *flags)
    assert status == 0, said
    records = [json.loads(line) for line in lines(out)]
    assert {record["messages"][0]["content"] for record in records} == {"Say a.", "Say be."}
    assert all(record["messages"][1] == {"role": "assistant", "content": "word word "} for record in records)


def test_what_is_missing_is_one_message_and_the_help_names_every_flag(script, untrained_run, prompts, tmp_path):
    flags = (f"--prompts={prompts}", f"--out={tmp_path}/out.jsonl", *FLAGS)
    assert "FileNotFoundError: no run in" in script("label_preferences.py", f"--workdir={tmp_path}", *flags)[0]
    status, *_ = script("label_preferences.py", f"--workdir={untrained_run}", *flags, "--judge=rule:stile")
    assert status.startswith("ValueError: rule:stile is not a known judge; did you mean 'style'?")
    status, printed, _ = script("label_preferences.py", "--help")
    names = (
        "workdir prompts judge out best samples limit temperature top_k top_p min_p max_new_tokens batch_size seed step"
    )
    assert status == 0 and all(f"--{name}" in printed for name in names.split())
