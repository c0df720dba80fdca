"""The whole life of a model in one command, from raw documents to reasoning; then report.html and summary.json.

    python experiments/quickstart.py --workdir=runs/quickstart
    python experiments/quickstart.py --config=configs/pipeline.py --workdir=runs/mine --config.files.documents='my/*'

The first is a small model of a small world, four to eight minutes on two CPU cores; the second takes your own data.
Killed or stopped, the same command goes on; with other gates or measures, what is done is judged again, not run again.

Exit status: 0 when every stage passed its gates; 2 when one fell short; 75 when asked to stop by SIGTERM or Ctrl-C
while it trained, and saved; 1 on an error.
"""

import importlib
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from absl import app, flags, logging  # noqa: E402  the checkout must be importable first
from ml_collections import config_flags  # noqa: E402

from jaxllm.pipeline import life  # noqa: E402

DEFAULT = str(ROOT / "configs" / "quickstart.py")
CONFIG = config_flags.DEFINE_config_file("config", DEFAULT, "configs/<pipeline>.py, with :argument where it takes one")
WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "made if missing, continued if it holds this pipeline")


def untold(config):
    """The values of a run whose command names only this config: "configs/rl.py:grpo"."""
    file, _, argument = config.partition(":")
    return importlib.import_module(f"configs.{Path(file).stem}").get_config(argument).to_dict()


def main(_):
    logging.set_verbosity(logging.WARNING)
    try:
        summary = life.live(CONFIG.value.to_dict(), WORKDIR.value, untold=untold)
    except (ValueError, OSError) as error:
        if os.environ.get("JAXLLM_TRACEBACK"):
            raise
        sys.exit(f"{type(error).__name__}: {error}\n(JAXLLM_TRACEBACK=1 shows where)")
    print(f"{'passed' if summary['ok'] else 'fell short'} in {summary['seconds']:.0f} s: {WORKDIR.value}/report.html")
    sys.exit(0 if summary["ok"] else 2)


if __name__ == "__main__":
    app.run(main)
