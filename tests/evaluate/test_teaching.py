import dataclasses
import functools
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from jaxllm import checkpoint, stages, workdir
from jaxllm.data import columns, loader
from jaxllm.data.config import DataConfig, SourceConfig
from jaxllm.data.tokens import prepare
from jaxllm.evaluate import teaching
from jaxllm.model import build, placement
from jaxllm.run_config import run_config
from jaxllm.text.special_tokens import PAD_ID
from jaxllm.text.tokenizer import byte_tokenizer
from jaxllm.train.objectives import ObjectiveConfig, distillation, likeliest, stored_distillation

V, K, LENGTH, TEMPERATURE = 288, 3, 24, 1.5
CONFIG = ObjectiveConfig(0.0, beta=0.3, temperature=TEMPERATURE, top_k=K, store_teacher=True)
SHAPE = dict(batch_size=8, micro_batches=2, pad_id=PAD_ID)
DRAW = np.random.default_rng(0)


def sentence(index, longest):
    return "".join(DRAW.choice(list("abc é"), DRAW.integers(1, longest))) + f"#{index}"


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Texts in concatenated rows, some longer than a row, and conversations of two tasks in rows of whole ones."""
    folder = tmp_path_factory.mktemp("data")
    texts = [{"text": sentence(index, 40)} for index in range(24)]
    chats = [
        {"prompt": sentence(index, 5), "response": sentence(index, 12), "task": "ab"[index % 3 == 0]}
        for index in range(24)
    ]
    sources = {
        "texts": SourceConfig(write(folder / "texts.jsonl", texts)),
        "chats": SourceConfig(
            write(folder / "chats.jsonl", chats), format="auto", packing="best_fit_whole", tag="task", balance=0.0
        ),
    }
    config = DataConfig(sources=sources, sequence_length=LENGTH, validation=0.2)
    return config, prepare(config, byte_tokenizer(), directory=folder / "tokens")


@pytest.fixture(scope="module")
def teacher(tiny, built):
    """(model, its params); they are sharp, so that none of its likeliest tokens are equally likely."""
    model, params = built(tiny(vocab_size=V, head_width=8))
    return model, jax.tree.map(lambda x: 2 * jnp.asarray(x), params)


def ask(data, teacher, directory, read=None, **changes):
    """``taught``, of a teacher whose parameters are read by ``read``."""
    (config, stores), (model, params) = data, teacher
    options = dict(identity="teacher 1", data=config, objective=CONFIG, directory=directory, batch_size=5) | changes
    return teaching.taught(stores, model, read or (lambda: params), **options)


@pytest.fixture(scope="module")
def stores(data, teacher, tmp_path_factory):
    return ask(data, teacher, tmp_path_factory.mktemp("taught"))


# ---- what is stored ----


def test_every_pair_of_a_row_has_the_likeliest_tokens_of_its_piece_read_alone(data, teacher, stores):
    """In float64, by sorting, piece by piece and unpacked: what lies beside the first token of each pair."""
    (config, plain), (model, params) = data, teacher
    forward = jax.jit(lambda tokens_BT: model.forward(params, tokens_BT))
    pairs = 0
    for name, split in stores.items():
        for store, rows in zip(split, loader.rows_by_side(name, plain[name], config, pad_id=PAD_ID), strict=True):
            pieces = [np.transpose(some.plan.pieces(row)) for some in rows for row in range(len(some))]
            for start, count in np.concatenate(pieces):
                piece = slice(start, start + count)
                tokens = np.pad(np.int32(store.tokens[piece]), (0, LENGTH - count))
                logits = np.float64(forward(tokens[None]))[0, :count] / TEMPERATURE
                logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
                order = np.argsort(-logp, axis=-1)
                np.testing.assert_array_equal(store.columns["teacher_ids_BTK"][piece], order[:, :K])
                p = np.take_along_axis(np.exp(logp), order, -1)
                expected = np.log(np.hstack([p[:, :K], p[:, K:].sum(axis=-1, keepdims=True)]))
                np.testing.assert_allclose(
                    store.columns["teacher_logp_BTJ"][piece], expected, rtol=2**-11 + 1e-5, atol=1e-5
                )
                pairs += count
    # Every pair of the texts and of the conversations that are not dropped, each once.
    whole = [store.num_tokens - store.num_documents for split in plain.values() for store in split]
    assert 0.9 * sum(whole) < pairs <= sum(whole)


def test_every_batch_holds_what_the_teacher_says_of_it(data, teacher, stores):
    """Through shuffle, mixture, micro-batches and resumption: asked again, it says the same where there is a token."""
    (config, _), (model, params) = data, teacher
    say = jax.jit(lambda batch: jax.lax.map(lambda part: likeliest(model, CONFIG)(params, part), batch))
    train = loader.train_batches(stores, config, **SHAPE)
    read = [next(train) for _ in range(4)]
    held_out = [batch for each in loader.validation_by_source(stores, config, **SHAPE).values() for batch in each]
    for batch in read + held_out:
        said = say({name: batch[name] for name in teaching.INPUTS if name in batch})
        real = batch["segments_BT"] > 0
        assert batch["teacher_ids_BTK"].shape == (2, 4, LENGTH, K) and np.any(real)
        np.testing.assert_array_equal(batch["teacher_ids_BTK"][real], said["teacher_ids_BTK"][real])
        np.testing.assert_allclose(batch["teacher_logp_BTJ"][real], said["teacher_logp_BTJ"][real], rtol=2**-10)
        assert not np.any(batch["teacher_ids_BTK"][~real]) and not np.any(batch["teacher_logp_BTJ"][~real])
    again = loader.train_batches(stores, config, **SHAPE)
    again.set_state({"next_batch": 2})
    for batch, same in zip(read[2:], again, strict=False):
        jax.tree.map(np.testing.assert_array_equal, batch, same)


def test_a_reference_is_asked_of_each_answer_behind_its_prompt(teacher, tmp_path):
    """In float64, document by document and unpacked; its prompt, read once, has what the first of them says of it."""
    model, params = teacher
    records = [
        {"prompt": sentence(index, 5), "chosen": sentence(index, 9), "rejected": sentence(index, 9) + "."}
        for index in range(6)
    ]
    records.append({"prompt": "alone", "completion": "liked", "label": True})
    files = {"pairs": records[:-1], "thumbs": records[-1:]}
    how = dict(format="preference", packing="best_fit_whole")
    sources = {name: SourceConfig(write(tmp_path / f"{name}.jsonl", some), **how) for name, some in files.items()}
    config = DataConfig(sources=sources, sequence_length=2 * LENGTH, validation=0.0)
    plain = prepare(config, byte_tokenizer(), directory=tmp_path)
    how = dict(identity="reference", data=config, directory=tmp_path, batch_size=3)
    found = teaching.referred(plain, model, lambda: params, **how)
    forward = jax.jit(lambda tokens_BT: model.forward(params, tokens_BT))
    asked = 0
    for split in found.values():
        store = split.train
        for start, end, unit in zip(store.offsets, store.offsets[1:], store.units, strict=False):
            first, rest = store.tokens[start : start + unit["second"]], store.tokens[start + unit["second"] : end]
            logp = [np.zeros(0)]
            for ids, skipped in ((first, 0), (np.concatenate([first[: unit["shared"]], rest]), unit["shared"])):
                if len(ids):
                    logits = np.float64(forward(np.pad(np.int32(ids), (0, 2 * LENGTH - len(ids)))[None]))[0]
                    every = np.log(np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True))
                    logp.append(np.append(every[np.arange(len(ids) - 1), ids[1:]], 0.0)[skipped:])
            learned = np.append(store.supervised[start + 1 : end], False)
            expected = np.where(learned, np.concatenate(logp), 0.0)
            np.testing.assert_allclose(store.columns["ref_logp_BT"][start:end][learned], expected[learned], atol=1e-4)
            asked += learned.sum()
    assert asked == sum(split.train.supervised.sum() for split in plain.values()) > 50


def test_a_batch_without_a_teacher_is_what_it_was(data, stores):
    config, plain = data
    batch, taught = (next(loader.train_batches(each, config, **SHAPE)) for each in (plain, stores))
    assert taught.keys() - batch.keys() == {"teacher_ids_BTK", "teacher_logp_BTJ"}
    jax.tree.map(np.testing.assert_array_equal, batch, {name: taught[name] for name in batch})


def test_what_is_stored_is_narrow_and_the_rest_of_the_store_is_as_it_was(data, stores):
    (_, plain), store = data, stores["texts"].train
    assert {name: (x.dtype, x.shape) for name, x in store.columns.items()} == {
        "teacher_ids_BTK": (np.uint16, (plain["texts"].train.num_tokens, K)),
        "teacher_logp_BTJ": (np.float16, (plain["texts"].train.num_tokens, K + 1)),
    }
    assert (store.num_bytes, store.report) == (plain["texts"].train.num_bytes, plain["texts"].train.report)


def test_a_log_probability_that_no_float16_holds_is_the_least_of_them(data, teacher, tmp_path):
    model, params = teacher
    cold = ObjectiveConfig(0.0, temperature=1e-6, top_k=K, store_teacher=True)
    store = ask(data, teacher, tmp_path, objective=cold)["texts"].train
    logp = store.columns["teacher_logp_BTJ"]
    assert np.all(np.isfinite(logp)) and np.any(logp == np.finfo(np.float16).min)


# ---- learning from it ----


@functools.partial(jax.jit, static_argnums=0)
def gradients(loss, params, batch, **frozen):
    return jax.value_and_grad(loss, has_aux=True)(params, batch, **frozen)


def test_stored_and_online_have_the_same_loss_and_gradient_up_to_float16(data, teacher, stores, tiny, built):
    student, params = built(tiny(vocab_size=V, num_layers=1))
    params = jax.tree.map(jnp.asarray, params)
    config = ObjectiveConfig(0.0, beta=0.3, temperature=TEMPERATURE, hard_weight=0.0, top_k=K)
    batch = {name: x[0] for name, x in next(loader.train_batches(stores, data[0], **SHAPE)).items()}
    batch |= {"weight_BT": batch["mask_BT"] / np.float32(batch["mask_BT"].sum())}
    plain = {name: x for name, x in batch.items() if "teacher" not in name}
    (loss, metrics), gradient = gradients(stored_distillation(student, config), params, batch)
    online = distillation(student, teacher[0], config)
    (expected_loss, expected_metrics), expected = gradients(online, params, plain, teacher_params=teacher[1])
    np.testing.assert_allclose(loss, expected_loss, rtol=2e-3)
    np.testing.assert_allclose(metrics["jsd"].total, expected_metrics["jsd"].total, rtol=2e-3)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-3 * np.abs(y).max()), gradient, expected)


# ---- when it is asked ----


def places(directory):
    return sorted(path.name for path in directory.iterdir())


def test_what_is_stored_is_not_asked_again_nor_are_the_parameters_read(data, teacher, stores, tmp_path):
    first = ask(data, teacher, tmp_path)

    def unread():
        raise AssertionError("the teacher was read")

    again = ask(data, teacher, tmp_path, unread, batch_size=2)
    assert first == again and len(places(tmp_path)) == 4
    # Another directory has the same: what it holds is decided by its name.
    assert [store.fingerprint for split in stores.values() for store in split] == [
        store.fingerprint for split in again.values() for store in split
    ]


@pytest.mark.parametrize(
    "reading, changes",
    [
        ({}, dict(identity="teacher 2")),
        ({}, dict(objective=ObjectiveConfig(0.0, temperature=TEMPERATURE, top_k=K + 1))),
        ({}, dict(objective=ObjectiveConfig(0.0, temperature=1.0, top_k=K))),
        (dict(sequence_length=LENGTH + 8), {}),
        (dict(packing="best_fit"), {}),
        (dict(packing="best_fit_whole"), {}),
    ],
)
def test_another_teacher_question_or_reading_is_stored_apart(data, teacher, stores, reading, changes, tmp_path):
    config, plain = data
    changed = dataclasses.replace(config, **reading), {"texts": plain["texts"]}
    other = ask(changed, teacher, tmp_path, **changes)["texts"].train
    known = stores["texts"].train
    assert other.beside.name != known.beside.name
    assert len({other.fingerprint, known.fingerprint, plain["texts"].train.fingerprint}) == 3
    batches = [loader.train_batches({"texts": each}, config, **SHAPE) for each in (plain["texts"], stores["texts"])]
    assert batches[0].fingerprint != batches[1].fingerprint


def test_rows_of_each_task_apart_are_stored_apart(data, teacher, stores, tmp_path):
    config, plain = data
    mixed = dataclasses.replace(config, sources={"chats": dataclasses.replace(config.sources["chats"], balance=1.0)})
    other = ask((mixed, {"chats": plain["chats"]}), teacher, tmp_path)["chats"].train
    assert other.beside.name != stores["chats"].train.beside.name


def test_a_teacher_killed_while_it_is_asked_leaves_nothing_that_is_taken_for_whole(
    data, teacher, tmp_path, monkeypatch
):
    real, asked = teaching._asking, []

    def dying(*arguments):
        answer = real(*arguments)

        def ask(batch):
            asked.append(batch)
            if len(asked) == 2:
                raise KeyboardInterrupt
            return answer(batch)

        return ask

    monkeypatch.setattr(teaching, "_asking", dying)
    with pytest.raises(KeyboardInterrupt):
        ask(data, teacher, tmp_path)
    assert places(tmp_path) == []
    asked.clear()
    monkeypatch.setattr("jaxllm.data.tokens.shutil.rmtree", lambda *_, **__: None)
    with pytest.raises(KeyboardInterrupt):  # killed so hard that nothing is cleared away
        ask(data, teacher, tmp_path)
    assert len(places(tmp_path)) == 1 and ".partial-" in places(tmp_path)[0]
    monkeypatch.undo()
    assert np.any(ask(data, teacher, tmp_path)["texts"].train.columns["teacher_ids_BTK"])


def test_columns_cut_short_are_named_with_the_mend(data, teacher, tmp_path):
    store = ask(data, teacher, tmp_path)["chats"].train
    path = store.beside / "teacher_logp_BTJ.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"beside the tokens in .*chats-teacher.* are damaged .*delete them"):
        ask(data, teacher, tmp_path)


def test_to_another_process_goes_the_place_and_not_the_numbers(stores):
    store = stores["texts"].train
    sent = pickle.dumps(store)
    again = pickle.loads(sent)
    assert len(sent) < 1000 and again == store
    jax.tree.map(np.testing.assert_array_equal, again.columns, store.columns)


def test_a_mesh_stores_the_same(data, teacher, stores, mesh, tmp_path):
    model, params = teacher
    placed = jax.device_put(params, placement(model, mesh))
    found = ask(data, teacher, tmp_path, lambda: placed, batch_size=8)
    for name, split in stores.items():
        for store, other in zip(split, found[name], strict=True):
            np.testing.assert_array_equal(other.columns["teacher_ids_BTK"], store.columns["teacher_ids_BTK"])
            logp, expected = (np.float32(x.columns["teacher_logp_BTJ"]) for x in (other, store))
            np.testing.assert_allclose(logp, expected, rtol=2**-10)


def test_several_processes_and_a_whole_vocabulary_are_refused(data, teacher, tmp_path, monkeypatch):
    everything = ObjectiveConfig(0.0, top_k=V)
    with pytest.raises(ValueError, match="top_k=288 must be at least 1 and less than the teacher's vocabulary of 288"):
        ask(data, teacher, tmp_path, objective=everything)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="a teacher is asked by one process: start the run on one first, with a data"):
        ask(data, teacher, tmp_path)
    assert places(tmp_path) == []


def test_a_source_that_holds_nothing_out_is_stored_on_one_side(data, teacher, tmp_path):
    config, _ = data
    config = DataConfig(sources={"texts": config.sources["texts"]}, sequence_length=LENGTH, validation=0.0)
    plain = prepare(config, byte_tokenizer(), directory=tmp_path)
    split = ask((config, plain), teacher, tmp_path)["texts"]
    assert isinstance(split.train, columns.AnnotatedStore) and split.validation is plain["texts"].validation


# ---- the stage ----


@pytest.fixture(scope="module")
def values(data, tmp_path_factory):
    """The config of a tiny distillation, from the run of an untrained teacher."""
    values = common.get_config()
    values.model = common.llama(num_layers=1, width=8, mlp_width=8, num_heads=2, num_kv_heads=1, head_width=4)
    values.tokenizer.kind = "bytes"
    values.data.sources.main.path = data[0].sources["texts"].path
    values.data.update(dict(validation=0.2, sequence_length=16))
    values.loop.update(dict(batch_size=8, micro_batches=2))
    values.objective.update(dict(top_k=K, store_teacher=True))
    values.stage, values.teacher = "distill", str(tmp_path_factory.mktemp("teacher") / "run")
    return values.to_dict()


def save_teacher(values, seed):
    directory = workdir.open(values["teacher"], values)
    byte_tokenizer().save(directory / "tokenizer")
    model = build(run_config(values).model.with_vocabulary(V))
    with checkpoint.open(directory / "checkpoints") as checkpoints:
        params = jax.jit(model.init)(jax.random.key(seed))
        checkpoints.save(seed, {"params": params}, position=None, meta={})


def test_the_stage_reads_the_teacher_from_the_batches_alone_and_a_new_checkpoint_is_a_new_teacher(values, tmp_path):
    save_teacher(values, 1)
    config = run_config(values)
    first, again = (stages.distill(config, tmp_path) for _ in range(2))
    assert not first.frozen and not first.rollout and first.batches.fingerprint == again.batches.fingerprint
    validation = first.validation["main"]
    for batches in (first.batches, iter(validation)):
        batch = first.prepare(None, {name: x[0] for name, x in next(batches).items()})
        params = first.model.init(jax.random.key(0))
        loss, metrics = jax.jit(first.objective)(params, batch)
        assert np.isfinite(loss) and set(metrics) == {"nll", "jsd"}
    first.batches.close()
    save_teacher(values, 2)
    other = stages.distill(config, tmp_path)
    assert other.batches.fingerprint != first.batches.fingerprint
    assert len([path for path in (tmp_path / "tokens").iterdir() if "-teacher-" in path.name]) == 4
