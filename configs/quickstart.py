"""The whole life of a small model on a small world, where everything that it learns can be counted.

python experiments/quickstart.py --workdir=runs/quickstart

Two CPU cores, four to eight minutes, nothing to download. Each threshold is one that a stage
which does nothing misses.
"""

from configs import common, pipeline
from configs.pipeline import behind, least, measure, most, stage


def get_config(arg: str = ""):
    """``arg``: "" for the life above, "tiny" for one of a minute or two, whose gates stand open."""
    common.no_argument("quickstart", arg)
    config = pipeline.get_config()
    config.title = "The life of a small model"
    config.prompts = ("The home of", "To add 12+34:")
    config.order = ("lessons", *config.order)
    config.files.update(
        documents="{lessons}/documents.jsonl",
        heldout="{lessons}/heldout_documents.jsonl",
        instructions="{lessons}/instructions.jsonl",
        preferences="{lessons}/preferences.jsonl",
        questions="{lessons}/questions.jsonl",
    )
    _measures(config.measures)
    _stages(config.stages)
    return tiny(config) if arg else config


def _measures(measures) -> None:
    """What is known of everybody, who was held out or not, how it is said, and sums."""
    facts = "{lessons}/heldout_facts.jsonl"
    measures.facts = measure("answers", "exact_match", "share", "max", file=facts, shown=3)
    measures.facts.about = "Plain questions about people of whom it only read: the answer is right to the letter"
    requests = "{lessons}/heldout_requests.jsonl"
    measures.requests = measure("answers", "contains", "share", "max", file=requests, shown=2)
    measures.requests.about = "Polite questions about the same people: the fact is said, whatever is said around it"
    measures.sums.update(about="Sums of two numbers that were never shown, the likeliest answer", shown=2)
    measures.drawn = measure("tasks", "accuracy", "share", "max", task="addition", level=2, samples=2, temperature=1.0)
    measures.drawn.about = "The same sums, answers drawn at temperature 1"
    for name in ("wins", "drift"):
        measures[name].update(file=requests, max_new_tokens=64)
    measures.facts.max_new_tokens = 32
    for name in ("sums", "drawn"):
        measures[name].max_new_tokens = 48


def _stages(stages) -> None:
    stages.lessons = stage("lessons", "A small world: lives to read, questions, preferences, sums, and dirt among them")
    stages.lessons.run = {"seed": 0, "people": 80, "heldout": 16, "biographies": 45, "correct": 0.5}
    behind(stages.lessons, documents=least(1000))
    behind(stages.clean, caught=least(0.95), lost=most(0.01))

    stages.tokenizer.run.vocab_size = stages.random.run.tokenizer.vocab_size = 768
    sizes = dict(num_layers=4, width=128, mlp_width=344, num_heads=4, num_kv_heads=2, head_width=32)
    stages.random.run.model.update(sizes)
    behind(stages.random, perplexity=most(900), validation_loss=least(6.5))  # uniform is 768, whose logarithm is 6.64

    stages.pretrain.run.optimizer.update(learning_rate=3e-3, warmup=30)
    stages.pretrain.run.loop.update(steps=700, batch_size=16)
    # It goes on with text, and does not answer.
    behind(stages.pretrain, text=most(0.5), facts=most(0.05))

    stages.sft.run.optimizer.learning_rate = 1.5e-3
    stages.sft.run.objective.neftune_alpha = 0.0
    stages.sft.run.loop.update(steps=450)
    behind(stages.sft, facts=least(0.8), requests=least(0.8))

    stages.reward.run.loop.update(steps=240)
    # The shorter answer is the better one of three in four pairs.
    behind(stages.reward, validation_accuracy=least(0.9))

    stages.ppo.run.loop.update(steps=100)
    stages.ppo.run.policy.update(kl_reward=0.15, lam=0.95)
    stages.dpo.run.preference.update(beta=0.3, sft_weight=1.0)
    stages.dpo.run.optimizer.learning_rate = 3e-4
    stages.dpo.run.loop.update(steps=300)
    further = {"ppo": {"policy": {"kl_reward": 0.5}, "loop": {"steps": 1.5}}, "dpo": {"loop": {"steps": 1.5}}}
    for name, nearer in pipeline.NEARER.items():
        wins, drift = least(0.75, adjust=further[name]), most(10.0, adjust=nearer)
        behind(stages[name], wins=wins, drift=drift, **_kept(adjust=nearer))

    stages.grpo.run.optimizer.b2 = 0.98
    stages.grpo.run.policy.minibatches = 2
    stages.grpo.run.loop.update(steps=120, batch_size=128)
    stages.grpo.run.rollout.update(max_prompt_tokens=24, max_new_tokens=48)
    behind(stages.grpo, drawn=least(0.3, over="dpo"), sums=least(0.6), wins=least(0.6), **_kept())

    for name in ("pretrain", "sft", "reward", "ppo", "dpo", "grpo"):
        loop = stages[name].run.loop
        loop.update(sample_every=0, evaluate_answers=0, evaluate_first=False, micro_batches=2)
        loop.update(evaluate_every=loop.steps // 3, save_every=loop.steps // 3)
        stages[name].run.data.update(sequence_length=128, validation=0.02)
    for name in ("reward", "dpo"):
        stages[name].run.data.validation = 0.04
    for name in ("ppo", "grpo"):
        stages[name].run.loop.update(micro_batches=8, evaluate_answers=64)
    stages.ppo.run.loop.evaluate_every = stages.ppo.run.loop.steps
    stages.ppo.run.rollout.update(max_prompt_tokens=40, max_new_tokens=64)
    stages.random.run.data.update(sequence_length=128, validation=0.02)
    stages.random.run.loop.update(sample_every=0)


def _kept(**adjust):
    """What was learned before is still there."""
    return dict(facts=least(0.7, **adjust), requests=least(0.7, **adjust), text=most(0.5, **adjust))


def tiny(config):
    """Everything once, nothing learned: two narrow layers, a few updates, gates that stand open."""
    config.stages.lessons.run.update(people=24, heldout=2, biographies=4, talks=1, sums=40, introductions=20)
    config.stages.lessons.run.update(follow_ups=10, demonstrations=40)
    sizes = dict(num_layers=2, width=32, mlp_width=48, num_heads=2, num_kv_heads=1, head_width=16)
    config.stages.random.run.model.update(sizes)
    for name in ("pretrain", "sft", "reward", "ppo", "dpo", "grpo"):
        loop = config.stages[name].run.loop
        loop.update(steps=4, batch_size=8, evaluate_every=4, save_every=2, log_every=1, evaluate_batches=2)
        config.stages[name].run.optimizer.warmup = 1
        config.stages[name].attempts = 1
    for name in ("ppo", "grpo"):
        config.stages[name].run.loop.evaluate_answers = 4
    for each in config.measures.values():
        each.update(count=8, max_new_tokens=16)
    for name in config.order:
        for bound in config.stages[name].gates.values():
            bound.value = 1e9 if bound.bound == "most" else -1e9
    return config
