"""A run directory that was never trained, and scripts run as a user runs them, but within this process."""

import pathlib
import runpy
import sys

import jax
import pytest

from configs import common
from jaxllm import checkpoint, workdir
from jaxllm.configure import section
from jaxllm.model import DecoderConfig, build
from jaxllm.text.tokenizer import byte_tokenizer

ROOT = pathlib.Path(workdir.__file__).parents[1]


@pytest.fixture
def script(monkeypatch, capsys):
    """A function: name of a script, and its flags -> (exit status or message, what it printed, what it said)."""

    def script(name, *flags):
        monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
        status = 0
        try:
            runpy.run_path(str(ROOT / "experiments" / name), run_name="__main__")
        except SystemExit as ended:
            status = ended.code or 0
        return status, *capsys.readouterr()

    return script


@pytest.fixture(scope="session")
def untrained_run(tmp_path_factory):
    """A byte-level run directory with checkpoints 1 and 2, of different parameters."""
    sizes = dict(
        num_layers=1, width=16, mlp_width=16, num_heads=2, num_kv_heads=1, head_width=8, operand_dtype="float32"
    )
    config = common.llama(**sizes)
    values = {"model": config.to_dict(), "data": {"sequence_length": 16}}
    directory = workdir.open(tmp_path_factory.mktemp("untrained") / "run", values)
    byte_tokenizer().save(directory / "tokenizer")
    model = build(section(DecoderConfig, config).with_vocabulary(288))
    with checkpoint.open(directory / "checkpoints") as checkpoints:
        for step in (1, 2):
            params = jax.tree.map(lambda x: 3 * x, jax.jit(model.init)(jax.random.key(step)))
            checkpoints.save(step, {"params": params}, position=None, meta={})
    return directory
