"""Scripts run as a user runs them, but within this process, and a run that was never trained to run them on."""

import pathlib
import runpy
import sys

import pytest

from jaxllm import workdir

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
def untrained_run(untrained):
    return untrained(16)
