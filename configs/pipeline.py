"""The whole life of a model on your own data: cleaning, tokenizer, random model, pretraining, fine-tuning, reward
model, PPO and DPO, GRPO; each stage goes on from an earlier one and stands behind its gates.

python experiments/quickstart.py --config=configs/pipeline.py --workdir=runs/mine \\
    --config.files.documents='corpus/*.jsonl' --config.files.heldout='heldout/*.txt' \\
    --config.files.instructions=instructions.json --config.files.preferences=preferences.jsonl \\
    --config.files.questions=questions.jsonl

The defaults are for a CPU and some megabytes of text. A stage's ``run`` is the config of that run: make it larger, and
its gates what you expect of it, here or by flags (--config.stages.pretrain.run.loop.steps=20000). Wins are judged by a
rule for short and polite answers unless told: --config.measures.wins.judge=reward:DIR, and that of drift.
"""

import ml_collections

from configs import preference, pretrain, reward, rl, rlhf, sft

# Stages that may lose what they had, and what holds another attempt nearer to where it began.
NEARER = {"ppo": {"policy": {"kl_reward": 2.0}}, "dpo": {"preference": {"beta": 2.0}}}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    if arg:
        raise ValueError(f"configs/pipeline.py takes no argument, not {arg!r}; configs/quickstart.py:tiny is small")
    config = ml_collections.ConfigDict()
    config.title = "The life of a model"
    config.seed = 0  # of all stages
    config.order = ("clean", "tokenizer", "random", "pretrain", "sft", "reward", "ppo", "dpo", "grpo")
    config.prompts = ("The ",)  # texts that every model continues, for the report
    config.files = ml_collections.ConfigDict()  # name -> what {name} stands for, as {stage} does for its directory
    config.files.documents = "documents.jsonl"
    config.files.instructions = "instructions.jsonl"
    config.files.preferences = "preferences.jsonl"
    config.files.questions = "questions.jsonl"  # prompts that PPO asks
    config.files.heldout = "heldout.jsonl"  # documents that no stage reads

    config.measures = ml_collections.ConfigDict()
    config.measures.text = measure("perplexity", "bits_per_byte", "bits", "min", file="{heldout}")
    config.measures.text.about = "Bits per byte of held-out documents"
    config.measures.perplexity = measure("perplexity", "perplexity", "number", "min", file="{heldout}")
    config.measures.perplexity.about = "Tokens that it could as well guess among; at random, all that there are"
    config.measures.wins = measure("win_rate", "win_rate", "share", "max", against="sft", temperature=1.0)
    config.measures.wins.update(
        file="{questions}", about="Answers that the judge prefers to those of the fine-tuned model"
    )
    config.measures.drift = measure("win_rate", "kl", "nats", "min", against="sft", temperature=1.0)
    config.measures.drift.update(file="{questions}", about="Divergence from the fine-tuned model, nats per answer")
    config.measures.sums = measure("tasks", "accuracy", "share", "max", task="addition", level=2)
    config.measures.sums.about = "Held-out sums of two numbers, the likeliest answer"

    config.stages = ml_collections.ConfigDict()
    config.stages.clean = stage("clean", "Drops what is no text, what repeats itself, and what is there already")
    config.stages.clean.run = {"files": "{documents}"}
    behind(config.stages.clean, kept=least(0.5))

    config.stages.tokenizer = stage("tokenizer", "Learns the pieces of words that the model reads and writes")
    config.stages.tokenizer.run = {"files": "{clean}/clean.jsonl", "vocab_size": 4096}
    behind(config.stages.tokenizer, bytes_per_token=least(2.0))

    config.stages.random = train("configs/pretrain.py", "A model that has learned nothing", measured=True)
    config.stages.random.run = pretrain.get_config()
    _reads(config.stages.random.run, "{clean}/clean.jsonl")
    config.stages.random.run.tokenizer.update(path="{tokenizer}", vocab_size=config.stages.tokenizer.run.vocab_size)
    config.stages.random.run.optimizer.warmup = 0
    config.stages.random.run.loop.steps = 0
    behind(config.stages.random, perplexity=least(1000))

    config.stages.pretrain = train("configs/pretrain.py", "Learns to go on with text", measured=True)
    config.stages.pretrain.run = pretrain.get_config()
    config.stages.pretrain.run.start = "{random}"
    _reads(config.stages.pretrain.run, "{clean}/clean.jsonl")
    behind(config.stages.pretrain, text=most(2.5))
    config.stages.pretrain.update(attempts=2, adjust={"loop": {"steps": 2.0}})

    config.stages.sft = train("configs/sft.py", "Learns to answer", measured=True)
    config.stages.sft.run = sft.get_config()
    config.stages.sft.run.start = "{pretrain}"
    config.stages.sft.run.data.sources.chat.path = "{instructions}"
    config.stages.sft.run.data.sources.replay.path = "{clean}/clean.jsonl"
    behind(config.stages.sft, validation_answers_ended=least(0.5))
    config.stages.sft.update(attempts=2, adjust={"loop": {"steps": 2.0}, "optimizer": {"learning_rate": 0.7}})

    config.stages.reward = train("configs/reward.py", "Learns which of two answers is preferred")
    config.stages.reward.run = reward.get_config()
    config.stages.reward.run.start = "{sft}"
    config.stages.reward.run.data.sources.pairs.path = "{preferences}"
    behind(config.stages.reward, validation_accuracy=least(0.6))
    config.stages.reward.update(attempts=2, adjust={"loop": {"steps": 2.0}})

    config.stages.ppo = train(
        "configs/rlhf.py", "Answers as the reward model likes, near to what it was", measured=True
    )
    config.stages.ppo.run = rlhf.get_config()
    config.stages.ppo.run.start = "{sft}"
    config.stages.ppo.run.rollout.sources.questions.path = "{questions}"
    config.stages.ppo.run.rollout.rewards.preference.path = "{reward}"

    config.stages.dpo = train(
        "configs/preference.py", "Learns the same preferences without a reward model", measured=True
    )
    config.stages.dpo.run = preference.get_config()
    config.stages.dpo.run.start = "{sft}"
    config.stages.dpo.run.data.sources.pairs.path = "{preferences}"
    for name, adjust in NEARER.items():
        behind(config.stages[name], wins=least(0.55), drift=most(20.0, adjust=adjust))
        config.stages[name].update(attempts=2, adjust={"loop": {"steps": 1.5}})

    config.stages.grpo = train("configs/rl.py:grpo", "Learns to reason, from answers that are checked", measured=True)
    config.stages.grpo.run = rl.get_config("grpo")
    config.stages.grpo.run.start = "{dpo}"
    behind(config.stages.grpo, sums=least(0.1, over="dpo"))
    config.stages.grpo.update(attempts=2, adjust={"loop": {"steps": 2.0}})
    return config


def stage(kind: str, about: str) -> ml_collections.ConfigDict:
    """A stage that is tried once."""
    stage = ml_collections.ConfigDict()
    stage.kind = kind  # "lessons" | "clean" | "tokenizer" | "train"
    stage.about = about  # a sentence for the report
    stage.config = ""  # of "train": the file whose config ``run`` is
    stage.run = ml_collections.ConfigDict()  # of "train" its whole config, of others the flags of their script
    stage.metric = ""  # the gate that the summary is about
    stage.gates = ml_collections.ConfigDict()  # number -> gate: all must pass
    stage.attempts = 1  # at most; the best of them counts where none passes
    # Keys of ``run``, each with its factor for another attempt, where a gate that says none of its own was missed, or
    # where the run diverged.
    stage.adjust = ml_collections.ConfigDict()
    stage.measured = False  # whether it leaves a model for the scoreboard
    return stage


def train(file: str, about: str, *, measured: bool = False) -> ml_collections.ConfigDict:
    made = stage("train", about)
    made.update(config=file, measured=measured)
    return made


def behind(stage: ml_collections.ConfigDict, **gates: ml_collections.ConfigDict) -> None:
    """Puts the stage behind these gates alone; the first is what its summary is about."""
    stage.metric, stage.gates = next(iter(gates)), ml_collections.ConfigDict(gates)


def least(value: float, *, over: str = "", adjust: dict | None = None) -> ml_collections.ConfigDict:
    """A number must be no less; ``over``: less what that stage has of it; ``adjust``: as of a stage, where it is."""
    gate = ml_collections.ConfigDict()
    gate.bound = "least"  # | "most"
    gate.value = float(value)
    gate.over = over
    gate.adjust = adjust or {}
    return gate


def most(value: float, *, over: str = "", adjust: dict | None = None) -> ml_collections.ConfigDict:
    """A number must be no more."""
    gate = least(value, over=over, adjust=adjust)
    gate.bound = "most"
    return gate


def measure(suite: str, metric: str, unit: str, best: str, **changes) -> ml_collections.ConfigDict:
    """A number of every model. Measures that differ in what they say alone are taken together."""
    measure = ml_collections.ConfigDict()
    measure.about = ""  # a sentence for the report
    measure.unit = unit  # "share" | "bits" | "nats" | "points" | "number"
    measure.best = best  # "max" | "min"
    measure.suite = suite  # "perplexity" | "answers" | "tasks" | "choice" | "win_rate"
    measure.metric = metric  # of that suite
    measure.file = ""  # documents, or records of questions
    measure.task = ""  # of "tasks"
    measure.level = 1  # of that task
    measure.count = 0  # items, at most; 0: all
    measure.samples = 1  # answers to each question
    measure.temperature = 0.0
    measure.max_new_tokens = 48
    measure.batch_size = 64
    measure.against = ""  # of "win_rate": the stage to win against
    measure.judge = "rule:style"  # of "win_rate": as of experiments/win_rate.py
    measure.shown = 0  # items whose answers the report shows
    measure.update(changes)
    return measure


def _reads(run: ml_collections.ConfigDict, path: str) -> None:
    run.data.sources.main.path = path
