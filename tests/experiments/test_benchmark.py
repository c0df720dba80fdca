"""The benchmark runs from end to end in miniature; its numbers are for people, their presence and bounds are tested."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = [
    "train",
    "fine_tuning",
    "preference",
    "rl",
    "slots",
    "decode",
    "loss",
    "loader",
    "overhead",
    "cache",
    "embedding",
]


def benchmark(*arguments):
    command = [sys.executable, str(ROOT / "experiments" / "benchmark.py"), *arguments]
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


@pytest.mark.thorough
def test_every_section_reports_numbers_that_can_be_true(tmp_path):
    path = tmp_path / "results.json"
    done = benchmark(f"--config={ROOT / 'configs' / 'llama_14m.py'}:tiny", "--seconds=1", f"--json={path}")
    assert done.returncode == 0, done.stderr
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    assert list(results) == ["machine", *SECTIONS]
    assert all(value > 0 for value in results["machine"].values())
    for name in ("reference", "bfloat16 operands", "float32 operands"):
        assert results["train"][f"{name}, tokens/s"]["median"] > 0
    assert results["train"]["reference, times the reference"] == {"median": 1, "min": 1, "max": 1}
    # C38 and C33: nothing beats its own limit, and the chunked losses need a quarter of the dense one's memory at most.
    assert 0 < results["train"]["bfloat16 operands, MFU of the bfloat16 peak"]["median"] < 1
    assert 0 < results["decode"]["share of the floor"]["median"] < 1
    tuned = results["fine_tuning"]
    assert 0 <= tuned["pad fraction"] < 0.2
    supervised, whole = (tuned[f"conversations, {kind}/s"]["median"] for kind in ("supervised tokens", "tokens"))
    assert 0 < supervised < whole
    assert results["preference"]["DPO, live reference, times fine-tuning"]["median"] > 0
    assert results["rl"]["rollout, times the speed of plain decoding"]["median"] > 0
    assert results["slots"]["predicted by the tokens that are wasted"]["median"] > 0
    for name in ("chunked_token_logprobs", "chunked_cross_entropy"):
        assert 0 < results["loss"][f"{name}, memory as a share of dense"] <= 0.25
    assert all(name in done.stdout for name in results)


@pytest.mark.slow
def test_an_unknown_section_is_refused_before_anything_is_measured():
    done = benchmark("--only=train,speed")
    assert done.returncode != 0
    assert f"--only=speed is not one of {','.join(SECTIONS)}" in done.stderr
