import io
import json
import math
import resource
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import metrics
from jaxllm.metrics import Ratio, Throughput

# ---- Ratio ----


def test_ratios_of_ragged_parts_add_to_the_mean_of_the_whole():
    parts = [np.array([1.0, 2.0, 6.0]), np.array([10.0])]
    total = sum((Ratio(part.sum(), part.size) for part in parts[1:]), Ratio(parts[0].sum(), parts[0].size))
    assert total.value == np.concatenate(parts).mean() == 4.75
    assert total.value != np.mean([part.mean() for part in parts])


def test_a_ratio_goes_through_jit_scan_and_tree_map():
    @jax.jit
    def accumulate(totals_M, counts_M):
        def body(carry, part):
            return carry + Ratio(*part), Ratio(*part)

        return jax.lax.scan(body, Ratio(0.0, 0.0), (totals_M, counts_M))

    carried, stacked = accumulate(jnp.array([9.0, 10.0]), jnp.array([3.0, 1.0]))
    summed = jax.tree.map(lambda leaf: leaf.sum(axis=0), stacked)
    assert carried.value == summed.value == 4.75
    np.testing.assert_array_equal(stacked.value, [3.0, 10.0])


@pytest.mark.parametrize("number", [float, np.float32, jnp.float32, int])
def test_nothing_over_nothing_is_nan_and_never_raises(number):
    with jax.debug_nans(False):
        assert math.isnan(Ratio(number(0), number(0)).value)
        assert math.isnan(Ratio(number(3), number(0)).value)


def test_fetch_divides_late_and_gives_floats():
    row = metrics.fetch(
        {"loss": Ratio(jnp.float32(3), jnp.int32(2)), "norm": jnp.float32(0.5), "empty": Ratio(0.0, 0.0)}
    )
    assert row["loss"] == 1.5 and row["norm"] == 0.5 and math.isnan(row["empty"])
    assert {type(value) for value in row.values()} == {float}


# ---- Throughput ----


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_logged_speed_times_time_is_the_tokens_consumed_without_the_compile():
    clock = Clock()
    throughput = Throughput(clock=clock)
    clock.now += 60
    first = throughput.lap(tokens=1000)
    consumed = logged = 0
    for seconds, tokens in [(2.0, 900), (4.0, 1100), (1.0, 500)]:
        clock.now += seconds
        row = throughput.lap(tokens, pads=100)
        consumed += tokens
        logged += row["tokens_per_second"] * row["seconds"]
    assert first == {"tokens": 1000, "pad_fraction": 0.0, "compile_seconds": 60.0}
    assert logged == pytest.approx(consumed) and row["tokens"] == 1000 + consumed
    assert row["tokens_per_second"] == 500 and row["pad_fraction"] == pytest.approx(1 / 6)
    assert "compile_seconds" not in row


def test_paused_time_belongs_to_no_lap_even_when_the_pause_fails():
    clock = Clock()
    throughput = Throughput(clock=clock)
    throughput.lap(1)
    clock.now += 1
    with pytest.raises(RuntimeError), throughput.paused():
        clock.now += 50
        raise RuntimeError
    clock.now += 1
    assert throughput.lap(100)["tokens_per_second"] == 50


def test_token_counts_pass_two_to_the_31():
    throughput = Throughput(tokens=2**31 - 1)
    for _ in range(3):
        row = throughput.lap(np.int32(2**31 - 1), np.int32(2**31 - 1))
    assert row["tokens"] == 4 * (2**31 - 1) and row["pad_fraction"] == 0.5


def test_mfu_is_the_flops_of_real_tokens_over_the_peak_and_absent_without_one():
    clock = Clock()
    throughput = Throughput(flops_per_token=6e6, peak_flops=3e9, clock=clock)
    throughput.lap(10)
    clock.now += 2
    assert throughput.lap(tokens=400, pads=600)["mfu"] == pytest.approx(200 * 6e6 / 3e9)
    without = Throughput(clock=clock)
    without.lap(10)
    clock.now += 2
    assert "mfu" not in without.lap(10)


# ---- metrics.jsonl ----


def test_rows_come_back_with_nan_and_infinities_from_strict_json(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    rows = [
        {"step": 1, "loss": math.nan, "norm": math.inf, "low": -math.inf, "text": "a\nb ☃"},
        {"step": 2, "loss": 1 / 3, "tokens": 2**40},
    ]
    with metrics.jsonl(path) as write:
        for row in rows:
            write(row["step"], {name: value for name, value in row.items() if name != "step"})

    def refuse(constant):
        raise AssertionError(constant)

    assert [json.loads(line, parse_constant=refuse)["step"] for line in path.read_text().splitlines()] == [1, 2]
    assert repr(metrics.read(path)) == repr(rows)


def test_no_sign_in_a_text_ends_its_row(tmp_path):
    text = "a\u2028b\u2029c\x85d\x0be\x1cf\rg"
    for step in (1, 2):
        with metrics.jsonl(tmp_path / "m", after_step=step - 1) as write:
            write(step, {"text": text})
    assert [row["text"] for row in metrics.read(tmp_path / "m")] == [text, text]


def test_numpy_and_jax_numbers_are_written_as_numbers(tmp_path):
    with metrics.jsonl(tmp_path / "m") as write:
        write(np.int64(3), {"a": np.float32(0.5), "b": np.int32(2), "c": np.array(math.nan)})
    assert (tmp_path / "m").read_text() == '{"step": 3, "a": 0.5, "b": 2, "c": "NaN"}\n'


def test_every_row_is_on_the_disk_when_write_returns(tmp_path):
    with metrics.jsonl(tmp_path / "m") as write:
        for step in range(3):
            write(step, {"loss": 1.0})
            assert [row["step"] for row in metrics.read(tmp_path / "m")] == list(range(step + 1))


def test_a_resumed_run_has_no_step_twice_and_no_torn_line(tmp_path):
    path = tmp_path / "m"
    with metrics.jsonl(path) as write:
        for step in range(0, 50, 10):
            write(step, {"loss": 1.0})
    with path.open("ab") as file:
        file.write('{"step": 50, "text": "é'.encode()[:-1])
    assert [row["step"] for row in metrics.read(path)] == [0, 10, 20, 30, 40]
    with metrics.jsonl(path, after_step=20) as write:
        for step in (30, 40):
            write(step, {"loss": 2.0})
    assert [(row["step"], row["loss"]) for row in metrics.read(path)] == [(0, 1), (10, 1), (20, 1), (30, 2), (40, 2)]
    assert [file.name for file in tmp_path.iterdir()] == ["m"]


def test_a_broken_line_is_named_with_its_file_and_number(tmp_path):
    (tmp_path / "m").write_text('{"step": 1}\n{"loss": 2}\n')
    with pytest.raises(ValueError, match=r"m:2: not a row of metrics \('step'\).*Remove the line"):
        metrics.read(tmp_path / "m")


def test_a_full_disk_names_the_file_and_the_step(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="step 7 could not be written to .*full: .*Free space"):
            with metrics.jsonl(tmp_path / "full") as write:
                write(7, {"sample": "x" * 2000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ---- writers together ----


def test_writers_feed_each_one_and_close_them_when_the_run_fails(tmp_path):
    with pytest.raises(RuntimeError, match="stop"):
        with metrics.writers(metrics.jsonl(tmp_path / "a"), metrics.jsonl(tmp_path / "b")) as write:
            write(1, {"loss": 1.0})
            raise RuntimeError("stop")
    assert metrics.read(tmp_path / "a") == metrics.read(tmp_path / "b") == [{"step": 1, "loss": 1.0}]
    with metrics.writers() as write:
        write(1, {"loss": 1.0})


def tensorboard_events(directory):
    from tensorboardX.proto.event_pb2 import Event

    (file,) = directory.glob("events.*")
    content, start = file.read_bytes(), 0
    while start < len(content):  # a record: 8 bytes of length, 4 of checksum, the event, 4 of checksum
        (length,) = struct.unpack("<Q", content[start : start + 8])
        yield Event.FromString(content[start + 12 : start + 12 + length])
        start += length + 16


def test_tensorboard_gets_scalars_and_text_and_hides_what_a_resumed_run_writes_again(tmp_path):
    pytest.importorskip("tensorboardX")
    with metrics.tensorboard(tmp_path, after_step=20) as write:
        write(30, {"loss": 0.25, "nan": math.nan, "sample": "once upon a time"})
    events = list(tensorboard_events(tmp_path))
    values = {value.tag.split("/")[0]: (event.step, value) for event in events for value in event.summary.value}
    assert [event.step for event in events if event.session_log.status == event.session_log.START] == [21]
    assert values["loss"][0] == 30 and values["loss"][1].simple_value == 0.25
    assert values["sample"][1].tensor.string_val == [b"once upon a time"]


def test_a_missing_tensorboard_package_is_named_with_its_mend(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match="pip install tensorboardX"), metrics.tensorboard(tmp_path):
        pass


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_prints_one_plain_line_per_row_where_there_is_no_terminal():
    stream = io.StringIO()
    with metrics.progress(200, start_step=100, stream=stream) as write:
        write(150, {"loss": 2.34567, "tokens_per_second": 12345.0, "mfu": 0.4321, "grad_norm": 9.0})
        write(200, {"loss": 2.0, "sample": "text"})
    first, last = stream.getvalue().splitlines()
    assert first == "step 150/200  loss 2.346  12.3k tokens/s  mfu 43.2%  0:00:00 left"
    assert last == "step 200/200  loss 2  12.3k tokens/s  mfu 43.2%  0:00:00 left"


def test_progress_tells_the_time_left_from_the_steps_of_this_process(monkeypatch):
    clock = iter((0.0, 30.0))
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    stream = io.StringIO()
    with metrics.progress(1090, start_step=80, stream=stream) as write:
        write(90, {"loss": math.nan})
    assert stream.getvalue() == "step   90/1090  loss nan  0:50:00 left\n"


def test_progress_draws_a_bar_in_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with metrics.progress(10, shown=("reward",), stream=stream) as write:
        write(10, {"reward": 0.75, "loss": 1.0})
    assert "10/10" in stream.getvalue() and "reward 0.75" in stream.getvalue() and "loss" not in stream.getvalue()
