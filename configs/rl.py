"""Reinforcement learning with verifiable rewards, from a fine-tuned policy that has seen the format of answers.

python experiments/train.py --config=configs/rl.py:grpo --workdir=runs/grpo --config.start=runs/sft

The argument names the algorithm: ``grpo``, ``dr_grpo``, ``dapo``, ``gspo``, ``cispo``, ``rloo``, ``reinforce`` or
``ppo``. Each is a few keys of ``config.policy``, which may be changed one by one. The task is addition of two-digit
numbers.
"""

from configs import common

ALGORITHMS = {
    # Shao et al. 2024, arXiv:2402.03300: the group is the critic, KL in the loss, every completion weighs the same.
    "grpo": dict(advantage="group", weights="sequence", kl_loss=0.04, kl="k3"),
    # Liu et al. 2025, arXiv:2503.20783: neither the group's deviation nor a completion's length divides.
    "dr_grpo": dict(advantage="group_mean", weights="constant"),
    # Yu et al. 2025, arXiv:2503.14476: clip higher, tokens weigh the same, groups without a lesson are drawn again.
    "dapo": dict(advantage="group", weights="token", clip_high=0.28),
    # Zheng et al. 2025, arXiv:2507.18071: one ratio for a completion, clipped tightly.
    "gspo": dict(advantage="group", ratio="sequence", weights="sequence", clip_low=3e-4, clip_high=4e-4),
    # Chen et al. 2025, arXiv:2506.13585: the ratio is a weight, and no token loses its gradient.
    "cispo": dict(advantage="group", surrogate="cispo", weights="token", clip_high=4.0),
    # Ahmadian et al. 2024, arXiv:2402.14740: the baseline is the mean of the prompt's other completions.
    "rloo": dict(advantage="leave_one_out", surrogate="reinforce", weights="constant", kl_reward=0.03),
    # Williams 1992: the baseline is the mean of the rollout.
    "reinforce": dict(advantage="batch", surrogate="reinforce", weights="constant"),
    # Schulman et al. 2017, arXiv:1707.06347, as Ziegler et al. 2019, arXiv:1909.08593, have it for language.
    "ppo": dict(advantage="gae", weights="token", kl_reward=0.03, whiten=True, epochs=2, minibatches=2),
}


def get_config(arg: str = ""):
    """``arg``: an algorithm, "" for grpo; with "-tiny" behind it, or "tiny" alone, for a run of seconds."""
    name, _, size = arg.rpartition("-") if arg.endswith("tiny") else (arg, "", "")
    if name not in ("", *ALGORITHMS) or size not in ("", "tiny"):
        named = f"one of {tuple(ALGORITHMS)}, or such a name with '-tiny'"
        raise ValueError(f"configs/rl.py takes no argument, 'tiny', {named}, not {arg!r}")
    name = name or "grpo"
    config = common.get_config()
    config.optimizer.update(learning_rate=3e-4, schedule="constant", warmup=5, weight_decay=0.0)
    config.loop.update(steps=200, batch_size=64, micro_batches=16, evaluate_every=20, sample_every=20, save_every=20)
    config.rollout.update(max_prompt_tokens=32, max_new_tokens=64)
    if size == "tiny":
        config = common.tiny(config)
        config.rollout.update(max_prompt_tokens=24, max_new_tokens=40)
    config.stage = "rl"
    config.policy.update(ALGORITHMS[name])
    config.model.scalar_head = config.policy.advantage == "gae"
    config.rollout.sources = {"problems": common.problem("addition", level=2)}
    config.rollout.rewards = {
        "accuracy": common.reward("accuracy", weight=1.0),
        "format": common.reward("format", weight=0.2),
    }
    if name == "dapo":
        config.rollout.refill_rounds = 2
        config.rollout.rewards.overlong = common.reward("overlong", buffer=8)
    config.loop.update(log_every=1, evaluate_first=True, evaluate_answers=200 if size != "tiny" else 8)
    config.loop.update(best_metric="validation_reward", best_mode="max")
    return config
