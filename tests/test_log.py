import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.data.loader import batch_fingerprint
from jaxllm.log import Log
from jaxllm.metrics import Ratio, Throughput


class Clock:
    """A clock that a test moves."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def make_log(clock):
    """A function: total tokens so far=0 -> (log, the rows that it writes)."""

    def make_log(tokens=0):
        written = []
        speed = Throughput(flops_per_token=2.0, peak_flops=1000.0, tokens=tokens, clock=clock)
        return Log(lambda step, row: written.append((step, row)), speed), written

    return make_log


def batch_of(tokens, places=8):
    segments_BT = (np.arange(places) < tokens).astype(np.int32).reshape(1, 2, -1)
    return {"segments_BT": segments_BT, "tokens_BT": segments_BT * tokens}


def measured(loss, tokens=6, **more):
    numbers = {"loss": jnp.float32(loss), "grad_norm": jnp.float32(1), "tokens": jnp.int32(tokens)}
    return numbers | {"learning_rate": jnp.float32(0.5)} | more


def add(log, clock, steps, *, seconds=2.0, tokens=6):
    for step in steps:
        clock.now += seconds
        log.add(step, batch_of(tokens), measured(step, tokens))


def test_a_row_holds_means_over_its_steps_and_the_last_learning_rate_and_count_of_skips(make_log, clock):
    log, written = make_log()
    for step, (loss, rate, skipped) in enumerate([(1.0, 0.1, 0), (2.0, 0.2, 1), (6.0, 0.4, 5)], start=1):
        clock.now += 1
        nll = Ratio(jnp.float32(loss * step), jnp.float32(step))
        log.add(step, batch_of(6), measured(loss, nll=nll, learning_rate=jnp.float32(rate), skipped=jnp.int32(skipped)))
    log.flush()
    ((step, row),) = written
    assert step == 3 and row["loss"] == pytest.approx(3.0) and row["nll"] == pytest.approx(3.0)
    assert row["learning_rate"] == pytest.approx(0.4) and row["skipped"] == 5


def test_a_row_covers_the_steps_since_the_row_before(make_log, clock):
    log, written = make_log()
    for steps in ((1, 2), (3, 4, 5), ()):
        add(log, clock, steps)
        log.flush()
    assert [(step, row["loss"]) for step, row in written] == [(2, 1.5), (5, 4.0)]


def test_the_first_step_is_compile_time_and_speed_is_that_of_the_others(make_log, clock):
    log, written = make_log()
    clock.now += 98
    add(log, clock, [1, 2, 3])
    log.flush()
    add(log, clock, [4, 5], seconds=1.0)
    log.flush()
    (_, first), (_, second) = written
    assert first["compile_seconds"] == 100 and first["seconds"] == 4 and first["tokens_per_second"] == 3
    assert first["mfu"] == pytest.approx(3 * 2 / 1000)
    assert "compile_seconds" not in second and second["tokens_per_second"] == 6
    assert (first["tokens"], second["tokens"]) == (18, 30)


def test_pads_are_no_tokens_and_their_share_is_that_of_all_steps_of_the_row(make_log, clock):
    log, written = make_log()
    for step, tokens in enumerate((8, 8, 2), start=1):
        add(log, clock, [step], tokens=tokens)
    log.flush()
    assert written[0][1]["tokens"] == 18 and written[0][1]["pad_fraction"] == pytest.approx(6 / 24)


def test_a_batch_of_padding_alone_counts_nothing_and_divides_by_nothing(make_log, clock):
    log, written = make_log()
    add(log, clock, [1])
    log.flush()
    add(log, clock, [2], tokens=0)
    log.flush()
    assert written[1][1]["pad_fraction"] == 1.0 and "tokens_per_second" not in written[1][1]


def test_time_in_a_pause_is_no_steps_and_the_step_under_way_ends_before_it(make_log, clock):
    log, written = make_log()
    add(log, clock, [1, 2])
    with log.paused():
        assert log.pending is None and len(log.rows) == 2
        clock.now += 1000
    add(log, clock, [3])
    log.flush()
    assert written[0][1]["seconds"] == 4 and written[0][1]["tokens_per_second"] == 3


def test_counters_stay_exact_beyond_32_bits(make_log, clock):
    start = 2**53 - 20
    log, written = make_log(tokens=start)
    add(log, clock, range(1, 5))
    log.flush()
    assert written[0][1]["tokens"] == start + 24 and isinstance(written[0][1]["tokens"], int)
    assert json.loads(json.dumps(log.position()))["total"] == start + 24


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
def test_a_log_restored_at_any_step_writes_the_rows_of_one_that_never_stopped(make_log, clock, stop):
    def rows(*, restart):
        log, written = make_log()
        for step in range(1, 7):
            add(log, clock, [step], tokens=step)
            if step % 3 == 0:
                log.flush()
            if step == restart:
                position = json.loads(json.dumps(log.position()))
                log, rest = make_log()
                log.restore(position)
                log.write = lambda step, row: written.append((step, row))
        return [(step, {name: row[name] for name in ("loss", "tokens", "pad_fraction")}) for step, row in written]

    assert rows(restart=stop) == rows(restart=0)


def test_a_position_counts_the_step_under_way(make_log, clock):
    log, _ = make_log()
    add(log, clock, [1, 2])
    assert log.pending is not None
    assert log.position()["total"] == 12 and len(log.position()["rows"]) == 2


@pytest.mark.parametrize(
    "bad", [{"loss": math.nan}, {"loss": math.inf}, {"grad_norm": math.nan}, {"grad_norm": math.inf}]
)
def test_a_number_that_is_not_finite_names_its_step_its_batch_and_what_to_try(make_log, clock, bad):
    log, written = make_log()
    add(log, clock, [1, 2])
    poisoned = measured(3.0) | {name: jnp.float32(value) for name, value in bad.items()}
    log.add(3, batch_of(5), poisoned)
    with pytest.raises(FloatingPointError) as raised:
        log.add(4, batch_of(6), measured(4.0))
    message = str(raised.value)
    assert f"at step 3 (batch {batch_fingerprint(batch_of(5))})" in message and "checkpoint is sound" in message
    assert all(str(value) in message for value in bad.values()) and "Try a lower optimizer.learning_rate" in message
    assert written == []


@pytest.mark.parametrize("end", ["flush", "position"])
def test_no_row_is_written_and_no_position_given_with_an_unchecked_step(make_log, clock, end):
    log, written = make_log()
    add(log, clock, [1])
    log.add(2, batch_of(6), measured(math.nan))
    with pytest.raises(FloatingPointError):
        getattr(log, end)()
    assert written == []


def test_places_that_are_not_computed_are_no_padding_and_a_number_may_come_with_some_steps_only(make_log, clock):
    log, written = make_log()
    segments = np.zeros((3, 2, 4), np.int32)
    segments[0], segments[1, 0] = 1, 1  # of three micro-batches one is full, one half, one empty
    for step, more in ((1, {}), (2, {"update_seconds": 5.0}), (3, {})):
        clock.now += 1
        log.add(step, {"segments_BT": segments}, measured(step, 12) | more)
    log.flush()
    assert written[0][1]["pad_fraction"] == pytest.approx(1 - 12 / 16) and written[0][1]["update_seconds"] == 5
