"""PPO from a reward model (RLHF): a fine-tuned policy, a model of what people prefer, and a KL that holds the policy.

python experiments/train.py --config=configs/rlhf.py --workdir=runs/rlhf --config.start=runs/sft \
    --config.rollout.sources.questions.path=questions.jsonl --config.rollout.rewards.preference.path=runs/reward

Two minutes on a CPU core for a model of the people of ``experiments/world.py`` (LOG.md). With ``policy.kl_reward=0``
the reward model's opinion is all that counts, and what it stands for falls (Gao et al. 2023, arXiv:2210.10760):
"style", the taste that the world plants, only watches.
"""

from configs import common, rl


def get_config(arg: str = ""):
    common.no_argument("rlhf", arg)
    config = rl.get_config("ppo-tiny" if arg else "ppo")
    config.rollout.sources = {"questions": common.problem("file", path="questions.jsonl")}
    config.rollout.rewards = {
        "preference": common.reward("model", weight=1.0, path="runs/reward"),
        "style": common.reward("style", weight=0.0),
    }
    config.policy.update(kl_reward=0.1, lam=1.0)
    config.optimizer.learning_rate = 1e-4
    if not arg:
        config.data.sequence_length = 128
        config.rollout.update(completions=1, max_new_tokens=80)
        config.loop.update(steps=160, micro_batches=8, log_every=4, evaluate_every=40, sample_every=80, save_every=40)
    return config
