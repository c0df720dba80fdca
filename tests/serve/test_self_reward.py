import io
import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from configs import common
from jaxllm import checkpoint, workdir
from jaxllm.configure import section
from jaxllm.evaluate import judges
from jaxllm.evaluate.answers import Answer
from jaxllm.evaluate.judges import by_score
from jaxllm.generate import SamplerConfig
from jaxllm.model import DecoderConfig, build
from jaxllm.serve import dataset, labelling, self_reward
from jaxllm.serve.self_reward import Manner, rounds, table
from jaxllm.text.chat import Conversation
from jaxllm.text.special_tokens import END_ID
from jaxllm.text.tokenizer import byte_tokenizer

PROMPTS = [Conversation(({"role": "user", "content": f"p{n}"},)) for n in range(3)]
QUESTIONS = [Conversation(({"role": "user", "content": f"q{n}"},)) for n in range(4)]
MANNER = Manner("rule:marks", samples=3, sampler=SamplerConfig(), max_new_tokens=4, batch_size=4, seed=5)


def marks(prompts, answers):
    """Marks from 0 to 6 that depend on the question too."""
    shown = zip(prompts, answers, strict=True)
    return np.array([zlib.crc32((prompt.messages[-1]["content"] + text).encode()) % 7.0 for prompt, text in shown])


def own(model, params, tokenizer):
    """A judge with a taste of its own for each run's parameters."""
    taste = str(np.asarray(params["embedding"]["table"]).sum())
    judge = by_score(lambda prompts, answers: marks(prompts, [taste + answer for answer in answers]))

    def judged(*given):
        judgement = judge(*given)
        return judgement._replace(scores=None, report={"consistency": float(np.mean(judgement.wins != 0.5))})

    return judged


def sampled(model, params, prompts, key, *, known=(), **how):
    """Answers of one to four letters that follow from the parameters, the key and the row, with no model asked."""
    first = int(np.asarray(params["embedding"]["table"]).view(np.uint32)[0, 0])
    for row in sorted(range(len(prompts)), key=lambda row: row % 2):
        if row not in known:
            draw = np.random.default_rng([first, *np.asarray(jax.random.key_data(key)).tolist(), row])
            letters = draw.choice(list("abcdefgh"), size=draw.integers(1, 5))
            yield row, Answer([*TOKENIZER.encode("".join(letters)), END_ID], True)


def config():
    """A config with the sizes of the run that it starts from."""
    config = common.get_config()
    sizes = dict(num_layers=1, width=8, mlp_width=8, num_heads=2, num_kv_heads=1, head_width=4)
    config.model = common.llama(**sizes, operand_dtype="float32")
    config.data.sources = {"replay": common.source(), "own": common.source("?", format="pairs")}
    return config


TOKENIZER = byte_tokenizer()
SHAPES = jax.eval_shape(build(section(DecoderConfig, config().model).with_vocabulary(288)).init, jax.random.key(0))


def saved(directory, values, seed):
    """A run with one checkpoint of its own parameters."""
    directory = workdir.open(directory, values)
    TOKENIZER.save(directory / "tokenizer")
    params = jax.tree.map(lambda x: jnp.full(x.shape, seed + 1.0), SHAPES)
    with checkpoint.open(directory / "checkpoints") as checkpoints:
        checkpoints.save(1, {"params": params}, position=None, meta={})
    return str(directory)


class World:
    """Where rounds are made: `values` start from a run, and training draws new parameters and notes what it was told.

    The judges are rule:marks, and each run's own.
    """

    def __init__(self, folder, patch):
        self.folder, self.trained, self.values = folder, [], config().to_dict()
        self.values["start"] = saved(folder / "start", self.values, 0)
        patch.setitem(judges.KINDS, "rule", lambda name: by_score(marks))
        patch.setattr(judges, "prompted", own)
        for module in (labelling, dataset):
            patch.setattr(module, "answered", sampled)
        patch.setattr(self_reward.loop, "run", self.train)

    def train(self, values, directory):
        self.trained.append((values, directory))
        saved(directory, json.loads(json.dumps(values)), len(self.trained))

    def rounds(self, count, *, name="rounds", prompts=PROMPTS, **manner):
        manner = Manner(**{**vars(MANNER), **manner})
        return rounds(self.values, self.folder / name, prompts, QUESTIONS, manner, count=count)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        yield World(tmp_path_factory.mktemp("world"), patch)


@pytest.fixture(scope="module")
def rows(world):
    return world.rounds(2)


def test_each_round_labels_with_itself_and_trains_from_the_one_before(world, rows, tmp_path):
    values, directory = world.values, world.folder / "rounds"
    assert [row["round"] for row in rows] == [0, 1, 2]
    runs = [values["start"], *(str(directory / f"round_{n}" / "run") for n in (1, 2))]
    done = world.trained[:2]
    assert [(trained["start"], at) for trained, at in done] == [(runs[0], runs[1]), (runs[1], runs[2])]
    for number, (trained, _) in enumerate(done, 1):
        pairs = directory / f"round_{number}" / "pairs.jsonl"
        assert trained["data"]["sources"]["own"]["path"] == str(pairs)
        assert {**trained, "start": values["start"], "data": values["data"]} == values
        assert trained["data"]["sources"]["replay"] == values["data"]["sources"]["replay"]
        # The labels of this round are those that the run before gives by its own judgement.
        speaker = workdir.load(runs[number - 1])
        how = dict(choice=labelling.PAIR, samples=3, made_by={}, seed=5 + number, **MANNER.sampling)
        again = tmp_path / f"again_{number}.jsonl"
        labels = labelling.write(again, PROMPTS, *speaker, own(*speaker), **how)
        assert labels.counts["written"] > 0 and again.read_text() == pairs.read_text()
        told = labels.counts | labels.report
        assert {name: rows[number][name] for name in told} == told


def test_a_row_has_what_the_outside_judge_says_of_the_answers_and_of_the_pairs(world, rows, tmp_path):
    directory, texts = world.folder / "rounds", []
    for number, run in enumerate((world.values["start"], directory / "round_1" / "run")):
        model, params, tokenizer = workdir.load(run)
        tasks = [self_reward._task(question, tokenizer) for question in QUESTIONS]
        path = tmp_path / f"answers_{number}.jsonl"
        dataset.write(path, tasks, model, params, made_by={}, seed=5, stop_ids=TOKENIZER.stop_ids, **MANNER.sampling)
        found = {row["task"]: row["answer"] for row in dataset.whole_records(path)}
        texts.append([found[n] for n in range(4)])
    before, after = (marks(QUESTIONS, each) for each in texts)
    assert rows[1]["score"] == after.mean() != before.mean() == rows[0]["score"]
    assert rows[1]["win_rate"] == np.mean((after > before) + (after == before) / 2) != 0.5 == rows[0]["win_rate"]
    assert rows[1]["low"] < rows[1]["win_rate"] < rows[1]["high"]
    assert rows[1]["characters"] == np.mean([len(text) for text in texts[1]])
    pairs = dataset.whole_records(directory / "round_1" / "pairs.jsonl")
    asked = [Conversation(tuple(row["prompt"])) for row in pairs]
    chosen, rejected = (marks(asked, [row[name][0]["content"] for row in pairs]) for name in ("chosen", "rejected"))
    assert rows[1]["agreement"] == np.mean((chosen > rejected) + (chosen == rejected) / 2)
    assert "agreement" not in rows[0]


def test_rounds_that_are_done_are_not_done_again_and_an_interrupted_one_goes_on(world, rows, monkeypatch):
    def killed(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(self_reward.loop, "run", killed)
    assert world.rounds(2) == rows
    with pytest.raises(KeyboardInterrupt):
        world.rounds(3)
    pairs = world.folder / "rounds" / "round_3" / "pairs.jsonl"
    labelled = pairs.read_text()
    monkeypatch.setattr(self_reward.loop, "run", world.train)
    monkeypatch.setattr(labelling, "answered", lambda *given, known, **how: iter(set(range(9)) - set(known)))
    more = world.rounds(3)
    assert pairs.read_text() == labelled
    assert more[:3] == rows and more[3]["round"] == 3 and "consistency" in more[3]


def test_what_cannot_be_is_refused(world, rows):
    with pytest.raises(ValueError, match="manner.samples: 3 there, 2 here"):
        world.rounds(2, samples=2)
    with pytest.raises(ValueError, match="prompts: "):
        world.rounds(2, prompts=PROMPTS[:2])
    with pytest.raises(ValueError, match="'nobody' is not the name of a judge"):
        world.rounds(0, name="new", outside="nobody")
    values = {**world.values, "data": {**world.values["data"], "sources": {}}}
    with pytest.raises(ValueError, match="data.sources has no source of preferences"):
        rounds(values, world.folder / "new", PROMPTS, QUESTIONS, MANNER, count=1)


def test_a_round_whose_judge_decides_nothing_ends_the_work(world, monkeypatch):
    monkeypatch.setitem(judges.KINDS, "rule", lambda name: by_score(lambda p, answers: np.zeros(len(answers))))
    done = len(world.trained)
    with pytest.raises(ValueError, match="round 1: the judge prefers no answer to any of 3 prompts .*'tie': 3"):
        world.rounds(1, name="undecided", judge="rule:none")
    assert len(world.trained) == done


def test_the_table_has_a_line_for_each_round():
    rows = [
        {"round": 0, "score": 1.5, "characters": 80.0, "win_rate": 0.5, "low": 0.4, "high": 0.6},
        {
            "round": 1,
            "score": 2.25,
            "characters": 70.0,
            "win_rate": 0.75,
            "low": 0.7,
            "high": 0.8,
            "position_bias": -0.7,
        },
    ]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table(rows))
    *_, first, second = (line for line in console.export_text().splitlines() if line.strip())
    assert first.split() == "0 1.50 80.00 50.0% (40% to 60%)".split()
    assert second.split() == "1 -0.70 2.25 70.00 75.0% (70% to 80%)".split()
