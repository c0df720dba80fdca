from types import SimpleNamespace

from configs import common
from jaxllm.generate import SamplerConfig
from jaxllm.serve import self_reward
from jaxllm.serve.self_reward import Manner

ROW = {"round": 0, "score": 1.5, "characters": 80.0, "win_rate": 0.5, "low": 0.4, "high": 0.6}


def test_flags_become_rounds_and_their_rows_a_table(script, monkeypatch, tmp_path):
    given = SimpleNamespace()

    def rounds(values, directory, prompts, questions, manner, *, count):
        vars(given).update(locals())
        return [ROW]

    monkeypatch.setattr(self_reward, "rounds", rounds)
    (tmp_path / "prompts.txt").write_text("a?\nb?\nc?\n")
    (tmp_path / "questions.txt").write_text("d?\n")
    (tmp_path / "config.py").write_text("from configs import common\nget_config = common.get_config\n")
    status, printed, said = script(
        "self_reward.py",
        *(f"--{name}={tmp_path}/{file}" for name, file in (("config", "config.py"), ("workdir", "out"))),
        *(f"--{name}={tmp_path}/{name}.txt" for name in ("prompts", "questions")),
        *"--config.start=runs/sft --outside=rule:style --judge=rule:polite --rounds=2 --limit=2 --samples=5".split(),
        *"--temperature=0.5 --max_new_tokens=9 --batch_size=3 --seed=7".split(),
    )
    assert status == 0, said
    assert "50.0% (40% to 60%)" in printed
    expected = common.get_config()
    expected.start = "runs/sft"
    assert given.values == expected.to_dict() and given.directory == f"{tmp_path}/out" and given.count == 2
    asked = [[prompt.messages[0]["content"] for prompt in each] for each in (given.prompts, given.questions)]
    assert asked == [["a?", "b?"], ["d?"]]
    assert given.manner == Manner("rule:style", "rule:polite", 5, SamplerConfig(0.5), 9, 3, 7)
