"""Sections of the benchmark about sampling for reinforcement learning: a whole step, and slots that are refilled."""

from collections import deque
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np

from experiments.measuring import Bench, loop_step, seconds, spread, turns
from jaxllm import loop, sharding
from jaxllm.configure import section
from jaxllm.data.problems import Problem, ProblemSource
from jaxllm.generate import Request, completions, generate
from jaxllm.rewards.scoring import Term
from jaxllm.rl.config import RolloutConfig
from jaxllm.rl.experience import experience
from jaxllm.rl.layout import Shape, filled
from jaxllm.text import chat
from jaxllm.train.policy import PolicyConfig, policy


def rl(bench: Bench, *, prompts: int = 8, each: int = 8, prompt: int = 32, new: int = 64) -> dict:
    """A GRPO step without a reference, from prompts to new parameters, and its parts: the rollout, with what it waits
    for rewards, and the update. The rollout beside plain decoding of the same shape, which shares no prompt.
    """
    model, tokenizer, B = bench.stage.model, bench.stage.tokenizer, prompts * each
    asked = [Problem(question(text), {}) for text in texts(bench, prompts, prompt)]
    given = dict(sources={"any": ProblemSource("addition")}, rewards={"form": Term("format")}, completions=each)
    given |= dict(max_prompt_tokens=prompt, max_new_tokens=new)
    policy_config = section(PolicyConfig, bench.values["policy"])
    prompts_BT = np.repeat([chat.prompt(problem.prompt, tokenizer) for problem in asked], each, axis=0)
    with jax.set_mesh(mesh := sharding.mesh(bench.config.mesh)):
        rows = 2 * sharding.data_parallelism(mesh)
        shape = Shape(B // rows, rows, prompt - 1 + each // 2 * new)
        how = dict(shape=shape, place=partial(sharding.whole_batch, on=mesh), held_out=0.1, seed=0)
        rollout_config = section(RolloutConfig, bench.values["rollout"] | given)
        drawn = experience(rollout_config, policy_config, model, None, tokenizer, **how)
        drawn.problems = SimpleNamespace(problem=lambda number: asked[number % prompts])
        params = loop.compile_programs(bench.config, bench.stage, mesh).init(jax.random.key(0)).params

    def rollout():
        with jax.set_mesh(mesh):
            return drawn.batch(params, None, 0)

    def decoding():
        with jax.set_mesh(mesh):
            how = dict(max_new_tokens=new, stop_ids=())
            return generate(model, params, prompts_BT, np.full(B, prompt), jax.random.key(0), **how)

    objective = policy(model, policy_config)
    stage = bench.stage._replace(objective=objective, prepare=lambda params, batch: batch, filled=filled, keys=())
    batch, told = rollout()
    runs = {"rollout": rollout, "decoding": decoding, "update": loop_step(bench.config, stage, batch)[0]}
    [run() for run in runs.values()]
    rounds = turns({name: partial(seconds, run) for name, run in runs.items()}, bench.seconds)
    speed = told["completion_tokens"] * B / rounds["rollout"]
    return {
        "prompts x completions": f"{prompts} x {each}, {prompt} + {new} tokens",
        "step, seconds": spread(rounds["rollout"] + rounds["update"]),
        "rollout with its rewards, seconds": spread(rounds["rollout"]),
        "of these waiting for rewards": drawn.rewarding.waited,
        "update, seconds": spread(rounds["update"]),
        "rollout, new tokens/s": spread(speed),
        "rollout, times the speed of plain decoding": spread(speed * rounds["decoding"] / (B * new)),
        "tokens of the update": int(np.count_nonzero(batch["segments_BT"])),
    }


def question(text: str) -> chat.Conversation:
    """What a user asks."""
    return chat.Conversation(({"role": "user", "content": text},))


def texts(bench: Bench, count: int, length: int) -> list[str]:
    """Texts of the run whose prompts have exactly so many ids."""
    found, tokenizer, ids = [], bench.stage.tokenizer, next(bench.stage.batches)["tokens_BT"].ravel()
    for start in range(0, len(ids), length):
        piece = ids[start:][: length - 4].tolist()
        text = tokenizer.decode(token for token in piece if token not in tokenizer.special_ids)
        if len(chat.prompt(question(text), tokenizer)) == length:
            found.append(text)
        if len(found) == count:
            return found
    raise ValueError(f"a batch has no {count} texts of {length} ids: give a run of more tokens")


def slots(bench: Bench, *, requests: int = 512, width: int = 64, prompt: int = 32, new: int = 64) -> dict:
    """Completions of 8 to ``new`` tokens, more than slots: slots that are refilled against batches that wait for their
    longest, and what follows from the tokens that such batches waste where prompts take as long in both.
    """
    model, mesh, draw = bench.stage.model, sharding.mesh(bench.config.mesh), np.random.default_rng(0)
    limits = draw.integers(8, new + 1, requests)
    first = 1 + max(bench.stage.tokenizer.special_ids)
    prompts_BT = draw.integers(first, model.config.vocab_size, (requests, prompt), np.int32)
    key, batches = jax.random.key(0), [slice(start, start + width) for start in range(0, requests, width)]
    with jax.set_mesh(mesh):
        params = loop.compile_programs(bench.config, bench.stage, mesh).init(key).params

    def waiting(new=new):
        with jax.set_mesh(mesh):
            for here in batches:
                how = dict(max_new_tokens=min(new, int(limits[here].max())), stop_ids=())
                generate(model, params, prompts_BT[here], np.full(len(limits[here]), prompt), key, **how)

    def refilled():
        queue = deque(Request(n, prompts_BT[n].tolist(), int(limits[n])) for n in range(requests))
        with jax.set_mesh(mesh):
            return list(completions(model, params, queue, key, slots=width, length=prompt + new, stop_ids=()))

    sides = {"waiting": waiting, "refilled": refilled, "reading": partial(waiting, 1)}
    for run in sides.values():
        run()
    rounds = turns({name: partial(seconds, run) for name, run in sides.items()}, bench.seconds)
    drawn = sum(int(limits[here].max()) * len(limits[here]) for here in batches)
    needed = rounds["reading"] + (rounds["waiting"] - rounds["reading"]) * limits.sum() / drawn
    return {
        "requests in slots": f"{requests} in {width}, {prompt} + 8 to {new} tokens",
        "batches that wait, new tokens/s": spread(limits.sum() / rounds["waiting"]),
        "refilled slots, new tokens/s": spread(limits.sum() / rounds["refilled"]),
        "refilled, times the speed": spread(rounds["waiting"] / rounds["refilled"]),
        "predicted by the tokens that are wasted": spread(rounds["waiting"] / needed),
    }
