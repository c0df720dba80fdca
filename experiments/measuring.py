"""How the benchmark measures: the loop's own step, compiled; in turns, so that a noisy machine is fair to all."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from rich.table import Table

from jaxllm import loop, sharding
from jaxllm.run_config import RunConfig, run_config
from jaxllm.stages import STAGES, Stage

FEWEST_ROUNDS = 3


class Bench(NamedTuple):
    """What every section needs: the run as its config says, this machine's limits, and the time to take."""

    values: dict
    config: RunConfig
    stage: Stage
    directory: Path
    seconds: float
    peaks: dict[str, float]  # operand dtype -> FLOP/s
    bandwidth: float  # bytes per second, read and written


def staged(bench: Bench, **model) -> tuple[RunConfig, Stage]:
    """The run with these keys of its model changed; tokenizer and tokens are already in the directory."""
    config = run_config(bench.values | {"model": bench.values["model"] | model})
    return config, STAGES[config.stage](config, bench.directory)


def loop_step(config: RunConfig, stage: Stage, batch, frozen=None) -> tuple[Callable, float]:
    """(the loop's own step of this batch on its own mesh, seconds to compile it)."""
    with jax.set_mesh(mesh := sharding.mesh(config.mesh)):
        programs = loop.compile_programs(config, stage, mesh)
        return compiled(
            programs.step, programs.init(jax.random.key(config.seed)), sharding.global_batch(batch, on=mesh), frozen
        )


def compiled(program, state, batch, frozen=None) -> tuple[Callable, float]:
    """(a function of no arguments that takes the next step and returns all of its results, seconds to compile it)."""
    start, frozen = time.perf_counter(), frozen or {}
    executable = program.lower(state, batch, frozen).compile()
    compile_seconds = time.perf_counter() - start
    return repeating(lambda state: executable(state, batch, frozen), state), compile_seconds


def repeating(step: Callable, state) -> Callable:
    """A function that feeds the state a call returns (first, if it returns more) to the next, which may donate it."""

    def run():
        nonlocal state
        result = step(state)
        state = result[0] if isinstance(result, tuple) else result
        return result

    return run


def seconds(run: Callable) -> float:
    """How long ``run`` takes until its results are there."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def turns(measures: dict[str, Callable[[], float]], limit: float) -> dict[str, np.ndarray]:
    """What each measures in each round, in turns forth and back, for ``limit`` seconds and three rounds at least."""
    rounds, end = [], time.perf_counter() + limit
    while len(rounds) < FEWEST_ROUNDS or time.perf_counter() < end:
        order = list(measures) if len(rounds) % 2 == 0 else list(reversed(measures))
        rounds.append({name: measures[name]() for name in order})
    return {name: np.array([found[name] for found in rounds]) for name in measures}


def spread(values: np.ndarray) -> dict[str, float]:
    return {"median": float(np.median(values)), "min": float(np.min(values)), "max": float(np.max(values))}


# ---- reporting ----


def shown(value) -> str:
    if isinstance(value, dict):
        return f"{shown(value['median'])}  ({shown(value['min'])} to {shown(value['max'])})"
    return (
        f"{value:,.4g}"
        if isinstance(value, float) and abs(value) < 1000
        else f"{value:,.0f}"
        if isinstance(value, float)
        else str(value)
    )


def table(results: dict[str, dict]) -> Table:
    """One row per number, a rule after each section."""
    table = Table("section", "quantity", "median (least to greatest)", title="jaxllm benchmark")
    for section, found in results.items():
        for index, (name, value) in enumerate(found.items()):
            last = index == len(found) - 1
            table.add_row("" if index else section, name, shown(value), end_section=last)
    return table
