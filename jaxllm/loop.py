"""The one loop: mesh, restore, compile, step, log, evaluate, save. Every stage runs through it, none knows of it."""

import signal
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental import multihost_utils

from jaxllm import checkpoint, figures, hardware, metrics, sharding, tree, workdir
from jaxllm.configure import nearest
from jaxllm.evaluate.answers import answers, compared, scores
from jaxllm.evaluate.continuations import continuations
from jaxllm.evaluate.perplexity import evaluator
from jaxllm.evaluate.validation import validation
from jaxllm.generate import SamplerConfig
from jaxllm.log import Log
from jaxllm.model import flops_per_token, parameter_rules, placement, with_scalar_head
from jaxllm.run_config import RunConfig, resolved, run_config
from jaxllm.stages import Stage, limited, named
from jaxllm.train import TrainState, optimizer, schedule, update
from jaxllm.train.optimizer import AverageState, SpikeState, find_state
from jaxllm.train.update import init_state

# Exit status of a run that was asked to stop (SIGTERM, SIGINT), saved, and will continue when started again:
# EX_TEMPFAIL.
EXIT_PREEMPTED = 75
GREEDY = SamplerConfig(temperature=0.0)


class Preempted(SystemExit):
    """The run saved at ``step`` and stopped because it was asked to; at 0 there was nothing to save."""

    def __init__(self, step: int):
        super().__init__(EXIT_PREEMPTED)
        self.step = step


class Programs(NamedTuple):
    """The functions that a run compiles, and the layout of its state."""

    init: Any  # (key) -> state, sharded from the start
    begin: Any  # (params) -> state
    step: Any  # (state, batch, frozen) -> (state, metrics); donates the state
    template: TrainState  # shapes, dtypes and shardings


class Run(NamedTuple):
    """What the loop works with."""

    config: RunConfig
    stage: Stage
    frozen: Mapping[str, tree.Tree]
    programs: Programs
    checkpoints: checkpoint.Checkpoints
    meta: dict[str, Any]  # saved with each checkpoint, compared at restoring
    directory: Path
    place: Callable  # host batch -> global arrays
    evaluate: Callable  # (params, batches, **frozen) -> metrics


def run(values: Mapping, directory: str, *, accept_changes: bool = False) -> dict[str, float]:
    """Trains as the config ``values`` say, on from the directory's newest checkpoint; returns the last validation.

    Raises ``ValueError`` for anything wrong with the config, the data or the directory, ``FloatingPointError`` where
    the loss stops being finite, ``OSError`` where the disk fails, and ``Preempted`` (exit status 75) once it has saved
    after SIGTERM or SIGINT.
    """
    values = resolved(values)
    config = run_config(values)
    make = named(config.stage)
    mesh = sharding.mesh(config.mesh)
    with jax.set_mesh(mesh), ExitStack() as stack:
        with stopped_at_once(), _first_process_first():
            directory = workdir.open(directory, values, accept_changes=accept_changes)
            stack.enter_context(workdir.held(directory))
            stage = make(config, directory)
        stopping = stack.enter_context(stop_signals())
        stack.callback(stage.batches.close)
        keep = {key: getattr(config.loop, key) for key in ("keep_last", "keep_best", "best_metric", "best_mode")}
        checkpoints = stack.enter_context(checkpoint.open(directory / "checkpoints", **keep))
        place = partial(sharding.global_batch, on=mesh)
        run = Run(
            config=config,
            stage=stage,
            frozen={name: given.params() for name, given in stage.frozen.items()},
            programs=compile_programs(config, stage, mesh),
            checkpoints=checkpoints,
            meta={
                "tokenizer": stage.tokenizer.fingerprint,
                "data": stage.batches.fingerprint,
                "models": {name: given.identity for name, given in stage.frozen.items()} | dict(stage.rewarded_by),
                "config": dict(values),
            },
            directory=directory,
            place=place,
            evaluate=evaluator(stage.objective, stage.prepare, place),
        )
        state, position = _start(run, ("config", "data", "models") if accept_changes else ("config",))
        workdir.record(directory, values, stage.report)
        write = stack.enter_context(_writers(config, directory, int(state.step)))
        log = Log(write, _throughput(config, stage, state))
        if position:
            log.restore(position["log"])
        return _train(run, state, log, stopping)


def compile_programs(config: RunConfig, stage: Stage, mesh) -> Programs:
    """The training step and the initialisation, placed on the mesh by the model's table. Nothing runs yet."""
    rules, shardings = parameter_rules(stage.model.config), placement(stage.model, mesh)
    tokens_per_step = config.loop.batch_size * config.data.sequence_length
    rate = schedule(config.optimizer, steps=config.loop.steps, tokens_per_step=tokens_per_step)
    chain = optimizer(config.optimizer, rate, rules)
    abstract = jax.eval_shape(stage.model.init, jax.random.key(0))
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    # Under an explicit mesh the optimizer's state has its sharding in its type, so no second table is needed.
    template = sharding.with_shardings(jax.eval_shape(partial(init_state, optimizer=chain), abstract), mesh)

    # Random numbers of an explicit mesh would be made whole on every device first; partitioned automatically, they are
    # made in place.
    init_params = jax.sharding.auto_axes(stage.model.init, out_sharding=jax.tree.map(lambda x: x.spec, shardings))

    def step(state, batch, frozen):
        batch = stage.prepare(state.params, batch, **frozen)
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        for name in stage.keys:
            named = jax.random.fold_in(key, zlib.crc32(name.encode()))
            batch[name] = jax.random.split(named, config.loop.micro_batches)
        learning_rate = rate(find_state(optax.ScaleByScheduleState, state.opt_state).count)  # skipped updates have none
        filled = stage.filled(batch) if stage.filled else None
        loss = partial(stage.objective, **frozen)
        state, measured = update(state, batch, loss=loss, optimizer=chain, filled=filled)
        spikes = find_state(SpikeState, state.opt_state)
        skipped = {"skipped": spikes.skipped} if spikes else {}
        counted = {"tokens": jnp.count_nonzero(batch["segments_BT"]), "learning_rate": learning_rate}
        return state, measured | skipped | counted

    placed = jax.tree.map(lambda x: x.sharding, template)
    return Programs(
        init=jax.jit(lambda key: init_state(init_params(key), chain), out_shardings=placed),
        begin=jax.jit(
            lambda params: init_state(with_scalar_head(stage.model.config, params), chain), out_shardings=placed
        ),
        step=jax.jit(step, donate_argnums=0, out_shardings=(placed, None)),
        template=template,
    )


def _start(run: Run, ignored: tuple[str, ...]) -> tuple[TrainState, dict | None]:
    """The newest checkpoint's state and position, the loader set to it; without one, None and the parameters of the
    run that this one starts from, or random ones.
    """
    if run.checkpoints.latest_step is None:
        if run.stage.start is None:
            return run.programs.init(jax.random.key(run.config.seed)), None
        given = run.stage.start.params()
        state = run.programs.begin(given)
        new = sorted(set(tree.names(state.params)) - set(tree.names(given)))
        print(f"starts from {run.config.start}" + f", new and 0: {', '.join(new)}" * bool(new), file=sys.stderr)
        return state, None
    # The config was compared when the directory was opened; here what it was made into must agree.
    restored = run.checkpoints.restore(run.programs.template, run.meta, ignore=ignored)
    run.stage.batches.set_state(restored.position["loader"])
    print(f"resumed at step {int(restored.state.step)}", file=sys.stderr)
    return restored.state, restored.position


def _throughput(config, stage, state) -> metrics.Throughput:
    peak, source = hardware.peak_flops(config.model.operand_dtype)
    print(f"{tree.size(state.params):,} parameters; MFU against {peak:.3g} FLOP/s, {source}", file=sys.stderr)
    return metrics.Throughput(flops_per_token(stage.model.config, config.data.sequence_length), peak)


def _train(run: Run, state: TrainState, log: Log, stopping: threading.Event) -> dict[str, float]:
    loop, step, validated = run.config.loop, int(state.step), {}
    if step == 0 and (loop.evaluate_first or not loop.steps):
        log.write(0, validated := _validation(run, state))
        if unranked := _unranked(run, validated):
            raise ValueError(unranked)
    if not loop.steps and run.checkpoints.latest_step is None:
        _save(run, state, 0, log, validated)
    while step < loop.steps:
        batch, told = next(run.stage.batches), {}
        if run.stage.rollout:
            batch, told = run.stage.rollout(state.params, batch, step, **run.frozen)
        state, measured = run.programs.step(state, run.place(batch), run.frozen)
        step += 1
        log.add(step, batch, measured | told)
        last, stop = step == loop.steps, _asked_to_stop(stopping, step)
        due = {name: every and (last or step % every == 0) for name, every in _periods(loop).items()}
        if due["log"]:
            log.flush()
        if stop or due["evaluate"] or due["sample"] or due["save"]:
            with log.paused():
                if due["evaluate"]:
                    validated = _validation(run, state)
                    log.write(step, validated)
                if due["sample"]:
                    _write_samples(run, state.params, step)
                unranked = due["evaluate"] and _unranked(run, validated)
                if due["save"] or stop or unranked:
                    _save(run, state, step, log, validated if due["evaluate"] else None)
                if unranked:
                    run.checkpoints.wait()
                    raise ValueError(unranked)
        if stop and not last:
            run.checkpoints.wait()
            print(f"stopped as asked and saved at step {step}: the same command continues", file=sys.stderr)
            raise Preempted(step)
    run.checkpoints.wait()
    if jax.process_index() == 0:
        figures.curves(metrics.read(run.directory / "metrics.jsonl"), run.directory / "figures" / "curves.png")
    return validated or _validation(run, state)


def _periods(loop) -> dict[str, int]:
    return {
        "log": loop.log_every,
        "evaluate": loop.evaluate_every,
        "sample": loop.sample_every,
        "save": loop.save_every,
    }


def _save(run: Run, state: TrainState, step: int, log: Log, validated: dict | None) -> None:
    position = {"loader": run.stage.batches.get_state(), "log": log.position()}
    run.checkpoints.save(step, state, position=position, meta=run.meta, metrics=validated)


def _validation(run: Run, state: TrainState) -> dict[str, float]:
    """What is measured on held-out data under the parameters, and under their average where one is kept."""
    stage, count = run.stage, run.config.loop.evaluate_batches
    sources = {name: partial(limited, batches, count) for name, batches in stage.validation.items()}
    measure = partial(validation, run.evaluate, sources=sources, byte_lengths_V=stage.tokenizer.byte_lengths_V)
    row = measure(params=state.params, **run.frozen)
    if kept := find_state(AverageState, state.opt_state):
        row |= {f"average_{name}": value for name, value in measure(params=kept.average, **run.frozen).items()}
    if stage.prompts:
        row |= _answered(run, state)
    if stage.probe:
        row |= {f"validation_{name}": value for name, value in stage.probe(state.params, **run.frozen).items()}
    return row


def _unranked(run: Run, validated: Mapping) -> str:
    """What is wrong where the best checkpoints are kept by a metric that this validation lacks."""
    loop, best = run.config.loop, run.config.loop.best_metric
    if not loop.keep_best or best in validated:
        return ""
    return (
        f"loop.best_metric={best!r} is no metric of a validation{nearest(best, validated)}; correct it and go on with "
        "--accept_changes"
    )


def _answered(run: Run, state: TrainState) -> dict[str, float]:
    """How near the answers to held-out prompts come to those of the data; all of them go to ``answers.jsonl``."""
    loop, tokenizer = run.config.loop, run.stage.tokenizer
    given = run.stage.prompts
    prompts, references = [prompt.prompt_ids for prompt in given], [prompt.reference_ids for prompt in given]
    how = dict(max_new_tokens=loop.sample_tokens, sampler=GREEDY, batch_size=min(32, len(given)))
    how["stop_ids"] = tokenizer.stop_ids
    found = answers(run.stage.model, state.params, prompts, jax.random.key(0), **how)
    rows = compared(tokenizer, prompts, references, found)
    _record(run, "answers.jsonl", int(state.step), [row._asdict() for row in rows])
    return {f"validation_{name}": value for name, value in scores(rows).items()}


def _write_samples(run: Run, params: tree.Tree, step: int) -> None:
    """How the model goes on after the prompts at this step: greedy, so that only training changes it."""
    stage, prompts = run.stage, run.config.loop.sample_prompts
    if stage.samples:
        rows = stage.samples()
    else:
        how = dict(max_new_tokens=run.config.loop.sample_tokens, sampler=GREEDY, read=stage.prompt)
        texts = continuations(stage.model, params, stage.tokenizer, prompts, jax.random.key(0), **how)
        rows = [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]
    for row in _record(run, "samples.jsonl", step, rows):
        shown = f"\033[2m{row['text']!r}\033[0m" if sys.stderr.isatty() else repr(row["text"])
        reward = f"  reward {row['reward']:.3g}" if "reward" in row else ""
        print(f"  {row['prompt']}{shown}{reward}", file=sys.stderr)


def _record(run: Run, name: str, step: int, rows: list[dict]) -> list[dict]:
    """The rows, written to the file of this name by the first process; of the others, none."""
    if jax.process_index() > 0:
        return []
    with metrics.jsonl(run.directory / name, after_step=step - 1) as write:
        for row in rows:
            write(step, row)
    return rows


def _writers(config, directory, start_step):
    """Where rows go: nowhere on any process but the first."""
    if jax.process_index() > 0:
        return metrics.writers()
    opened = [
        metrics.jsonl(directory / "metrics.jsonl", after_step=start_step or -1),
        metrics.progress(config.loop.steps, start_step=start_step),
    ]
    if config.loop.tensorboard:
        opened.append(metrics.tensorboard(directory / "tensorboard", after_step=start_step))
    return metrics.writers(*opened)


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Inside, the first SIGTERM or SIGINT sets the event instead of ending the process; a second SIGINT interrupts as
    ever.
    """
    event = threading.Event()

    def stop(number, _):
        if number == signal.SIGINT and event.is_set():
            raise KeyboardInterrupt
        event.set()

    with _handled(stop):
        yield event


@contextmanager
def stopped_at_once() -> Iterator[None]:
    """Inside, where there is nothing to save yet, SIGTERM or SIGINT ends the process with the same status."""

    def stop(*_):
        print("stopped as asked before the first step: the same command begins again", file=sys.stderr)
        raise Preempted(0)

    with _handled(stop):
        yield


@contextmanager
def _handled(stop: Callable) -> Iterator[None]:
    """Inside, SIGTERM and SIGINT call ``stop``; no handler is set where there are several processes, whose SIGTERM
    belongs to JAX's preemption service.
    """
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _first_process_first() -> Iterator[None]:
    """The first process runs the block before the others do, so that they find what it made and make nothing twice."""
    if jax.process_index() > 0:
        multihost_utils.sync_global_devices("made by the first process")
    yield
    if jax.process_index() == 0:
        multihost_utils.sync_global_devices("made by the first process")


def _asked_to_stop(stopping: threading.Event, step: int) -> bool:
    """The same answer on every process at the same step: where there are several, JAX's preemption service agrees on
    one.
    """
    if jax.process_count() > 1:
        return multihost_utils.reached_preemption_sync_point(step)
    return stopping.is_set()
