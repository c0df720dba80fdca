import types

import jax
import jax.numpy as jnp
import pytest

from jaxllm import hardware


def test_the_best_of_several_calls_is_reported_and_the_first_is_not_timed(monkeypatch):
    times = iter([0.0, 3.0, 10.0, 11.0, 20.0, 22.0])
    calls = []
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: next(times))
    assert hardware.best_seconds(lambda x: calls.append(x) or x, jnp.ones(()), repeats=3) == 1.0
    assert len(calls) == 4


def test_measured_flops_count_two_per_multiply_and_add(monkeypatch):
    monkeypatch.setattr(hardware, "best_seconds", lambda *_, repeats: 0.5)
    assert hardware.measured_flops("float32", size=64, repeats=2) == 2 * 64**3 / 0.5


def test_measured_bandwidth_counts_bytes_read_and_written(monkeypatch):
    times = iter(range(100))
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: next(times))
    assert hardware.measured_bandwidth(megabytes=1, repeats=2) == 2 * 2**20


def test_the_peak_of_this_host_counts_its_cores_once_however_many_virtual_devices(monkeypatch):
    monkeypatch.setattr(hardware, "measured_flops", lambda dtype: 7.0)
    flops, source = hardware.peak_flops("float32")
    assert jax.device_count() == 8 and flops == 7.0 and source.startswith("measured on")


def test_the_peak_of_unknown_accelerators_is_that_of_all(monkeypatch):
    monkeypatch.setattr(hardware, "measured_flops", lambda dtype: 7.0)
    monkeypatch.setattr(hardware.jax, "default_backend", lambda: "gpu")
    assert hardware.peak_flops("bfloat16")[0] == 8 * 7.0


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("TPU v5p", 459e12),
        ("TPU v5 lite", 197e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
    ],
)
def test_known_accelerators_come_from_the_data_sheet_times_their_number(monkeypatch, kind, peak):
    monkeypatch.setattr(hardware.jax, "devices", lambda: [types.SimpleNamespace(device_kind=kind)])
    monkeypatch.setattr(hardware.jax, "device_count", lambda: 4)
    assert hardware.peak_flops("bfloat16") == (4 * peak, f"data sheet of {kind}")
