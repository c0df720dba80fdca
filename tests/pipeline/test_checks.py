import copy

import pytest

from configs import pipeline, quickstart
from configs.pipeline import least, measure
from jaxllm.configure import section
from jaxllm.pipeline.checks import check, check_files
from jaxllm.pipeline.config import PipelineConfig

VALUES = quickstart.get_config("tiny").to_dict()
GATE = least(0.5).to_dict()


def made(values, key="", value=None):
    """The pipeline with this change, by a key with dots between."""
    values = copy.deepcopy(values)
    *path, last = key.split(".")
    inner = values
    for name in path:
        inner = inner[name]
    if key:
        inner[last] = value
    return section(PipelineConfig, values)


def untold(config):
    if config not in {stage["config"] for stage in VALUES["stages"].values()}:
        raise ModuleNotFoundError("no such module")
    return {}


@pytest.mark.parametrize("config", [pipeline.get_config(), quickstart.get_config(), quickstart.get_config("tiny")])
def test_the_configs_are_right(config):
    check(section(PipelineConfig, config.to_dict()), untold)


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("measures.sums.metric", "acuracy", "config.measures.sums.metric='acuracy' is .*; did you mean 'accuracy'"),
        ("measures.drift.metric", "kll", "config.measures.drift.metric='kll' is none .*; did you mean 'kl'"),
        ("measures.sums.task", "additon", "config.measures.sums.task='additon' is no task; did you mean 'addition'"),
        ("measures.sums.task", "", "config.measures.sums.task='' is no task"),
        ("measures.sums.level", 0, "config.measures.sums: level=0 must be at least 1"),
        ("measures.sums.samples", 4, "config.measures.sums: samples=4 at temperature=0 are all the same"),
        ("measures.wins.temperature", -1.0, "config.measures.wins: temperature=-1.0 must be"),
        ("measures.wins.judge", "rule:stile", "config.measures.wins.judge: rule:stile .*; did you mean 'style'"),
        ("measures.wins.judge", "rewards:x", "config.measures.wins.judge: 'rewards:x' .*; did you mean 'reward'"),
        ("measures.text.shown", 1, "config.measures.text.shown=1 of the suite 'perplexity': only those of"),
        ("measures.text.file", "", "config.measures.text.file='' of the suite 'perplexity' leaves nothing to read"),
        ("stages.sft.gates.fcats", GATE, "config.stages.sft.gates.fcats is about a number .*; did you mean 'facts'"),
        ("stages.reward.gates.facts", GATE, "config.stages.reward.gates.facts is about .* 'reward' does not have"),
        ("stages.clean.gates.cought", GATE, "config.stages.clean.gates.cought is .*; did you mean 'caught'"),
        ("stages.pretrain.gates.wins", GATE, "config.stages.pretrain.gates.wins is about .* 'pretrain' does not have"),
        ("stages.grpo.gates.drawn.over", "reward", "gates.drawn.over='reward' is about a number that 'reward'"),
        ("stages.clean.run.preset", "wbe", "config.stages.clean.run: preset='wbe' is not one of"),
        ("stages.ppo.run.loop.typo", 3, "config.stages.ppo.run.loop.typo is not a known key"),
        ("stages.ppo.run.loop.steps", -1, "config.stages.ppo.run: loop.steps=-1 must be at least 0"),
        ("stages.ppo.run.stage", "rlhff", "config.stages.ppo.run.stage='rlhff' is not a stage"),
        ("stages.sft.run.data.sources.chat.pth", "x", "config.stages.sft.run: .* unexpected keyword argument 'pth'"),
        ("stages.sft.config", "configs/stf.py", "config.stages.sft.config='configs/stf.py': no such module"),
    ],
)
def test_what_no_stage_could_do_with_is_named_before_the_first(key, value, said):
    config = made(VALUES, key, value)
    with pytest.raises(ValueError, match=said):
        check(config, untold)


def test_a_number_of_validation_is_not_known_before_and_a_judge_that_is_a_run_is_not_there_yet():
    check(made(VALUES, "stages.sft.gates.validation_anything", GATE), untold)
    check(made(VALUES, "measures.wins.judge", "reward:{reward}"), untold)


def test_a_file_that_is_read_must_be_there_unless_a_stage_makes_it(tmp_path):
    check_files(made(VALUES))
    values = pipeline.get_config().to_dict()
    names = {name: str(tmp_path / name) for name in values["files"]}
    for path in names.values():
        with pytest.raises(ValueError, match="is not there: give a file, a folder or a glob"):
            check_files(made(values, "files", names))
        open(path, "w").close()
    check_files(made(values, "files", names | {"documents": f"{tmp_path}/doc*", "heldout": "embedded", "unused": "x"}))
    facts = measure("answers", "contains", "share", "max", file="no.jsonl").to_dict()
    with pytest.raises(ValueError, match="config.measures.facts.file='no.jsonl' is not there"):
        check_files(made(VALUES, "measures.facts", facts))
