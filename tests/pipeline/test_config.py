import copy
from pathlib import Path
from statistics import fmean

import pytest

from configs import pipeline, quickstart
from jaxllm.configure import section
from jaxllm.data import lessons
from jaxllm.pipeline.config import GateConfig, PipelineConfig, changed, flat, placed
from jaxllm.run_config import run_config

ROOT = Path(pipeline.__file__).parent.parent
VALUES = pipeline.get_config().to_dict()


def made(**changes):
    """The pipeline with these changes, by keys with dots between."""
    values = copy.deepcopy(VALUES)
    for key, value in changes.items():
        *path, last = key.split("/")
        inner = values
        for name in path:
            inner = inner[name]
        inner[last] = value
    return section(PipelineConfig, values)


@pytest.mark.parametrize("config", [pipeline.get_config(), quickstart.get_config(), quickstart.get_config("tiny")])
def test_every_stage_of_the_configs_stands_in_order_behind_a_gate(config):
    read = section(PipelineConfig, config.to_dict())
    assert set(read.order) == set(read.stages)
    assert all(stage.metric in stage.gates and stage.about for stage in read.stages.values())
    assert all(measure.about for measure in read.measures.values())


@pytest.mark.parametrize("config", [pipeline.get_config(), quickstart.get_config(), quickstart.get_config("tiny")])
def test_every_run_of_the_configs_is_whole(config):
    for stage in config.stages.values():
        if stage.kind == "train":
            run_config(stage.run.to_dict())
            assert (ROOT / stage.config.partition(":")[0]).is_file()


def test_the_reward_model_of_the_quickstart_must_know_more_than_which_answer_is_shorter():
    config = quickstart.get_config()
    pairs = lessons.lessons(lessons.Plan(**config.stages.lessons.run))["preferences"]
    shorter = fmean(len(pair["chosen"]) < len(pair["rejected"]) for pair in pairs)
    assert 0.7 < shorter < config.stages.reward.gates.validation_accuracy.value - 0.1


@pytest.mark.parametrize("module", [pipeline, quickstart])
def test_a_pipeline_says_its_command_and_refuses_an_unknown_argument(module):
    assert "python experiments/quickstart.py" in module.__doc__
    with pytest.raises(ValueError, match="takes no argument.* not 'tinny'"):
        module.get_config("tinny")


@pytest.mark.parametrize(
    "key, value, said",
    [
        (
            "stages/sft/kind",
            "trian",
            "config.stages.sft: kind='trian' of a stage is not one of .*; did you mean 'train'",
        ),
        ("stages/sft/metric", "fact", "config.stages.sft: metric='fact' has no gate"),
        ("stages/clean/measured", True, "config.stages.clean: measured=True of a stage of kind='clean'"),
        ("stages/sft/attempts", 0, "attempts=0 must be at least 1"),
        ("stages/sft/adjust", {}, "attempts=2, but adjust says nothing to change"),
        ("stages/sft/adjust", {"loop": {"step": 2.0}}, "adjust.loop.step is no number .*; did you mean 'loop.steps'"),
        ("stages/sft/adjust", {"start": 2.0}, "adjust.start is no number of the stage's run"),
        ("stages/sft/adjust", {"loop": {"steps": 1.0}}, "adjust.loop.steps=1.0 changes nothing"),
        ("stages/sft/adjust", {"loop": {"steps": -1.0}}, "adjust.loop.steps=-1.0 .* no factor above 0"),
        ("stages/ppo/gates/wins/adjust", {"loop": {"steps": 0}}, "gates.wins.adjust.loop.steps=0 changes nothing"),
        ("stages/ppo/gates/wins/adjust", {"seeds": 2.0}, "adjust.seeds is no number .*; did you mean 'seed'"),
        ("stages/sft/run/start", "{dpo}", "config.stages.sft.run.start='{dpo}' names 'dpo': no stage before it"),
        ("stages/sft/run/start", "{pretrained}", "names 'pretrained': .*; did you mean 'pretrain'"),
        (
            "stages/sft/run/loop/sample_prompts",
            ("{pretrane}",),
            "sample_prompts=.* names 'pretrane'.*; did you mean 'pretrain'",
        ),
        ("stages/ppo/gates/wins/over", "dpo", "config.stages.ppo.gates.wins.over='dpo' is no stage before it"),
        ("stages/ppo/gates/wins/bound", "lest", "config.stages.ppo: gates.wins: bound='lest' of a gate is not one of"),
        ("stages/ppo/gates/wins/value", float("nan"), "value=nan of a gate is not finite"),
        ("stages/ppo/atempts", 2, "config.stages.ppo.atempts is not a known key; did you mean 'attempts'"),
        ("measures/wins/suite", "wins", "config.measures.wins: suite='wins' of a measure"),
        ("measures/wins/against", "", "against='' of the suite 'win_rate'"),
        ("measures/wins/against", "sfx", "config.measures.wins.against='sfx' is no stage .*; did you mean 'sft'"),
        ("measures/wins/against", "clean", "config.measures.wins.against='clean' is no stage that leaves a model"),
        (
            "measures/text/file",
            "{helout}",
            "config.measures.text.file='{helout}' names 'helout'.*; did you mean 'heldout'",
        ),
        ("files/heldout", "{clena}/x", "config.files.heldout='{clena}/x' names 'clena'"),
        ("order", ("clean",), "order=.* must have each stage of"),
    ],
)
def test_what_is_wrong_is_named_with_its_mend(key, value, said):
    with pytest.raises(ValueError, match=said):
        made(**{key: value})


def test_a_file_that_a_stage_makes_is_not_there_before_it():
    assert made(**{"files/questions": "{reward}/questions.jsonl"}).files["questions"] == "{reward}/questions.jsonl"
    with pytest.raises(
        ValueError, match="config.stages.sft.run.data.sources.chat.path='{instructions}' names 'instructions'"
    ):
        made(**{"files/instructions": "{reward}/x.jsonl"})


def test_a_gate_is_passed_on_its_bound_and_never_by_what_is_not_known():
    least, most = GateConfig("least", 0.5, "", {}), GateConfig("most", 0.5, "", {})
    assert least.passed(0.5) and not least.passed(0.4999) and not least.passed(float("nan"))
    assert most.passed(0.5) and not most.passed(0.5001) and not most.passed(float("nan"))


def test_leaves_are_named_with_dots_and_changed_one_by_one():
    values = {"loop": {"steps": 3, "log": {"every": 1}}, "seed": 0}
    assert flat(values) == {"loop.steps": 3, "loop.log.every": 1, "seed": 0}
    assert changed(values, {"loop.log.every": 7}) == {"loop": {"steps": 3, "log": {"every": 7}}, "seed": 0}
    assert changed(values, {}) == values


def test_places_are_filled_in_everywhere_and_through_files():
    places = {"lessons": "runs/lessons", "documents": "{lessons}/d.jsonl"}
    values = {"a": "{documents}", "b": ("x", "{lessons}/y"), "c": {"d": 3}, "e": "no place {} {or this one}"}
    filled = {"a": "runs/lessons/d.jsonl", "b": ("x", "runs/lessons/y"), "c": {"d": 3}, "e": values["e"]}
    assert placed(values, places) == filled
