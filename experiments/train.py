"""Trains what a config describes, in a run directory; started again with the same command, it continues.

    python experiments/train.py --config=configs/pretrain.py --workdir=runs/pretrain
    python experiments/train.py --config=configs/pretrain.py:tiny --workdir=runs/tiny --config.loop.steps=40

On several hosts start it on each with --distributed=auto (TPU pods, SLURM, MPI, Kubernetes), or anywhere with
--distributed=HOST:PORT,COUNT,INDEX: the address of process 0, how many there are, and which one this is.

Exit status: 0 when done; 75 when asked to stop by SIGTERM or Ctrl-C and saved (the same command continues); 1 on an
error; 134 where another of several processes was killed, within two minutes of it.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax  # noqa: E402  the checkout must be importable first
from absl import app, flags, logging  # noqa: E402
from ml_collections import config_flags  # noqa: E402

from jaxllm import loop  # noqa: E402

CONFIG = config_flags.DEFINE_config_file("config", help_string="configs/<run>.py, with :argument where it takes one")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "run directory: made if missing, continued if it holds this run", required=True
)
ACCEPT = flags.DEFINE_bool("accept_changes", False, "continue a run whose config differs, with the new values")
DISTRIBUTED = flags.DEFINE_list("distributed", [], "join this run's other processes: auto, or HOST:PORT,COUNT,INDEX")
flags.register_validator(
    "distributed",
    lambda given: given in ([], ["auto"]) or len(given) == 3,
    message="give auto, or HOST:PORT,COUNT,INDEX",
)


def join(given):
    """Meets the other processes, before JAX counts its devices."""
    if given == ["auto"]:
        jax.distributed.initialize()
    elif given:
        address, count, index = given
        jax.distributed.initialize(address, int(count), int(index))


def main(_):
    logging.set_verbosity(logging.WARNING)
    try:
        join(DISTRIBUTED.value)
        loop.run(CONFIG.value.to_dict(), WORKDIR.value, accept_changes=ACCEPT.value)
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("JAXLLM_TRACEBACK"):
            raise
        sys.exit(f"{type(error).__name__}: {error}\n(JAXLLM_TRACEBACK=1 shows where)")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
