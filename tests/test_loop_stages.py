"""Whole runs of the stages that start from another run: what they write, and that they go on bit for bit."""

import functools
import json
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import common, rl
from jaxllm import checkpoint, figures, hardware, loop, metrics, sharding
from jaxllm.evaluate import rewarding
from jaxllm.rl import experience
from jaxllm.text.chat import Conversation

TIMES = {"seconds", "tokens_per_second", "rollout_tokens_per_second", "mfu"}  # and what ends with _seconds, may differ
SIZES = dict(num_layers=1, width=16, mlp_width=16, num_heads=4, num_kv_heads=2, head_width=8, operand_dtype="float32")


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Runs neither measure the machine nor draw."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardware, "peak_flops", lambda dtype: (1e12, "stated"))
        patch.setattr(figures, "curves", lambda rows, path: None)
        yield


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Texts to pretrain on, and questions whose answers are one word that the texts never have."""
    place = tmp_path_factory.mktemp("sources")
    texts = [{"text": f"{a} plus {b} is {a + b}. " * 3} for a in range(8) for b in range(8)]
    chats = [{"prompt": f"Say {a} plus {b}", "response": "zzz"} for a in range(8) for b in range(8)]
    pairs = [{"prompt": f"Say {a} plus {b}", "chosen": "zzz", "rejected": "no"} for a in range(8) for b in range(8)]
    for name, records in (("text", texts), ("chat", chats), ("pairs", pairs)):
        (place / f"{name}.json").write_text(json.dumps(records), encoding="utf-8")
    return place


def config_of(sources, stage, **changes):
    config = common.get_config()
    config.model, config.tokenizer.kind, config.stage = common.llama(**SIZES), "bytes", stage
    config.data.sources = {"text": common.source(str(sources / "text.json"))}
    if stage in ("reward", "preference"):
        pairs = common.source(str(sources / "pairs.json"), format="preference", packing="best_fit_truncated")
        config.data.sources = {"pairs": pairs}
    elif stage != "pretrain":
        chat = common.source(str(sources / "chat.json"), format="auto", packing="best_fit_whole", weights=(3.0,))
        config.data.sources.chat = chat
    config.data.update(dict(validation=0.2, sequence_length=64))
    config.optimizer.update(dict(warmup=1, learning_rate=2e-2))
    config.loop.update(
        dict(steps=8, batch_size=8, micro_batches=1, log_every=2, save_every=4, sample_prompts=("Say 1",))
    )
    config.loop.update(dict(evaluate_every=4, sample_every=8, sample_tokens=6))
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return config.to_dict()


def train(values, directory, *, stop_at=0):
    """Runs the loop; SIGTERM arrives where step ``stop_at`` has just been dispatched."""

    class Stopping(loop.Log):
        def add(self, step, batch, measured):
            super().add(step, batch, measured)
            if step == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Log", Stopping)
        try:
            loop.run(values, directory)
        except loop.Preempted:
            assert stop_at  # -1: for another reason
    return directory


def rows(directory, name="metrics.jsonl"):
    found = metrics.read(directory / name)
    return [{key: row[key] for key in row.keys() - TIMES if not key.endswith("_seconds")} for row in found]


def params(directory):
    return checkpoint.restore_params(directory / "checkpoints")


def assert_same_run(one, other):
    written = {path.name for path in one.glob("*.jsonl")}
    assert written == {path.name for path in other.glob("*.jsonl")}
    for name in written:
        assert rows(one, name) == rows(other, name), name
    same = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), params(one), params(other))
    assert all(jax.tree.leaves(same))


@pytest.fixture(scope="module")
def pretrained(sources, tmp_path_factory):
    return train(config_of(sources, "pretrain"), tmp_path_factory.mktemp("runs") / "pretrain")


@pytest.fixture(scope="module")
def fine_tuning(sources, pretrained):
    """The config of a fine-tuning with everything on that has a state or is random."""
    how = dict(start=str(pretrained), objective__neftune_alpha=5.0, model__dropout=0.1, model__width=99)
    return config_of(sources, "sft", **how, loop__evaluate_first=True, loop__evaluate_answers=6)


@pytest.fixture(scope="module")
def fine_tuned(fine_tuning, tmp_path_factory):
    return train(fine_tuning, tmp_path_factory.mktemp("runs") / "sft")


def test_fine_tuning_starts_from_what_the_other_run_ended_with(pretrained, fine_tuned):
    before, first = rows(pretrained)[-1], rows(fine_tuned)[0]
    assert first["step"] == 0
    assert first["validation_loss/text"] == pytest.approx(before["validation_loss"], rel=1e-5)
    assert json.loads((fine_tuned / "config.json").read_text())["model"]["width"] == SIZES["width"]


def test_fine_tuning_teaches_the_answers_and_writes_how_they_come_nearer(fine_tuned):
    measured = [row for row in rows(fine_tuned) if "validation_loss" in row]
    assert [row["step"] for row in measured] == [0, 4, 8]
    assert measured[-1]["validation_loss/chat"] < measured[0]["validation_loss/chat"] - 1.5
    answers = rows(fine_tuned, "answers.jsonl")
    assert [row["step"] for row in answers] == [0] * 6 + [4] * 6 + [8] * 6
    for row in measured:
        own = [answer for answer in answers if answer["step"] == row["step"]]
        assert row["validation_rouge_l"] == pytest.approx(np.mean([answer["rouge_l"] for answer in own]))
    assert answers[0]["prompt"].startswith("<|bos|><|user|>Say ") and answers[0]["reference"] == "zzz"


def test_a_fine_tuning_that_was_stopped_goes_on_bit_for_bit(fine_tuning, fine_tuned, tmp_path):
    train(fine_tuning, tmp_path / "run", stop_at=3)
    assert_same_run(train(fine_tuning, tmp_path / "run"), fine_tuned)


def test_a_student_that_samples_half_of_its_batches_goes_on_bit_for_bit(sources, pretrained, tmp_path):
    values = config_of(sources, "distill", teacher=str(pretrained), objective__student_fraction=0.5, model__width=8)
    values["loop"] |= dict(evaluate_answers=4)
    straight = train(values, tmp_path / "straight")
    train(values, tmp_path / "run", stop_at=5)
    assert_same_run(train(values, tmp_path / "run"), straight)
    learned = [row["validation_jsd"] for row in rows(straight) if "validation_jsd" in row]
    assert learned[-1] < learned[0]
    teacher = jax.tree.map(np.asarray, params(pretrained))
    assert not jax.tree.map(np.shape, params(straight)) == jax.tree.map(np.shape, teacher)


@pytest.mark.parametrize("at_once, saved", [(True, []), (False, [2])])
def test_a_best_metric_that_no_validation_measures_is_named_and_costs_no_progress(
    fine_tuning, tmp_path, at_once, saved
):
    changed = {"best_metric": "validation_loss/chta", "evaluate_every": 2, "evaluate_first": at_once}
    values = fine_tuning | {"loop": fine_tuning["loop"] | changed}
    with pytest.raises(
        ValueError, match="loop.best_metric='validation_loss/chta' is no metric .*'validation_loss/chat'.*; correct it"
    ):
        loop.run(values, tmp_path / "run")
    assert list(checkpoint.whole_steps(tmp_path / "run" / "checkpoints")) == saved


def test_a_request_to_start_elsewhere_is_another_config(fine_tuning, fine_tuned, tmp_path):
    with pytest.raises(FileNotFoundError, match="no run in .*nowhere"):
        loop.run(fine_tuning | {"start": str(tmp_path / "nowhere")}, fine_tuned)


# ---- preferences ----


@pytest.fixture(scope="module")
def preferring(sources, pretrained):
    how = dict(start=str(pretrained), model__dropout=0.1, loop__evaluate_first=True, loop__evaluate_answers=4)
    return config_of(sources, "preference", **how, optimizer__learning_rate=3e-3)


@pytest.fixture(scope="module")
def preferred(preferring, tmp_path_factory):
    return train(preferring, tmp_path_factory.mktemp("runs") / "dpo")


def test_preference_tuning_starts_at_its_reference_and_leaves_it(preferred):
    """C8: dropout is in the config, and not in the loss."""
    first, last = (row for row in rows(preferred) if row["step"] in (0, 8) and "validation_margin" in row)
    assert first["validation_loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert abs(first["validation_margin"]) < 1e-5 and abs(first["validation_kl"]) < 1e-4
    assert last["validation_accuracy"] > 0.95 and last["validation_loss"] < 0.65 and last["validation_kl"] > 0.01
    trained = next(row for row in rows(preferred) if "loss" in row)
    assert trained["margin"] > 0 and trained["chosen_nll"] > 0


def test_a_preference_tuning_that_was_stopped_goes_on_bit_for_bit(preferring, preferred, tmp_path):
    train(preferring, tmp_path / "run", stop_at=3)
    assert_same_run(train(preferring, tmp_path / "run"), preferred)


def test_a_reference_that_was_trained_on_is_another(preferring, pretrained, tmp_path):
    copy = shutil.copytree(pretrained, tmp_path / "reference")
    values = preferring | {"reference": str(copy)}
    train(values, tmp_path / "run", stop_at=3)
    step = next(checkpoint.whole_steps(copy / "checkpoints"))
    (copy / "checkpoints" / str(step)).rename(copy / "checkpoints" / "99")
    with pytest.raises(ValueError, match=rf"models.ref_params: saved 'step {step} \(.*\)', now 'step 99 \("):
        loop.run(values, tmp_path / "run")


def test_a_stored_reference_gives_the_numbers_of_a_live_one(preferring, preferred, tmp_path):
    stored = preferring | {"preference": preferring["preference"] | {"store_reference": True}}
    directory = train(stored, tmp_path / "run")
    for one, other in zip(rows(directory), rows(preferred), strict=True):
        for name in ("loss", "margin", "validation_loss", "validation_margin"):
            assert one.get(name, 0.0) == pytest.approx(other.get(name, 0.0), abs=1e-4), (name, one["step"])
    assert list((directory / "tokens").glob("pairs-reference-*"))


def test_answers_one_by_one_come_from_the_same_pairs(preferring, tmp_path):
    kto = preferring | {"preference": preferring["preference"] | {"loss": "kto"}}
    kto["loop"] = kto["loop"] | {"evaluate_answers": 0}
    first, last = (
        row for row in rows(train(kto, tmp_path / "run")) if row["step"] in (0, 8) and "validation_loss" in row
    )
    assert first["validation_loss"] == pytest.approx(0.5, abs=1e-5)
    assert last["validation_chosen_log_ratio"] > 0 > last["validation_rejected_log_ratio"]


@pytest.fixture(scope="module")
def rewarding_config(sources, pretrained):
    """The config of a reward model."""
    how = dict(start=str(pretrained), model__scalar_head=True, loop__evaluate_first=True, loop__sample_every=0)
    return config_of(sources, "reward", **how, loop__best_metric="validation_pair_loss")


@pytest.fixture(scope="module")
def rewarded(rewarding_config, tmp_path_factory):
    return train(rewarding_config, tmp_path_factory.mktemp("rewarded") / "run")


def test_a_reward_model_starts_from_a_policy_with_a_new_head_and_goes_on_bit_for_bit(
    sources, rewarding_config, rewarded, tmp_path, capsys
):
    """C10: nothing else is new, and the scale of its rewards is kept with the checkpoint."""
    values, straight = rewarding_config, rewarded
    first, last = (row for row in rows(straight) if row["step"] in (0, 8) and "validation_accuracy" in row)
    assert first["validation_accuracy"] == 0.5 and first["validation_pair_loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert last["validation_accuracy"] > 0.95
    train(values, tmp_path / "run", stop_at=3)
    said = capsys.readouterr().err
    assert "starts from" in said and "new and 0: scalar_head/bias, scalar_head/kernel" in said
    assert rows(train(values, tmp_path / "run")) == rows(straight)
    scale = rewarding.scale(straight)
    assert scale.mean == pytest.approx(last["validation_reward"]) and scale.deviation > 0
    prompts = [Conversation(({"role": "user", "content": f"Say {a} plus 3"},)) for a in (2, 2, 5, 5)]
    found = rewarding.load([straight, straight])(prompts, ["zzz", "no", "zzz", "no"])
    assert found.mean[0] > found.mean[1] and found.mean[2] > found.mean[3] and np.all(found.spread == 0)
    with pytest.raises(ValueError, match="have a scalar head .* set model.scalar_head=True"):
        loop.run(config_of(sources, "preference", start=str(straight)), tmp_path / "dpo")


# ---- reinforcement learning ----


def arms(sources, start, algorithm, **changes):
    """A run on ten arms, of which the seventh pays best."""
    config = config_of(sources, "rl", start=str(start), data__sequence_length=40, optimizer__learning_rate=5e-3)
    policy = common.get_config().policy.to_dict() | rl.ALGORITHMS[algorithm]
    rewards = {"pay": common.reward("bandit").to_dict(), "watched": common.reward("format", weight=0.0).to_dict()}
    rollout = dict(
        completions=8,
        max_prompt_tokens=32,
        max_new_tokens=3,
        slots=5,
        shown=1,
        rewards=rewards,
        validation_temperature=1.0,
    )
    rollout["sources"] = {"arms": common.problem("bandit", level=7).to_dict()}
    config["policy"], config["rollout"] = policy, config["rollout"] | rollout
    config["model"]["scalar_head"] = policy["advantage"] == "gae"
    config["loop"] |= dict(evaluate_answers=4, best_metric="validation_reward", best_mode="max") | changes
    return config


@pytest.fixture
def two_devices(monkeypatch):
    """A mesh of two, for which programs are compiled faster than for eight."""
    monkeypatch.setattr(sharding, "mesh", functools.partial(sharding.mesh, devices=jax.devices()[:2]))


def test_models_that_reward_lie_on_the_mesh_of_the_policy(sources, pretrained, rewarded, tmp_path, two_devices):
    values = arms(sources, pretrained, "grpo", steps=2)
    learned = {"liked": ("model", str(rewarded)), "judged": ("judge", f"model:{pretrained}")}
    values["rollout"]["rewards"] |= {
        name: common.reward(kind, path=path).to_dict() for name, (kind, path) in learned.items()
    }
    told = next(row for row in rows(train(values, tmp_path / "run")) if "reward" in row)
    assert abs(told["reward/liked"]) > 1e-3 and 0 <= told["reward/judged"] <= 1


def stopping_rollout(monkeypatch):
    """SIGTERM arrives while the next rollout is sampled."""
    sampled = experience.sampled

    def stopped(*arguments, **options):
        for place, answer in enumerate(sampled(*arguments, **options)):
            if place == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield answer

    monkeypatch.setattr(experience, "sampled", stopped)


def test_ppo_that_was_stopped_between_updates_and_while_sampling_goes_on_bit_for_bit(
    sources, pretrained, tmp_path, capsys, two_devices, monkeypatch
):
    """C27: the same completions, advantages and critic after it, though two updates of a rollout were still to come.

    C32: what is asked of a run that samples is done after that step.
    """
    values = arms(sources, pretrained, "ppo", steps=6, evaluate_every=6, save_every=6, sample_every=6)
    straight = train(values, tmp_path / "straight")
    train(values, tmp_path / "run", stop_at=2)
    assert "new and 0: scalar_head/bias, scalar_head/kernel" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        stopping_rollout(patch)
        train(values, tmp_path / "run", stop_at=-1)
    assert next(checkpoint.whole_steps(tmp_path / "run" / "checkpoints")) == 5
    assert "stopped as asked and saved at step 5: the same command continues" in capsys.readouterr().err
    assert_same_run(train(values, tmp_path / "run"), straight)
    told = [row for row in rows(straight) if "reward" in row]
    assert told[0]["reward/watched"] == 0 and told[0]["value"] == 0
    assert told[0]["kl_coefficient"] == pytest.approx(0.03) and abs(told[0]["kl"]) < 1e-3
    samples = rows(straight, "samples.jsonl")
    assert len(samples) == 8 and samples[0].keys() >= {"prompt", "text", "reward", "pay"}


def test_two_hundred_steps_of_sampling_and_learning_leave_the_memory_as_it_is(
    sources, pretrained, tmp_path, monkeypatch, two_devices
):
    """C39. Arrays on the device are counted one by one; what the process holds beside them grows by noise alone."""
    resident, living = {}, {}

    class Weighing(loop.Log):
        def add(self, step, batch, measured):
            super().add(step, batch, measured)
            resident[step] = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            living[step] = len(jax.live_arrays())

    monkeypatch.setattr(loop, "Log", Weighing)
    values = arms(sources, pretrained, "grpo", steps=200, evaluate_every=200, save_every=200, log_every=1)
    loop.run(values, tmp_path / "run")
    steps = np.arange(40, 201)
    assert len({living[step] for step in steps}) == 1
    assert np.polyfit(steps, [resident[step] for step in steps], 1)[0] < 20e3  # bytes per step
