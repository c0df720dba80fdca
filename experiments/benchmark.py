"""Measures this machine, then what the project makes of it: training, decoding, the loss, the loader, compilation and overheads.

    python experiments/benchmark.py [--only=train,decode] [--seconds=60] [--json=FILE] [--config=configs/llama_14m.py]

What is compared takes turns, round by round in one process, so that a disturbance meets all of it; ratios are medians over rounds,
with the least and the greatest beside. Compilation and warm-up are not in any time but their own.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402  the checkout must be importable first
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from absl import app, flags  # noqa: E402
from ml_collections import config_flags  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from jaxllm import hardware, loop, sharding, tree, workdir  # noqa: E402
from jaxllm.generate import generate  # noqa: E402
from jaxllm.losses import chunked_cross_entropy, chunked_token_logprobs, cross_entropy, token_logprobs  # noqa: E402
from jaxllm.model import DecoderConfig, build, decoding, flops_per_token  # noqa: E402
from jaxllm.stages import STAGES, RunConfig, Stage, run_config  # noqa: E402

CONFIG = config_flags.DEFINE_config_file("config", str(ROOT / "configs" / "llama_14m.py"), "the run to measure")
ONLY = flags.DEFINE_list("only", [], "sections to run, of those that the table of all of them has; all unless told")
SECONDS = flags.DEFINE_float("seconds", 60.0, "time for the rounds of each section, after its compilation", lower_bound=0.0)
JSON = flags.DEFINE_string("json", None, "file for the results")

FEWEST_ROUNDS = 3


class Bench(NamedTuple):
    """What every section needs: the run as its config says, this machine's limits, and the time to take."""

    values: dict
    config: RunConfig
    stage: Stage
    directory: Path
    seconds: float
    peaks: dict[str, float]  # operand dtype -> FLOP/s
    bandwidth: float  # bytes per second, read and written


# ---- the plain float32 step that ratios refer to ----


def reference_loss(config: DecoderConfig, params, batch):
    """Llama as a textbook has it: a scan over layers, dense logits [B, T, V], JAX's own differentiation, float32 throughout."""
    tokens_BT, positions_BT, segments_BT = (batch[name] for name in ("tokens_BT", "positions_BT", "segments_BT"))
    frequencies = config.rope.theta ** (-jnp.arange(0, config.head_width, 2) / config.head_width)
    angles = positions_BT[:, :, None, None] * frequencies[None, None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    seen_BTS = (positions_BT[:, :, None] >= positions_BT[:, None, :]) & (segments_BT[:, :, None] == segments_BT[:, None, :])

    def norm(x, p):
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + config.norm_eps) * p["scale"]

    def rotate(x):
        a, b = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def attention(x, p):
        q, k, v = (jnp.einsum("btd,dnh->btnh", x, p[name]["kernel"]) for name in ("query", "key", "value"))
        k, v = (jnp.repeat(y, config.num_heads // config.num_kv_heads, axis=2) for y in (rotate(k), v))
        scores = jnp.einsum("btnh,bsnh->bnts", rotate(q), k) * config.head_width**-0.5
        weights = jax.nn.softmax(jnp.where(seen_BTS[:, None], scores, -1e30), axis=-1)
        return jnp.einsum("btnh,nhd->btd", jnp.einsum("bnts,bsnh->btnh", weights, v), p["output"]["kernel"])

    def mlp(x, p):
        return (jax.nn.silu(x @ p["gate"]["kernel"]) * (x @ p["up"]["kernel"])) @ p["down"]["kernel"]

    def block(x, p):
        x = x + attention(norm(x, p["attention_pre_norm"]), p["attention"])
        return x + mlp(norm(x, p["mlp_pre_norm"]), p["mlp"]), None

    x_BTD, _ = jax.lax.scan(block, params["embedding"]["table"][tokens_BT], params["blocks"])
    head_DV = params["embedding"]["table"].T if config.tied_head else params["head"]["kernel"]
    logp_BTV = jax.nn.log_softmax(norm(x_BTD, params["final_norm"]) @ head_DV)
    logp_BT = jnp.take_along_axis(logp_BTV, batch["targets_BT"][..., None], axis=-1)[..., 0]
    return -jnp.sum(batch["mask_BT"] * logp_BT) / jnp.sum(batch["mask_BT"])


def reference_step(bench: Bench, batch) -> tuple[Callable, tuple]:
    """(step(state, batch) -> (state, metrics), first state): one whole batch, optax's AdamW behind clipping, the run's own first parameters."""
    o = bench.config.optimizer
    adamw = optax.adamw(o.learning_rate / max(o.warmup, 1), o.b1, o.b2, o.eps, weight_decay=o.weight_decay)
    optimizer = optax.chain(optax.clip_by_global_norm(o.clip_norm), adamw)
    gradients = jax.value_and_grad(partial(reference_loss, bench.stage.model.config))

    def step(state, batch):
        params, opt_state = state
        loss, grads = gradients(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), {"loss": loss}

    params = jax.jit(bench.stage.model.init)(jax.random.key(bench.config.seed))
    return step, (params, optimizer.init(params))


# ---- sections ----


def machine(bench: Bench) -> dict:
    """Peaks of products with float32 results, by operand dtype, and the copy bandwidth."""
    peaks = {f"{dtype} operands, GFLOP/s": flops / 1e9 for dtype, flops in bench.peaks.items()}
    return peaks | {"copy bandwidth, GB/s": bench.bandwidth / 1e9}


def train(bench: Bench) -> dict:
    """Whole updates: the reference, and the loop's own step with the operands of the config and with float32 ones."""
    batch = next(bench.stage.batches)
    whole = {name: jnp.asarray(x.reshape(-1, x.shape[-1])) for name, x in batch.items()}
    programs = {"reference": reference_step(bench, whole)}
    for operands in dict.fromkeys((bench.config.model.operand_dtype, "float32")):
        programs[operands] = loop_step(bench, batch, operand_dtype=operands)
    losses = {name: float(run()[1]["loss"]) for name, (run, _) in programs.items()}
    if not max(losses.values()) - min(losses.values()) < 1e-2:
        raise ValueError(f"first losses {losses} differ: the reference is a plain Llama without dropout; the config must be one")
    runs = {name: partial(seconds, run) for name, (run, _) in programs.items()}
    peaks = {f"peak {dtype}": partial(hardware.measured_flops, dtype, repeats=3) for dtype in bench.peaks}
    rounds = turns(runs | peaks, bench.seconds)
    tokens = whole["tokens_BT"].size
    flops = flops_per_token(bench.stage.model.config, bench.config.data.sequence_length) * tokens
    found = {"rounds": len(rounds["reference"])}
    for name, (_, compile_seconds) in programs.items():
        operands, title = ("float32", name) if name == "reference" else (name, f"{name} operands")
        found[f"{title}, tokens/s"] = spread(tokens / rounds[name])
        found[f"{title}, share of the {operands} peak (MFU)"] = spread(flops / rounds[name] / rounds[f"peak {operands}"])
        found[f"{title}, times the reference"] = spread(rounds["reference"] / rounds[name])
        found[f"{title}, compile s"] = compile_seconds
    return found


def decode(bench: Bench, *, rows: int = 64, prompt: int = 64, new: int = 128) -> dict:
    """Sampling against a floor: each product and each look at the cache takes at least its bytes over the bandwidth and its FLOPs over the peak."""
    model = bench.stage.model
    config, key = model.config, jax.random.key(0)
    params = jax.jit(model.init)(key)
    prompts_BT = np.random.default_rng(0).integers(32, config.vocab_size, (rows, prompt), np.int32)
    run = partial(generate, model, params, prompts_BT, np.full(rows, prompt), key, max_new_tokens=new, stop_ids=())
    compile_seconds = seconds(run)
    rounds = turns({"decode": partial(seconds, run), "bandwidth": partial(hardware.measured_bandwidth, repeats=2)}, bench.seconds)
    floor = decode_floor(bench, params, rows=rows, prompt=prompt, new=new)
    return {
        "batch x prompt + new": f"{rows} x {prompt} + {new}",
        "new tokens/s": spread(rows * new / rounds["decode"]),
        "bandwidth in the same rounds, GB/s": spread(rounds["bandwidth"] / 1e9),
        "floor, tokens/s": rows * new / floor,
        "share of the floor": spread(floor / rounds["decode"]),
        "compile and first run s": compile_seconds,
        "rounds": len(rounds["decode"]),
    }


def decode_floor(bench: Bench, params, *, rows: int, prompt: int, new: int) -> float:
    """Seconds: the prompts' products, then for each new token all weights and the filled part of the cache, at its mean length, read once."""
    config = bench.stage.model.config
    peak, bandwidth = bench.peaks[config.operand_dtype], bench.bandwidth
    kernels, head = tree.size(params["blocks"]), config.width * config.vocab_size
    width = jnp.dtype(config.operand_dtype).itemsize
    products = max((kernels + head) * width / bandwidth, 2 * rows * (kernels + head) / peak)
    positions = rows * config.num_layers * (prompt + new / 2)
    cached = positions * 2 * config.num_kv_heads * config.head_width * jnp.dtype(config.activation_dtype).itemsize
    attention = max(cached / bandwidth, positions * 4 * config.num_heads * config.head_width / bench.peaks["float32"])
    prefill = 2 * rows * (prompt * kernels + head) / peak
    # The first new token comes from the prompts' own products.
    return prefill + (new - 1) * (products + attention)


def loss(bench: Bench, *, V: int = 128_000, B: int = 4, T: int = 1024) -> dict:
    """Temporary memory of the loss with both gradients, as the compiler plans it; and its time at the run's own vocabulary."""
    options = dict(chunk=bench.config.model.loss_chunk, operand_dtype=bench.config.model.operand_dtype)
    candidates = {
        "dense": lambda h, w, t, weight: cross_entropy(token_logprobs(h @ w, t), weight),
        "chunked_token_logprobs": lambda h, w, t, weight: cross_entropy(chunked_token_logprobs(h, w, t, **options)[0], weight),
        "chunked_cross_entropy": lambda h, w, t, weight: chunked_cross_entropy(h, w, t, weight, **options)[0],
    }
    programs = {name: jax.jit(jax.value_and_grad(loss, argnums=(0, 1))) for name, loss in candidates.items()}
    large, own = (
        [jnp.zeros, jax.ShapeDtypeStruct][large], for large in (True, False)
    )
    return {}
