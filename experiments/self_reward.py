"""Rounds in which a model answers, judges its own answers, and is trained on what it prefers; judged from outside.

    python experiments/self_reward.py --config=configs/preference.py --config.start=runs/sft --workdir=runs/rewarded \\
        --prompts=questions.jsonl --questions=heldout_questions.jsonl --outside=rule:style

Each round answers and labels the prompts, and trains as the config says from the round before. The outside judge
compares its answers to the questions with those of config.start, which is round 0. The same command goes on after an
interruption. A judge is rule:NAME, reward:DIR[,DIR...] or model:DIR.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import app, flags, logging  # noqa: E402  the checkout must be importable first
from ml_collections import config_flags  # noqa: E402
from rich.console import Console  # noqa: E402

from jaxllm.evaluate import questions  # noqa: E402
from jaxllm.generate import SamplerConfig  # noqa: E402
from jaxllm.serve import self_reward  # noqa: E402

CONFIG = config_flags.DEFINE_config_file("config", help_string="configs/<run>.py of a run on preferences")
WORKDIR = flags.DEFINE_string("workdir", None, "directory of all rounds; rounds.jsonl is the result", required=True)
PROMPTS = flags.DEFINE_string("prompts", None, "file of what is answered and learned from", required=True)
QUESTIONS = flags.DEFINE_string("questions", None, "file of what the rounds are compared on", required=True)
OUTSIDE = flags.DEFINE_string("outside", None, "the judge that compares them", required=True)
JUDGE = flags.DEFINE_string("judge", "", "whose choice is learned; the model's own, unless told")
ROUNDS = flags.DEFINE_integer("rounds", 3, "how many; more of them go on from what is there")
LIMIT = flags.DEFINE_integer("limit", None, "only the first so many prompts; all, unless told")
SAMPLES = flags.DEFINE_integer("samples", 4, "answers to each prompt")
TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "divides the logits")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "at most so many per answer")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "answers that are sampled together")
SEED = flags.DEFINE_integer("seed", 0, "of what is sampled; the config has its own")


def main(_):
    logging.set_verbosity(logging.WARNING)
    how = dict(samples=SAMPLES.value, sampler=SamplerConfig(TEMPERATURE.value), max_new_tokens=MAX_NEW_TOKENS.value)
    try:
        manner = self_reward.Manner(OUTSIDE.value, JUDGE.value, batch_size=BATCH_SIZE.value, seed=SEED.value, **how)
        asked = questions.of_file(PROMPTS.value)[: LIMIT.value], questions.of_file(QUESTIONS.value)
        rows = self_reward.rounds(CONFIG.value.to_dict(), WORKDIR.value, *asked, manner, count=ROUNDS.value)
        Console().print(self_reward.table(rows))
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("JAXLLM_TRACEBACK"):
            raise
        sys.exit(f"{type(error).__name__}: {error}\n(JAXLLM_TRACEBACK=1 shows where)")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
