import dataclasses
import json

import jax
import numpy as np
import pytest

from configs import common
from jaxllm import checkpoint, stages, workdir
from jaxllm.run_config import resolved, run_config
from jaxllm.text.special_tokens import PAD_ID

TEXTS = [f"document {index}: " + "some words and é " * (index % 5) for index in range(40)]


@pytest.fixture
def values(tmp_path):
    """A function: changed keys, by dotted name -> the config of a tiny run, as the loop takes it."""
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")

    def values(**changes):
        config = common.get_config()
        config.model = common.llama(num_layers=1, width=8, mlp_width=8, num_heads=2, num_kv_heads=1, head_width=4)
        config.tokenizer.kind = "bytes"
        config.data.sources.main.path = str(path)
        config.data.update(dict(validation=0.2, sequence_length=16))
        config.loop.update(dict(batch_size=8, micro_batches=2))
        config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
        return config.to_dict()

    return values


def pretrain(values, directory):
    return stages.STAGES["pretrain"](run_config(values), directory)


# ---- the configuration of a run ----


def test_every_key_of_the_common_config_reaches_its_dataclass(values):
    config, given = run_config(values()), values()
    assert config.loop.sample_prompts == tuple(given["loop"]["sample_prompts"])
    for name in ("tokenizer", "model", "optimizer", "objective", "preference", "reward", "mesh", "loop"):
        assert {field.name for field in dataclasses.fields(getattr(config, name))} == given[name].keys()
    assert config.data.sources["main"].path == given["data"]["sources"]["main"]["path"]


@pytest.mark.parametrize(
    ("section", "key", "message"),
    [
        (None, "sead", r"config.sead is not a known key; did you mean 'seed'\?"),
        ("loop", "batchsize", r"config.loop.batchsize is not a known key; did you mean 'batch_size'\?"),
        ("optimizer", "lr_warmup", r"config.optimizer.lr_warmup is not a known key; did you mean 'warmup'\?"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(values, section, key, message):
    given = values()
    (given[section] if section else given)[key] = 1
    with pytest.raises(ValueError, match=message):
        run_config(given)


def test_a_missing_key_is_named(values):
    given = values()
    del given["loop"]["steps"]
    with pytest.raises(ValueError, match="config.loop.steps is missing; configs/common.py holds its default"):
        run_config(given)


def test_an_unknown_stage_names_the_nearest_one(values):
    with pytest.raises(ValueError, match=r"config.stage='pretrian' is not a stage; did you mean 'pretrain'\?"):
        stages.named(values(stage="pretrian")["stage"])


@pytest.mark.parametrize(
    "key", ["batch_size", "micro_batches", "log_every", "evaluate_every", "save_every", "sample_tokens"]
)
def test_counts_below_one_are_refused_by_name(values, key):
    with pytest.raises(ValueError, match=f"loop.{key}=0 must be at least 1"):
        run_config(values(**{f"loop__{key}": 0}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(loop__sample_every=-1), "loop.sample_every=-1 must be at least 0"),
        (dict(loop__evaluate_batches=-1), "loop.evaluate_batches=-1 must be at least 0"),
        (dict(loop__sample_prompts=()), "loop.sample_prompts is empty: .*loop.sample_every=0"),
        (dict(loop__keep_last=0), "keep_last=0 must be at least 1"),
    ],
)
def test_values_that_would_fail_at_a_later_step_are_refused_at_once(values, changes, message):
    with pytest.raises(ValueError, match=message):
        run_config(values(**changes))


# ---- pretraining ----


def test_pretraining_makes_batches_a_model_of_the_tokenizers_size_and_a_report(values, tmp_path):
    stage = pretrain(values(), tmp_path / "run")
    batch = next(stage.batches)
    assert {array.shape for array in batch.values()} == {(2, 4, 16)}
    assert stage.model.config.vocab_size == stage.tokenizer.vocab_size == 288
    report = stage.report["main"]
    assert report["train"]["num_documents"] + report["validation"]["num_documents"] == len(TEXTS)
    assert report["train"]["num_bytes"] + report["validation"]["num_bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert all((batch["tokens_BT"] == PAD_ID)[batch["segments_BT"] == 0])
    stage.batches.close()


def test_preparing_weighs_every_token_of_all_micro_batches_the_same(values, tmp_path):
    stage = pretrain(values(data__packing="best_fit", data__sequence_length=60), tmp_path / "run")
    batch = next(stage.batches)
    weights = np.asarray(stage.prepare(None, batch)["weight_BT"])
    np.testing.assert_allclose(weights, batch["mask_BT"] / batch["mask_BT"].sum(), rtol=1e-6)
    first, second = batch["mask_BT"].sum(axis=(1, 2))
    assert 0 < first != second > 0
    stage.batches.close()


def test_the_objective_is_the_mean_over_tokens_when_micro_batches_are_added(values, tmp_path):
    stage = pretrain(values(data__packing="best_fit", model__operand_dtype="float32"), tmp_path / "run")
    batch, params = next(stage.batches), stage.model.init(jax.random.key(0))
    prepared = stage.prepare(None, batch)
    parts = [stage.objective(params, {name: array[m] for name, array in prepared.items()}) for m in range(2)]
    nlls = []
    for m in range(2):
        named = {name: batch[name][m] for name in ("positions_BT", "segments_BT")}
        logp_BTV = jax.nn.log_softmax(stage.model.forward(params, batch["tokens_BT"][m], **named))
        picked = np.take_along_axis(np.asarray(logp_BTV), batch["targets_BT"][m][..., None], -1)[..., 0]
        nlls.append(-picked[batch["mask_BT"][m]])
    assert float(sum(loss for loss, _ in parts)) == pytest.approx(np.mean(np.concatenate(nlls)), rel=1e-5)
    total = parts[0][1]["nll"] + parts[1][1]["nll"]
    assert float(total.count) == sum(map(len, nlls))
    stage.batches.close()


def test_the_tokenizer_and_the_tokens_are_made_once_and_found_again(values, tmp_path):
    pretrain(values(), tmp_path / "run").batches.close()
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {path.relative_to(tmp_path / "run").parts[0] for path in made} == {"tokenizer", "tokens"}
    again = pretrain(values(), tmp_path / "run")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()} == made
    again.batches.close()


def test_a_cache_is_shared_between_runs(values, tmp_path):
    for run in ("a", "b"):
        pretrain(values(data__cache=str(tmp_path / "cache")), tmp_path / run).batches.close()
        assert not (tmp_path / run / "tokens").exists()
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_tokenizer_is_learned_from_the_training_documents_alone(tmp_path, values):
    """A word that only the held-out file has does not become a piece."""
    train, held_out = tmp_path / "train.jsonl", tmp_path / "held_out.jsonl"
    train.write_text("".join(json.dumps({"text": f"apple banana cherry {i}"}) + "\n" for i in range(50)))
    held_out.write_text("".join(json.dumps({"text": f"zzyzxqq {i}"}) + "\n" for i in range(50)))
    changes = dict(tokenizer__kind="sentencepiece", tokenizer__vocab_size=320)
    paths = dict(data__sources__main__path=str(train), data__sources__main__validation_path=str(held_out))
    stage = pretrain(values(**changes, **paths), tmp_path / "run")
    assert len(stage.tokenizer.encode("banana")) < 5 < len(stage.tokenizer.encode("zzyzxqq"))
    assert stage.report["main"]["validation"]["num_documents"] == 50
    stage.batches.close()


def test_other_data_or_another_order_is_another_fingerprint(values, tmp_path):
    def fingerprint(name, **changes):
        stage = pretrain(values(**changes), tmp_path / name)
        stage.batches.close()
        return stage.batches.fingerprint

    first = fingerprint("a")
    assert fingerprint("b") == first
    assert fingerprint("c", data__shuffle_seed=1) != first
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text + "!"}) + "\n" for text in TEXTS))
    assert fingerprint("d") != first


# ---- limited ----


def test_limited_takes_the_first_ones_and_all_where_it_is_zero():
    assert list(stages.limited([1, 2, 3], 2)) == [1, 2]
    assert list(stages.limited([1, 2, 3], 9)) == [1, 2, 3] == list(stages.limited([1, 2, 3], 0))


def test_limited_reads_no_further_than_it_needs():
    def batches():
        yield 1
        raise AssertionError("read too far")

    assert list(stages.limited(batches(), 1)) == [1]


# ---- starting from another run, imitation of conversations, a teacher ----

QUESTIONS = [{"instruction": f"What is {n} and {n}?", "output": f"{2 * n}."} for n in range(40)]


@pytest.fixture
def chat_values(values, tmp_path):
    """As ``values``, of conversations and texts mixed."""
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(QUESTIONS), encoding="utf-8")

    def chat_values(**changes):
        given = values(**{"stage": "sft", "data__sequence_length": 48} | changes)
        text = given["data"]["sources"]["main"]
        chat = text | {"path": str(path), "format": "auto", "packing": "best_fit_whole"}
        given["data"]["sources"] = {"text": text, "chat": chat}
        return given

    return chat_values


def saved_run(given, directory):
    """A run directory with the config, the tokenizer and a checkpoint of random parameters."""
    stage = stages.STAGES[given["stage"]](run_config(given), workdir.open(directory, given))
    stage.batches.close()
    with checkpoint.open(directory / "checkpoints") as checkpoints:
        checkpoints.save(1, {"params": jax.jit(stage.model.init)(jax.random.key(5))}, position=None, meta={})
    return str(directory)


def staged(given, directory):
    given = resolved(given)
    stage = stages.STAGES[given["stage"]](run_config(given), directory)
    stage.batches.close()
    return stage


def test_a_run_takes_architecture_and_tokenizer_of_the_one_it_starts_from_and_computes_in_its_own_way(values, tmp_path):
    tokens = dict(tokenizer__kind="sentencepiece", tokenizer__vocab_size=320)
    start = saved_run(values(model__width=12, model__unroll=1, **tokens), tmp_path / "start")
    stage = staged(values(start=start, model__dropout=0.25, model__operand_dtype="float32"), tmp_path / "run")
    assert stage.model.config.width == 12 and stage.tokenizer.vocab_size == 320 == stage.model.config.vocab_size
    assert (stage.model.config.dropout, stage.model.config.operand_dtype) == (0.25, "float32")
    assert stage.model.config.unroll == values()["model"]["unroll"] != 1
    assert stage.keys == ("dropout_key",)
    expected = jax.jit(stage.model.init)(jax.random.key(5))
    jax.tree.map(np.testing.assert_array_equal, stage.start.params(), expected)


def test_a_start_that_is_no_run_is_named(values, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no run in {tmp_path / 'nowhere'}: config.json is missing"):
        resolved(values(start=str(tmp_path / "nowhere")))


def test_fine_tuning_learns_answers_and_replayed_texts_whole_and_asks_as_a_user(chat_values, tmp_path):
    stage = staged(chat_values(objective__neftune_alpha=5.0, loop__evaluate_answers=2), tmp_path / "run")
    spelled = set()
    for batch in stage.validation["chat"]:
        spelled |= set(stage.tokenizer.decode(batch["targets_BT"][batch["mask_BT"]]).split("<|end|>"))
    assert len(spelled) > 2 and spelled <= {record["output"] for record in QUESTIONS} | {""}
    assert all(batch["mask_BT"][batch["segments_BT"] > 0].all() for batch in stage.validation["text"])
    assert stage.tokenizer.decode(stage.prompt("Hello?")) == "<|bos|><|user|>Hello?<|end|><|assistant|>"
    assert stage.keys == ("noise_key",) and len(stage.prompts) == 2
    rows = stage.report["chat"]["rows"]["chat"]
    assert 0 < rows["supervised_fraction"] < 0.5 and rows["pad_fraction"] < 0.5


def test_fine_tuning_on_texts_alone_is_refused(values, tmp_path):
    with pytest.raises(ValueError, match=r"config.stage='sft' needs conversations, .* set one's format to 'auto'"):
        staged(values(stage="sft"), tmp_path / "run")


def test_a_student_at_random_reads_the_tokenizer_of_its_teacher_whose_parameters_stay_apart(values, tmp_path):
    tokens = dict(tokenizer__kind="sentencepiece", tokenizer__vocab_size=320)
    teacher = saved_run(values(model__width=12, **tokens), tmp_path / "teacher")
    stage = staged(values(stage="distill", teacher=teacher, model__width=8), tmp_path / "run")
    assert stage.tokenizer.vocab_size == 320 and stage.model.config.width == 8
    assert stage.frozen["teacher_params"].model.config.width == 12 and stage.rollout is None


def test_a_teacher_is_needed_and_one_with_another_tokenizer_is_refused(values, chat_values, tmp_path):
    with pytest.raises(ValueError, match="config.teacher='' names no run to learn from"):
        staged(values(stage="distill"), tmp_path / "none")
    start = saved_run(values(), tmp_path / "start")
    teacher = saved_run(values(tokenizer__kind="sentencepiece", tokenizer__vocab_size=320), tmp_path / "teacher")
    with pytest.raises(ValueError, match=r"teacher .* has another tokenizer \(320 ids\) than the student \(288 ids\)"):
        staged(values(stage="distill", start=start, teacher=teacher), tmp_path / "run")


def test_a_student_that_writes_itself_is_asked_the_training_prompts(chat_values, tmp_path):
    teacher = saved_run(chat_values(), tmp_path / "teacher")
    given = chat_values(stage="distill", teacher=teacher, objective__student_fraction=1.0, loop__sample_tokens=4)
    given["loop"] |= dict(evaluate_answers=40)
    stage = staged(given, tmp_path / "run")
    batch, _ = stage.rollout(jax.jit(stage.model.init)(jax.random.key(0)), {}, 0)
    rows = flat(batch["tokens_BT"]), flat(batch["mask_BT"])
    asked = [tokens[: np.argmax(mask) + 1] for tokens, mask in zip(*rows, strict=True)]
    held_out = {tuple(prompt.prompt_ids) for prompt in stage.prompts}
    prompts = {tuple(stage.prompt(record["instruction"])) for record in QUESTIONS}
    assert len(asked) == 8 and {tuple(ids) for ids in asked} <= prompts - held_out
    assert flat(batch["mask_BT"]).sum(axis=1).max() <= 4


def flat(array):
    return array.reshape(-1, array.shape[-1])


# ---- preferences ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(stage="preference"), "config.start='' begins at random: preferences tune a policy"),
        (dict(stage="reward"), "config.stage='reward' needs model.scalar_head=True"),
        (
            dict(stage="reward", model__scalar_head=True),
            r"'reward' learns from preferences, but the sources \['main'\] hold texts .*format to 'preference'",
        ),
    ],
)
def test_a_stage_of_preferences_says_what_it_lacks(values, tmp_path, changes, message):
    config = run_config(values(**changes))
    with pytest.raises(ValueError, match=message):
        stages.STAGES[config.stage](config, tmp_path / "run")


def test_fine_tuning_does_not_learn_rejected_answers(values, tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([{"prompt": "a", "chosen": "b", "rejected": "c"}]))
    changed = values(stage="sft") | {
        "data": values()["data"]
        | {"sources": {"pairs": common.source(str(path), format="preference", packing="best_fit_whole").to_dict()}}
    }
    with pytest.raises(ValueError, match=r"would learn the rejected answers of \['pairs'\] too: set .*'chosen'"):
        stages.sft(run_config(changed), tmp_path / "run")
