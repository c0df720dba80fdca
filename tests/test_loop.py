import functools
import json
import math
import os
import pathlib
import random
import re
import resource
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from jaxllm import checkpoint, figures, hardware, loop, metrics, sharding, stages
from jaxllm.data.loader import batch_fingerprint
from jaxllm.evaluate import perplexity
from jaxllm.train.update import update

ROOT = pathlib.Path(loop.__file__).parents[1]
# These alone may differ between two runs of one config.
TIMES = {"compile_seconds", "seconds", "tokens_per_second", "mfu"}


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Runs of one config share their compiled programs, and neither measure the machine nor draw."""

    @functools.cache
    def evaluator(objective, prepare, mesh):
        return perplexity.evaluator(objective, prepare, functools.partial(sharding.global_batch, on=mesh))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardware, "peak_flops", lambda dtype: (1e12, "stated"))
        patch.setattr(figures, "curves", lambda rows, path: None)
        patch.setattr(stages, "next_token", functools.cache(stages.next_token))
        patch.setattr(loop, "evaluator", lambda *given: evaluator(*given[:2], given[2].keywords["on"]))
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Sixty short documents: about a hundred rows, so that a run of these tests reads them more than once."""
    draw, path = random.Random(0), tmp_path_factory.mktemp("source") / "text.jsonl"
    words = "the a cat dog ran sat mat on and over under big small red é ☃".split()
    texts = (" ".join(draw.choices(words, k=draw.randint(3, 25))) for _ in range(60))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def make_values(source, changes=()):
    """A config with everything switched on that has a state: dropout, accumulation, average, spike guard, warm-up."""
    config = common.get_config()
    sizes = dict(
        num_layers=2,
        width=16,
        mlp_width=24,
        num_heads=4,
        num_kv_heads=2,
        head_width=8,
        loss_chunk=16,
        operand_dtype="float32",
    )
    config.model = common.llama(**sizes, dropout=0.1)
    config.tokenizer.kind = "bytes"
    config.data.sources.main.path = str(source)
    config.data.update(dict(validation=0.2, sequence_length=32, packing="best_fit"))
    config.optimizer.update(dict(warmup=9, ema_decay=0.9, spike_deviations=6.0))
    config.loop.update(dict(steps=12, batch_size=16, micro_batches=2, log_every=3, save_every=4))
    config.loop.update(dict(evaluate_every=6, sample_every=6, sample_tokens=4, sample_prompts=("the ", "a dog")))
    config.update_from_flattened_dict(dict(changes))
    return config.to_dict()


@pytest.fixture
def values(source):
    """A function: changed keys, by dotted name -> the config as the loop takes it."""
    return lambda **changes: make_values(source, {name.replace("__", "."): value for name, value in changes.items()})


def still(**changes):
    """Changes that keep the parameters as they were made."""
    return dict(optimizer__learning_rate=0.0, optimizer__warmup=0, loop__steps=1, loop__sample_every=0) | changes


class Seen(NamedTuple):
    """What a run let be seen: fingerprint of each step's batch, and its compiled programs."""

    batches: dict[int, str]
    programs: list


PROGRAMS = {}


def train(values, directory, *, at=None, **options):
    """Runs the loop in this process; ``at[step]()`` is called where that step has just been dispatched."""
    seen = Seen({}, [])
    compile_programs = loop.compile_programs

    class WatchedLog(loop.Log):
        def add(self, step, batch, measured):
            seen.batches[step] = batch_fingerprint(batch)
            super().add(step, batch, measured)
            (at or {}).get(step, lambda: None)()

    def watched_programs(config, stage, mesh):
        key = repr((config, mesh, loop.update))
        if key not in PROGRAMS:
            PROGRAMS[key] = compile_programs(config, stage, mesh)
        seen.programs.append(PROGRAMS[key])
        return PROGRAMS[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Log", WatchedLog)
        patch.setattr(loop, "compile_programs", watched_programs)
        try:
            loop.run(values, directory, **options)
        except loop.Preempted as stopped:
            assert stopped.code == loop.EXIT_PREEMPTED == 75
    return seen


NEW_PROCESS = """
import json, os, signal, sys
from jaxllm import hardware, loop
from jaxllm.data.loader import batch_fingerprint

values, directory, kill_at = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
hardware.peak_flops = lambda dtype: (1e12, "stated")

class WatchedLog(loop.Log):
    def add(self, step, batch, measured):
        print(step, batch_fingerprint(batch), flush=True)
        super().add(step, batch, measured)
        if step == kill_at:
            self.flush()
            os.kill(os.getpid(), signal.SIGKILL)

loop.Log = WatchedLog
loop.run(values, directory)
"""


def train_in_a_new_process(values, directory, *, kill_at=0, devices=8):
    """The same as ``train``, in another Python; returns the fingerprint of each step's batch."""
    environment = {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": re.sub("device_count=[0-9]+", f"device_count={devices}", os.environ["XLA_FLAGS"]),
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, "-c", NEW_PROCESS, json.dumps(values), str(directory), str(kill_at)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == (-signal.SIGKILL if kill_at else 0), done.stderr
    return {int(step): name for step, name in map(str.split, done.stdout.splitlines())}


def stop():
    os.kill(os.getpid(), signal.SIGTERM)


def rows(directory, name="metrics.jsonl"):
    """What was written, without what only clocks decide."""
    return [{key: row[key] for key in row.keys() - TIMES} for row in metrics.read(directory / name)]


def final_state(seen, directory):
    """Every array of the newest checkpoint by name, and the position saved with it."""
    template = seen.programs[-1].template
    with checkpoint.open(directory / "checkpoints") as checkpoints:
        restored = checkpoints.restore(template, {}, ignore=("tokenizer", "data", "config"))
    names = loop.tree.names(restored.state)
    arrays = dict(zip(names, map(np.asarray, jax.tree.leaves(restored.state)), strict=True))
    return arrays, {key: value for key, value in restored.position.items() if key != "log"}


def steps_saved(directory):
    return sorted(int(path.name) for path in (directory / "checkpoints").iterdir() if path.name.isdigit())


class Reference(NamedTuple):
    """A run that nothing disturbed."""

    values: dict
    directory: pathlib.Path
    seen: Seen


@pytest.fixture(scope="module")
def straight(source, tmp_path_factory):
    values, directory = make_values(source), tmp_path_factory.mktemp("straight") / "run"
    return Reference(values, directory, train(values, directory))


def assert_same_run(straight, directory, batches):
    """Bit for bit: every batch, row, sample and array, and where the loader stands."""
    assert batches == straight.seen.batches
    assert rows(directory) == rows(straight.directory)
    assert rows(directory, "samples.jsonl") == rows(straight.directory, "samples.jsonl")
    (arrays, position), (expected, expected_position) = (
        final_state(straight.seen, place) for place in (directory, straight.directory)
    )
    assert position == expected_position and arrays.keys() == expected.keys()
    for name, array in arrays.items():
        assert array.dtype == expected[name].dtype and array.tobytes() == expected[name].tobytes(), name


# ---- a run ----


def test_a_run_leaves_everything_that_its_directory_promises(straight):
    names = {path.name for path in straight.directory.iterdir()}
    assert names == {
        "config.json", "environment.json", "tokenizer", "tokens", "checkpoints", "metrics.jsonl", "samples.jsonl",
    }  # fmt: skip
    assert json.loads((straight.directory / "config.json").read_text()) == json.loads(json.dumps(straight.values))
    environment = json.loads((straight.directory / "environment.json").read_text())
    assert environment["command"] == sys.argv and environment["packages"]["jax"] == jax.__version__
    assert environment["data"]["main"]["train"]["num_documents"] > 30 and environment["devices"] == 8
    assert steps_saved(straight.directory) == [8, 12]


def test_rows_come_at_their_periods(straight):
    written = rows(straight.directory)
    assert [row["step"] for row in written if "loss" in row] == [3, 6, 9, 12]
    assert [row["step"] for row in written if "validation_loss" in row] == [6, 12]


def test_training_lowers_the_loss(values, tmp_path):
    changes = dict(loop__steps=40, optimizer__learning_rate=1e-2, optimizer__ema_decay=0.0, loop__sample_every=0)
    train(values(**changes), tmp_path / "run")
    losses = [row["loss"] for row in rows(tmp_path / "run") if "loss" in row]
    assert losses[-1] < losses[0] - 1.0
    assert not (tmp_path / "run" / "samples.jsonl").exists()
    assert not any(name.startswith("average_") for row in rows(tmp_path / "run") for name in row)


def test_the_learning_rate_of_a_row_is_that_of_its_step(straight):
    written = {row["step"]: row["learning_rate"] for row in rows(straight.directory) if "loss" in row}
    assert written[3] == pytest.approx(1e-3 * 3 / 9) and written[12] == pytest.approx(1e-4)


def test_the_learning_rate_of_a_row_is_the_one_that_was_used_whatever_was_skipped(values, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["jaxllm.train.optimizer"], "SPIKE_HISTORY", 2)
    config = values(**still(optimizer__spike_deviations=1e-3, loop__steps=12, loop__log_every=1))
    config["optimizer"] |= dict(learning_rate=1e-3, schedule="linear", final_fraction=0.0)
    train(config, tmp_path / "run")
    written = {row["step"]: row for row in rows(tmp_path / "run") if "loss" in row}
    skipped = [0, *(written[step]["skipped"] for step in range(1, 13))]
    assert 0 < skipped[11] < 11
    for step in range(1, 13):
        assert written[step]["learning_rate"] == pytest.approx(1e-3 * (1 - (step - skipped[step - 1]) / 12), abs=1e-9)


@pytest.mark.slow
def test_another_seed_is_another_run_and_the_same_seed_the_same(straight, values, tmp_path):
    for seed in (0, 1):
        train(values(seed=seed), tmp_path / str(seed))
    assert rows(tmp_path / "0") == rows(straight.directory) != rows(tmp_path / "1")


def test_dropout_is_on_in_training_and_off_in_validation(values, tmp_path):
    found = []
    for dropout in (0.1, 0.5):
        train(values(**still(model__dropout=dropout)), tmp_path / str(dropout))
        found.append(rows(tmp_path / str(dropout)))
    assert abs(found[0][0]["loss"] - found[1][0]["loss"]) > 1e-4
    assert found[0][1]["validation_loss"] == found[1][1]["validation_loss"]


@pytest.mark.slow
def test_each_step_has_its_own_dropout(values, tmp_path, monkeypatch):
    """The same batch, without learning: only the dropped places differ."""
    changes = still(loop__steps=3, loop__log_every=1)

    def same_batch(state, batch, **rest):
        same = {name: jnp.ones_like(batch[name]) for name in ("tokens_BT", "targets_BT", "segments_BT", "mask_BT")}
        return update(state, batch | same | {"weight_BT": jnp.full_like(batch["weight_BT"], 1 / 512)}, **rest)

    monkeypatch.setattr(loop, "update", same_batch)
    train(values(**changes, model__dropout=0.5), tmp_path / "run")
    norms = [row["grad_norm"] for row in rows(tmp_path / "run") if "loss" in row]
    assert len(set(norms)) == 3


# ---- resuming ----


def test_a_run_stopped_in_the_middle_of_everything_goes_on_in_a_new_process_bit_for_bit(straight, tmp_path):
    """Step 7 lies within the warm-up, the second epoch, and the intervals of the log, the validation and the saves."""
    seen = train(straight.values, tmp_path / "run", at={7: stop})
    assert max(seen.batches) == 7 and steps_saved(tmp_path / "run") == [4, 7]
    resumed = train_in_a_new_process(straight.values, tmp_path / "run")
    assert min(resumed) == 8
    assert_same_run(straight, tmp_path / "run", seen.batches | resumed)


def test_an_epoch_ends_before_the_steps_of_the_resume_test(straight):
    data = json.loads((straight.directory / "environment.json").read_text())["data"]["main"]["train"]
    assert data["num_tokens"] / 32 < 6.5 * straight.values["loop"]["batch_size"]


@pytest.mark.parametrize("step", [1, 6])
def test_a_run_stopped_at_any_step_goes_on_bit_for_bit(straight, tmp_path, step):
    first = train(straight.values, tmp_path / "run", at={step: stop})
    second = train(straight.values, tmp_path / "run")
    assert (max(first.batches), min(second.batches)) == (step, step + 1)
    assert_same_run(straight, tmp_path / "run", first.batches | second.batches)


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_checkpoint_as_if_it_had_not_been(straight, tmp_path):
    killed = train_in_a_new_process(straight.values, tmp_path / "run", kill_at=11)
    assert max(row["step"] for row in rows(tmp_path / "run")) == 11
    resumed = train_in_a_new_process(straight.values, tmp_path / "run")
    assert min(resumed) in (5, 9)  # the save of step 8 may or may not have been whole
    assert_same_run(straight, tmp_path / "run", killed | resumed)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        dict(optimizer__name="muon", data__packing="concatenated"),
        dict(optimizer__name="adafactor", optimizer__schedule="wsd", optimizer__warmup_unit="tokens"),
        dict(optimizer__freeze_mask="table", loop__micro_batches=1, model__remat="full", data__workers=1),
    ],
    ids=["muon", "adafactor", "frozen"],
)  # fmt: skip
def test_every_optimizer_goes_on_bit_for_bit(values, tmp_path, changes):
    config = values(**changes)
    straight = Reference(config, tmp_path / "straight", train(config, tmp_path / "straight"))
    first = train(config, tmp_path / "run", at={7: stop})
    second = train(config, tmp_path / "run")
    assert_same_run(straight, tmp_path / "run", first.batches | second.batches)


def test_a_finished_run_is_left_as_it_is(straight, tmp_path):
    train(straight.values, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.jsonl")}
    assert train(straight.values, tmp_path / "run").batches == {}
    assert {path: path.read_bytes() for path in before} == before


def test_a_damaged_checkpoint_costs_only_the_steps_since_the_one_before(straight, tmp_path, caplog):
    first = train(straight.values, tmp_path / "run", at={10: stop})
    (tmp_path / "run" / "checkpoints" / "10" / "files.json").write_text("{")
    second = train(straight.values, tmp_path / "run")
    assert "10 is not whole" in caplog.text and min(second.batches) == 9
    assert_same_run(straight, tmp_path / "run", first.batches | second.batches)


# ---- another mesh ----


MESHES = [
    dict(mesh__fsdp=4, mesh__tensor=2),
    pytest.param(dict(mesh__replica=2, mesh__fsdp=2, mesh__tensor=2), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("mesh", MESHES, ids=["1x4x2", "2x2x2"])
def test_a_run_goes_on_under_another_mesh_with_the_same_values_and_one_compilation(straight, values, tmp_path, mesh):
    train(straight.values, tmp_path / "run", at={6: stop})
    before = checkpoint.restore_params(tmp_path / "run" / "checkpoints")
    placed = {}

    def keep(start):
        def started(run, ignored):
            state, position = start(run, ignored)
            placed["params"] = jax.device_get(state.params)
            placed["shardings"] = {leaf.sharding.mesh.shape_tuple for leaf in jax.tree.leaves(state)}
            return state, position

        return started

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_start", keep(loop._start))
        seen = train(values(**mesh), tmp_path / "run", accept_changes=True)
    jax.tree.map(np.testing.assert_array_equal, placed["params"], before)
    sizes = {"replica": 1} | {name.removeprefix("mesh__"): size for name, size in mesh.items()}
    assert [dict(shape) for shape in placed["shardings"]] == [sizes]
    assert seen.programs[0].step._cache_size() == 1
    assert_nearly_the_same_rows(tmp_path / "run", straight.directory)


@pytest.mark.slow
def test_a_run_saved_on_eight_devices_goes_on_on_one(straight, tmp_path):
    train(straight.values, tmp_path / "run", at={6: stop})
    resumed = train_in_a_new_process(straight.values, tmp_path / "run", devices=1)
    assert min(resumed) == 7
    assert_nearly_the_same_rows(tmp_path / "run", straight.directory)


def assert_nearly_the_same_rows(directory, reference):
    for row, expected in zip(rows(directory), rows(reference), strict=True):
        assert row == pytest.approx(expected, rel=2e-5)


# ---- stopping ----


def kill_within(monkeypatch, name):
    """The named function of the loop asks the process to stop, when it is first called."""
    original, asked = getattr(loop, name), []

    def asking(*arguments, **options):
        if not asked:
            asked.append(True)
            stop()
        return original(*arguments, **options)

    monkeypatch.setattr(loop, name, asking)


@pytest.mark.parametrize(
    ("within", "stopped_at"),
    [
        ("_start", 1),  # before the first step
        ("update", 1),  # while the step is traced and compiled
        ("validation", 7),  # during the validation of step 6
        ("continuations", 7),  # while samples are written
        ("_save", 5),  # during the save of step 4
    ],
)
def test_a_run_asked_to_stop_saves_within_one_step_and_says_so(
    straight, tmp_path, monkeypatch, capfd, within, stopped_at
):
    kill_within(monkeypatch, within)
    first = train(straight.values, tmp_path / "run")
    monkeypatch.undo()
    assert max(first.batches) == stopped_at == steps_saved(tmp_path / "run")[-1]
    assert f"stopped as asked and saved at step {stopped_at}: the same command continues" in capfd.readouterr().err
    second = train(straight.values, tmp_path / "run")
    assert f"resumed at step {stopped_at}" in capfd.readouterr().err
    assert_same_run(straight, tmp_path / "run", first.batches | second.batches)


def test_a_request_during_the_last_step_lets_the_run_end_with_its_figures(straight, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "curves", lambda rows, path: drawn.append((rows, path)))
    seen = train(straight.values, tmp_path / "run", at={12: stop})
    assert_same_run(straight, tmp_path / "run", seen.batches)
    assert drawn == [(metrics.read(tmp_path / "run" / "metrics.jsonl"), tmp_path / "run" / "figures" / "curves.png")]


def test_the_first_interrupt_stops_softly_and_the_second_at_once():
    with loop.stop_signals() as stopping:
        signal.raise_signal(signal.SIGINT)
        assert stopping.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
    with loop.stop_signals() as stopping:
        signal.raise_signal(signal.SIGTERM)
        assert stopping.is_set()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_before_there_is_anything_to_save_a_request_ends_the_run_at_once(number, capfd):
    with pytest.raises(loop.Preempted) as stopped, loop.stopped_at_once():
        signal.raise_signal(number)
    assert stopped.value.code == 75 and stopped.value.step == 0
    assert "stopped as asked before the first step: the same command begins again" in capfd.readouterr().err


def test_a_request_while_the_data_is_prepared_does_not_wait_for_it(values, tmp_path, monkeypatch):
    def prepare(*_, **__):
        stop()
        raise AssertionError("the data are prepared")

    monkeypatch.setattr(stages.tokens, "prepare", prepare)
    assert train(values(), tmp_path / "run").batches == {}


def test_the_handlers_of_before_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(ZeroDivisionError), loop.stop_signals():
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] != before
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


# ---- compiling ----


def test_nothing_compiles_once_every_kind_of_work_was_done_once(values, tmp_path):
    """37 steps with a partial last validation batch, samples and saves; at the last, off every period, all are due."""
    compiled, at_step = [], []

    def listen(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    config = values(loop__steps=37, loop__log_every=5)
    seen = train(config, tmp_path / "run", at={step: lambda: at_step.append(len(compiled)) for step in (13, 37)})
    jax.monitoring.unregister_event_duration_listener(listen)
    assert len(seen.batches) == 37 and seen.programs[0].step._cache_size() == 1
    assert 0 < at_step[0] == at_step[1] == len(compiled)
    written = rows(tmp_path / "run")
    assert [row["step"] for row in written if "loss" in row] == [*range(5, 36, 5), 37]
    assert [row["step"] for row in written if "validation_loss" in row] == [*range(6, 37, 6), 37]
    assert steps_saved(tmp_path / "run") == [36, 37]
    assert {row["step"] for row in rows(tmp_path / "run", "samples.jsonl")} == {*range(6, 37, 6), 37}


def test_the_step_takes_the_buffers_of_its_state(values):
    config = loop.run_config(values())
    mesh = sharding.mesh(config.mesh)
    with jax.set_mesh(mesh):
        programs = loop.compile_programs(
            config,
            loop.named("pretrain")(config, pathlib.Path(values()["data"]["sources"]["main"]["path"]).parent / "stage"),
            mesh,
        )
        state = programs.init(jax.random.key(0))
        assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, programs.template)
        batch = {
            name: np.ones((2, 8, 32), np.int32) for name in ("tokens_BT", "targets_BT", "positions_BT", "segments_BT")
        }
        batch |= {"mask_BT": np.ones((2, 8, 32), bool)}
        after, _ = programs.step(state, sharding.global_batch(batch, mesh), {})
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert int(after.step) == 1


# ---- honest numbers ----


def test_rows_count_every_token_that_was_read_and_no_padding(straight, values, tmp_path):
    config = loop.run_config(values())
    stage = loop.named("pretrain")(config, tmp_path)
    tokens, pads, counted = 0, {}, {}
    for step in range(1, 13):
        segments_BT = next(stage.batches)["segments_BT"]
        tokens += np.count_nonzero(segments_BT)
        pads[step], counted[step] = np.mean(segments_BT == 0), tokens
    stage.batches.close()
    written = [row for row in rows(straight.directory) if "loss" in row]
    assert [row["tokens"] for row in written] == [counted[step] for step in (3, 6, 9, 12)]
    for row in written:
        expected = np.mean([pads[step] for step in range(row["step"] - 2, row["step"] + 1)])
        assert row["pad_fraction"] == pytest.approx(expected) and 0 < expected < 0.5


def test_speed_is_that_of_the_steps_after_the_first_whose_time_stands_apart(straight):
    first, *others = [row for row in metrics.read(straight.directory / "metrics.jsonl") if "loss" in row]
    assert first["compile_seconds"] > first["seconds"] and not any("compile_seconds" in row for row in others)
    for before, row in zip([first, *others], others, strict=False):
        assert row["tokens_per_second"] * row["seconds"] == pytest.approx(row["tokens"] - before["tokens"])
    config = loop.run_config(straight.values)
    model = config.model.with_vocabulary(288)
    flops = loop.flops_per_token(model, config.data.sequence_length)
    assert others[0]["mfu"] == pytest.approx(others[0]["tokens_per_second"] * flops / 1e12)


# ---- validation ----


def test_validation_does_not_depend_on_the_batch_size_or_the_mesh(values, tmp_path):
    found = []
    for size, micro, fsdp, tensor in ((16, 2, 8, 1), (40, 1, 4, 2)):
        changes = dict(loop__batch_size=size, loop__micro_batches=micro, mesh__fsdp=fsdp, mesh__tensor=tensor)
        train(values(**still(**changes)), tmp_path / str(size))
        found.append(rows(tmp_path / str(size))[-1])
    # A perplexity is its loss's exponential, and its error the loss's times the loss.
    tolerance = {name: 1e-5 if name.endswith("perplexity") else 1e-6 for name in found[0]}
    assert all(found[1][name] == pytest.approx(found[0][name], rel=tolerance[name]) for name in tolerance), found


def test_validation_counts_every_held_out_byte_once(straight):
    held_out = json.loads((straight.directory / "environment.json").read_text())["data"]["main"]["validation"]
    targets = held_out["num_tokens"] - held_out["num_documents"]
    row = rows(straight.directory)[-1]
    assert row["validation_perplexity"] == pytest.approx(math.exp(row["validation_loss"]))
    expected = row["validation_loss"] * targets / math.log(2) / held_out["num_bytes"]
    assert row["validation_bits_per_byte"] == pytest.approx(expected, rel=1e-9)


def test_the_average_of_the_parameters_is_validated_beside_them(straight, values, tmp_path):
    row = rows(straight.directory)[-1]
    assert 1e-3 < abs(row["average_validation_loss"] - row["validation_loss"]) < 1
    train(values(**still()), tmp_path / "run")
    row = rows(tmp_path / "run")[-1]
    assert row["average_validation_loss"] == pytest.approx(row["validation_loss"], rel=1e-6)


def test_the_best_checkpoint_is_kept_beside_the_newest(values, tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 5.0, 4.0, 6.0])
    monkeypatch.setattr(loop, "_validation", lambda *_: {"validation_loss": next(losses)})
    changes = dict(loop__evaluate_every=2, loop__save_every=2, loop__keep_last=1, loop__keep_best=1)
    train(values(**changes, loop__sample_every=0), tmp_path / "run")
    assert steps_saved(tmp_path / "run") == [4, 12]


# ---- samples ----


def test_samples_are_written_as_they_evolve(straight):
    written = rows(straight.directory, "samples.jsonl")
    assert [(row["step"], row["prompt"]) for row in written] == [(6, "the "), (6, "a dog"), (12, "the "), (12, "a dog")]
    assert all(isinstance(row["text"], str) for row in written)


# ---- what goes wrong ----


def finite_checkpoint(directory):
    (step,) = steps_saved(directory)[-1:]
    assert all(
        np.isfinite(leaf).all() for leaf in jax.tree.leaves(checkpoint.restore_params(directory / "checkpoints"))
    )
    return step


def poisoned(monkeypatch, name, step):
    """The named metric of this step is NaN, and so are the parameters after it."""

    def poisoned_update(state, batch, **rest):
        after, measured = update(state, batch, **rest)
        poison = jnp.where(state.step + 1 == step, jnp.nan, 0.0)
        params = jax.tree.map(lambda x: x + poison, after.params)
        return after._replace(params=params), measured | {name: measured[name] + poison}

    monkeypatch.setattr(loop, "update", poisoned_update)


@pytest.mark.parametrize(("name", "step"), [("loss", 8), pytest.param("grad_norm", 10, marks=pytest.mark.slow)])
def test_a_number_that_is_not_finite_stops_the_run_and_saves_nothing_of_it(straight, tmp_path, monkeypatch, name, step):
    """Step 8 is one that would have been saved."""
    poisoned(monkeypatch, name, step)
    with pytest.raises(FloatingPointError) as raised:
        train(straight.values, tmp_path / "run")
    message, number = str(raised.value), "loss is nan" if name == "loss" else "gradient norm nan"
    assert number in message and f"at step {step} (batch {straight.seen.batches[step]})" in message
    for mend in ("optimizer.learning_rate", "optimizer.warmup", "optimizer.spike_deviations", "model.operand_dtype"):
        assert mend in message
    assert finite_checkpoint(tmp_path / "run") == (4 if step == 8 else 8)
    monkeypatch.undo()
    train(straight.values, tmp_path / "run")
    assert rows(tmp_path / "run") == rows(straight.directory)


def test_an_absurd_learning_rate_is_stopped_by_name(values, tmp_path):
    config = values(optimizer__learning_rate=1e18, optimizer__warmup=0, loop__save_every=1, optimizer__ema_decay=0.0)
    with pytest.raises(FloatingPointError, match=r"at step \d+ \(batch [0-9a-f]{16}\).*lower optimizer.learning_rate"):
        train(config, tmp_path / "run")
    assert finite_checkpoint(tmp_path / "run") >= 1


# TensorStore goes on for a while in its own threads, with nobody left to tell.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_stops_the_run_and_the_last_checkpoint_stays(straight, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    wanted = r"saving .*failed in .*checkpoints: .*Newest whole checkpoint: 4. Free space"

    def fill():
        for _ in range(3000):  # the save of step 4 goes on in the background: the disk is full only after it
            if 4 in checkpoint.whole_steps(tmp_path / "run" / "checkpoints"):
                break
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, hard))

    try:
        with pytest.raises(OSError, match=wanted):
            train(straight.values, tmp_path / "run", at={7: fill})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert finite_checkpoint(tmp_path / "run") == 4
    train(straight.values, tmp_path / "run")
    assert rows(tmp_path / "run") == rows(straight.directory)


def test_a_row_that_cannot_be_written_stops_the_run(straight, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match=r"step 3 could not be written to .*metrics.jsonl"):
            train(
                straight.values, tmp_path / "run", at={2: lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))}
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(loop__batch_size=8), r"a micro-batch of 4 sequences is not a multiple of mesh replica x fsdp = 8; raise"),
        (dict(loop__batch_size=15), r"batch_size=15 is not a multiple of micro_batches=2"),
        (dict(mesh__fsdp=3), r"mesh.fsdp=3 x mesh.tensor=1 is 3 devices, but there are 8; make the product 8"),
        (dict(optimizer__warmup=12), r"optimizer.warmup of 12 steps leaves nothing of loop.steps=12; lower it"),
        (dict(data__sequence_length=1), r"sequence_length=1 is too short: a row needs at least 2"),
        (dict(data__validation=0.0001), r"60 documents, and none for validation .*change validation"),
        (dict(tokenizer__kind="sentencepiece"), r"vocab_size=4096 is larger than the corpus supports: at most \d+"),
        (dict(model__num_kv_heads=3), r"num_heads=4 is not a multiple of model.num_kv_heads=3"),
        (dict(stage="pretrian"), r"config.stage='pretrian' is not a stage; did you mean 'pretrain'"),
    ],
)
def test_what_cannot_run_is_refused_by_name_and_value_with_the_mend(values, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(values(**changes), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_of_no_steps_saves_the_model_as_it_begins_for_another_to_start_from(values, tmp_path):
    none = values(loop__steps=0, optimizer__warmup=0)
    assert not train(none, tmp_path / "none").batches and steps_saved(tmp_path / "none") == [0]
    (row,) = rows(tmp_path / "none")
    assert row["step"] == 0 and row["validation_loss"] == pytest.approx(math.log(288), rel=0.05)
    train(none, tmp_path / "none")
    assert len(rows(tmp_path / "none")) == 1 and steps_saved(tmp_path / "none") == [0]
    begun = train(values(loop__steps=1, optimizer__warmup=0, start=str(tmp_path / "none")), tmp_path / "begun")
    assert list(begun.batches) == [1]


# ---- a directory that holds a run ----


def test_another_config_is_refused_and_accepted_on_request_which_shows_the_change(straight, values, tmp_path, capfd):
    changed = values(optimizer__learning_rate=2e-3)
    train(straight.values, tmp_path / "run", at={6: stop})
    with pytest.raises(ValueError, match=r"optimizer.learning_rate: 0.001 there, 0.002 here(.|\n)*--accept_changes"):
        train(changed, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["optimizer"]["learning_rate"] == 1e-3
    train(changed, tmp_path / "run", accept_changes=True)
    assert "changed from the run so far: optimizer.learning_rate: 0.001 -> 0.002" in capfd.readouterr().err
    assert json.loads((tmp_path / "run" / "config.json").read_text())["optimizer"]["learning_rate"] == 2e-3
    written = {row["step"]: row for row in rows(tmp_path / "run") if "loss" in row}
    assert written[9]["learning_rate"] == pytest.approx(2e-3)
    assert checkpoint.read_meta(tmp_path / "run" / "checkpoints")["config"]["optimizer"]["learning_rate"] == 2e-3


def test_a_change_that_does_not_fit_the_checkpoint_is_refused_and_leaves_the_run_as_it_was(straight, values, tmp_path):
    train(straight.values, tmp_path / "run", at={6: stop})
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(ValueError, match=r"mlp/down/kernel: saved float32\[2, 24, 16\], wanted float32\[2, 32, 16\]"):
        train(values(model__mlp_width=32), tmp_path / "run", accept_changes=True)
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    train(straight.values, tmp_path / "run")
    assert rows(tmp_path / "run") == rows(straight.directory)


def test_text_that_changed_since_the_checkpoint_is_refused(source, values, tmp_path):
    copy = tmp_path / "text.jsonl"
    copy.write_bytes(source.read_bytes())
    config = values(data__sources__main__path=str(copy))
    train(config, tmp_path / "run", at={6: stop})
    copy.write_bytes(source.read_bytes() + b'{"text": "one more"}\n')
    with pytest.raises(
        ValueError, match=r"checkpoint .*belongs to another run:\s+data: saved '[0-9a-f]+', now '[0-9a-f]+'"
    ):
        train(config, tmp_path / "run")
    seen = train(config, tmp_path / "run", accept_changes=True)
    assert min(seen.batches) == 7


def test_another_tokenizer_than_the_checkpoints_is_refused(straight, values, tmp_path):
    train(straight.values, tmp_path / "run", at={6: stop})
    description = tmp_path / "run" / "tokenizer"
    with pytest.raises(
        ValueError, match=r"tokenizer.kind: 'bytes' there, 'sentencepiece' here(.|\n)*a run keeps its tok"
    ):
        train(values(tokenizer__kind="sentencepiece"), tmp_path / "run", accept_changes=True)
    meta = next((tmp_path / "run" / "checkpoints" / "6").glob("meta/metadata"))
    saved = json.loads(meta.read_text())
    meta.write_text(meta.read_text().replace(saved["tokenizer"], "0" * len(saved["tokenizer"])))
    with pytest.raises(ValueError, match=r"belongs to another run:\s+tokenizer: saved '0+', now"):
        train(straight.values, tmp_path / "run", accept_changes=True)
    assert description.exists()
