"""The one loop: mesh, restore, compile, step, log, evaluate, save. Every stage runs through it, and none knows of it."""

import dataclasses
import math
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxllm import checkpoint, figures, hardware, metrics, sharding, tree, workdir
from jaxllm.data.loader import batch_fingerprint
from jaxllm.evaluate.perplexity import evaluator, likelihood, target_bytes
from jaxllm.generate import SamplerConfig, complete
from jaxllm.model import flops_per_token, parameter_rules
from jaxllm.stages import STAGES, RunConfig, Stage, limited, run_config
from jaxllm.train import TrainState, optimizer, schedule, update
from jaxllm.train.optimizer import AverageState, SpikeState, find_state
from jaxllm.train.update import init_state

# Exit status of a run that was asked to stop (SIGTERM, SIGINT), saved, and will continue when started again: EX_TEMPFAIL.
EXIT_PREEMPTED = 75


class Preempted(SystemExit):
    """The run saved at ``step`` and stopped because it was asked to."""

    def __init__(self, step: int):
        super().__init__(EXIT_PREEMPTED)
        self.step = step


class Programs(NamedTuple):
    """The functions that a run compiles, and the layout of its state."""

    init: Any  # (key) -> state, sharded from the start
    step: Any  # (state, batch) -> (state, metrics); donates the state
    template: TrainState  # shapes, dtypes and shardings


def run(values: Mapping, directory: str, *, accept_changes: bool = False) -> dict[str, float]:
    """Trains as the config ``values`` say in the run directory, on from its newest checkpoint if it has one; the last validation's numbers.

    Raises ``ValueError`` for anything wrong with the config, the data or the directory, ``FloatingPointError`` where the loss stops being
    finite, ``OSError`` where the disk fails, and ``Preempted`` (exit status 75) once it has saved after SIGTERM or SIGINT.
    """
    config = run_config(values)
    directory = workdir.open(directory, values, accept_changes=accept_changes)
    mesh = sharding.mesh(config.mesh)
    with stop_signals() as stopping, jax.set_mesh(mesh), ExitStack() as stack:
        stage = STAGES[config.stage](config, directory)
        workdir.record_environment(directory, stage.report)
        programs = compile_programs(config, stage, mesh)
        best = dict(keep_best=config.loop.keep_best, best_metric="validation_loss")
        checkpoints = stack.enter_context(
            checkpoint.open(directory / "checkpoints", keep_last=config.loop.keep_last, **best)
        )
        meta = {"tokenizer": stage.tokenizer.fingerprint, "data": stage.batches.fingerprint, "config": dict(values)}
        state = _start(config, stage, programs, checkpoints, meta, accept_changes)
        write = stack.enter_context(_writers(config, directory, int(state.step)))
        return _train(config, stage, programs, checkpoints, meta, state, write, directory, mesh, stopping)


def compile_programs(config: RunConfig, stage: Stage, mesh) -> Programs:
    """The training step and the initialisation, placed on the mesh by the model's table. Nothing runs yet."""
    rules = parameter_rules(stage.model.config)
    tokens_per_step = config.loop.batch_size * config.data.sequence_length
    rate = schedule(config.optimizer, steps=config.loop.steps, tokens_per_step=tokens_per_step)
    chain = optimizer(config.optimizer, rate, rules)
    abstract = jax.eval_shape(stage.model.init, jax.random.key(0))
    shardings = sharding.parameter_shardings(rules, abstract, mesh)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    # Under an explicit mesh the optimizer's state has its sharding in its type, so no second table is needed.
    template = sharding.with_shardings(jax.eval_shape(partial(init_state, optimizer=chain), abstract), mesh)

    # Random numbers of an explicit mesh would be made whole on every device first; partitioned automatically, they are made in place.
    init_params = jax.sharding.auto_axes(stage.model.init, out_sharding=jax.tree.map(lambda x: x.spec, shardings))

    def step(state, batch):
        batch = stage.prepare(batch)
        if stage.model.config.dropout:
            key = jax.random.fold_in(jax.random.key(config.seed), state.step)
            batch["dropout_key"] = jax.random.split(key, config.loop.micro_batches)
        learning_rate = rate(state.step)
        state, measured = update(state, batch, loss=stage.objective, optimizer=chain)
        spikes = find_state(SpikeState, state.opt_state)
        skipped = {"skipped": spikes.skipped} if spikes else {}
        return state, measured | skipped | {"learning_rate": learning_rate}

    placed = jax.tree.map(lambda x: x.sharding, template)
    return Programs(
        init=jax.jit(lambda key: init_state(init_params(key), chain), out_shardings=placed),
        step=jax.jit(step, donate_argnums=0, out_shardings=(placed, None)),
        template=template,
    )


def _start(config, stage, programs, checkpoints, meta, accept_changes) -> TrainState:
    """The state of the newest checkpoint, the loader set to its position; without one, random parameters."""
    if checkpoints.latest_step is None:
        return programs.init(jax.random.key(config.seed))
    # The config was compared when the directory was opened; here what it was made into must agree.
    ignored = ("config", "data") if accept_changes else ("config",)
    restored = checkpoints.restore(programs.template, meta, ignore=ignored)
    stage.batches.set_state(restored.position)
    print(f"resumed at step {int(restored.state.step)}", file=sys.stderr)
    return restored.state


def _train(config, stage, programs, checkpoints, meta, state, write, directory, mesh, stopping) -> dict[str, float]:
    loop, place = config.loop, partial(sharding.global_batch, on=mesh)
    peak, source = hardware.peak_flops(config.model.operand_dtype)
    flops = flops_per_token(stage.model.config, config.data.sequence_length)
    print(f"{tree.size(state.params):,} parameters; MFU against {peak:.3g} FLOP/s, {source}", file=sys.stderr)
    validate = partial(_validation, config, stage, evaluator(stage.objective, stage.prepare, place))
    log = Log(write, metrics.Throughput(flops, peak))
    step, validated = int(state.step), {}
    while step < loop.steps:
        batch = next(stage.batches)
        state, measured = programs.step(state, place(batch))
        step += 1
        log.add(step, batch, measured)
        last, stop = step == loop.steps, _asked_to_stop(stopping, step)
        if last or stop or step % loop.log_every == 0:
            log.flush()
        with log.throughput.paused():
            if last or step % loop.evaluate_every == 0:
                validated = validate(state)
                write(step, validated)
            if loop.sample_every and (last or step % loop.sample_every == 0):
                _write_samples(config, stage, state.params, step, directory)
            if last or stop or step % loop.save_every == 0:
                log.flush()
                ranked = validated if last or step % loop.evaluate_every == 0 else None
                checkpoints.save(step, state, position=stage.batches.get_state(), meta=meta, metrics=ranked)
        if stop and not last:
            checkpoints.wait()
            print(f"stopped as asked; saved at step {step}: the same command continues", file=sys.stderr)
            raise Preempted(step)
    checkpoints.wait()
    figures.curves(metrics.read(directory / "metrics.jsonl"), directory / "figures" / "curves.png")
    return validated or validate(state)


@dataclasses.dataclass
class Log:
    """Means over the steps between rows. Each step's numbers are fetched while the next one runs, so the device never waits for the host."""

    write: Any
    throughput: metrics.Throughput
    pending: tuple | None = None
    rows: list[dict[str, float]] = dataclasses.field(default_factory=list)
    tokens: int = 0
    places: int = 0
    step: int = 0

    def add(self, step: int, batch: Mapping[str, np.ndarray], measured: Mapping[str, Any]) -> None:
        """Takes a step that was just dispatched, and checks the one before it."""
        self._fetch()
        self.pending = (step, batch, measured)

    def flush(self) -> None:
        """Waits for the last step and writes the row of all since the row before; nothing where there were none."""
        self._fetch()
        if not self.rows:
            return
        last = self.rows[-1]
        # Rates and counters are those of the last step, all else is a mean over the steps.
        means = {
            name: float(np.mean([row[name] for row in self.rows]))
            for name in last
            if name not in ("learning_rate", "skipped")
        }
        self.write(self.step, last | means | self.throughput.lap(self.tokens, self.places - self.tokens))
        self.rows, self.tokens, self.places = [], 0, 0

    def _fetch(self) -> None:
        if self.pending is None:
            return
        self.step, batch, measured = self.pending
        self.pending = None
        row = metrics.fetch(measured)
        if not math.isfinite(row["loss"]):
            raise FloatingPointError(
                f"the loss is {row['loss']} at step {self.step} (batch {batch_fingerprint(batch)}, gradient norm {row['grad_norm']}). "
                "The last checkpoint is sound. Try a lower optimizer.learning_rate, a longer optimizer.warmup, optimizer.spike_deviations=6, "
                "or model.operand_dtype='float32' to tell precision from data."
            )
        self.rows.append(row)
        self.tokens += int(np.count_nonzero(batch["segments_BT"]))
        self.places += batch["segments_BT"].size


def _validation(config, stage, evaluate, state) -> dict[str, float]:
    """Likelihood of the held-out text under the parameters, and under their average where one is kept."""
    batches = partial(limited, stage.validation, config.loop.evaluate_batches)
    num_bytes = sum(target_bytes(batch, stage.tokenizer.byte_lengths_V) for batch in batches())
    kept = find_state(AverageState, state.opt_state)
    found = {"": state.params} | ({"average_": kept.average} if kept else {})
    row = {}
    for prefix, params in found.items():
        measured = likelihood(evaluate(params, batches())["nll"], num_bytes)
        row |= {
            f"{prefix}validation_loss": measured["nats_per_token"],
            f"{prefix}validation_perplexity": measured["perplexity"],
            f"{prefix}validation_bits_per_byte": measured["bits_per_byte"],
        }
    return row


def _write_samples(config, stage, params, step, directory) -> None:
    """How the model continues the prompts at this step: greedy, so that only training changes it."""
    prompts, sampler = config.loop.sample_prompts, SamplerConfig(temperature=0.0)
    texts = complete(
        stage.model,
        params,
        stage.tokenizer,
        prompts,
        jax.random.key(0),
        sampler=sampler,
        max_new_tokens=config.loop.sample_tokens,
    )
    if jax.process_index() == 0:
        with metrics.jsonl(directory / "samples.jsonl", after_step=step) as write:
            for prompt, text in zip(prompts, texts, strict=True):
                write(step, {"prompt": prompt, "text": text})


def _writers(config, directory, start_step):
    """Where rows go: nowhere on any process but the first."""
    if jax.process_index() > 0:
        return metrics.writers()
    opened = [
        metrics.jsonl(directory / "metrics.jsonl", after_step=start_step),
        metrics.progress(config.loop.steps, start_step=start_step),
    ]
    if config.loop.tensorboard:
        opened.append(metrics.tensorboard(directory / "tensorboard", after_step=start_step))
    return metrics.writers(*opened)


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Inside, the first SIGTERM or SIGINT sets the event instead of ending the process; a second SIGINT interrupts as ever."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def stop(number, _):
        if number == signal.SIGINT and event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _asked_to_stop(stopping: threading.Event, step: int) -> bool:
    """The same answer on every process at the same step: where there are several, JAX's preemption service agrees on one."""
    if jax.process_count() > 1:
        return multihost_utils.reached_preemption_sync_point(step)
    return stopping.is_set()
