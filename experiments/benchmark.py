"""Measures this machine, then what the project makes of it: training, decoding, loss, loader, compilation, overheads.

    python experiments/benchmark.py [--only=train,decode] [--seconds=60] [--json=FILE] [--config=configs/llama_14m.py]

What is compared takes turns, round by round in one process, so that a disturbance meets all of it; numbers are medians
over rounds, with the least and the greatest beside. Compilation and warm-up are in no time but their own.
"""

import dataclasses
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402  the checkout must be importable first
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from absl import app, flags  # noqa: E402
from ml_collections import config_flags  # noqa: E402
from rich.console import Console  # noqa: E402

from experiments import reference  # noqa: E402
from experiments.measuring import (  # noqa: E402
    Bench,
    compiled,
    loop_step,
    repeating,
    seconds,
    spread,
    staged,
    table,
    turns,
)
from experiments.rollouts import rl, slots  # noqa: E402
from jaxllm import hardware, loop, sharding, tree, workdir  # noqa: E402
from jaxllm.generate import generate  # noqa: E402
from jaxllm.losses import chunked_cross_entropy, chunked_token_logprobs, cross_entropy, token_logprobs  # noqa: E402
from jaxllm.model import DecoderConfig, decoding, flops_per_token  # noqa: E402
from jaxllm.run_config import run_config  # noqa: E402
from jaxllm.stages import STAGES  # noqa: E402
from jaxllm.train import preferences  # noqa: E402

CONFIG = config_flags.DEFINE_config_file("config", str(ROOT / "configs" / "llama_14m.py"), "the run to measure")
ONLY = flags.DEFINE_list("only", [], "sections to run, of those that the table of all of them has; all unless told")
SECONDS = flags.DEFINE_float(
    "seconds", 60.0, "time for the rounds of each section, after its compilation", lower_bound=0.0
)
JSON = flags.DEFINE_string("json", None, "file for the results")

# ---- sections ----


def machine(bench: Bench) -> dict:
    """Peaks of products with float32 results, by operand dtype, and the bandwidth of an update in place."""
    peaks = {f"{dtype} operands, GFLOP/s": flops / 1e9 for dtype, flops in bench.peaks.items()}
    return peaks | {"bandwidth, read and written, GB/s": bench.bandwidth / 1e9}


def train(bench: Bench) -> dict:
    """Whole updates: the reference, and the loop's own step with the operands of the config and with float32 ones."""
    batch = next(bench.stage.batches)
    whole = {name: jnp.asarray(x.reshape(-1, x.shape[-1])) for name, x in batch.items()}
    programs = {"reference": compiled(*reference.step(bench.config, bench.stage.model), whole)}
    for operands in dict.fromkeys((bench.config.model.operand_dtype, "float32")):
        programs[operands] = loop_step(*staged(bench, operand_dtype=operands), batch)
    losses = {name: float(run()[1]["loss"]) for name, (run, _) in programs.items()}
    if not max(losses.values()) - min(losses.values()) < 1e-2:
        raise ValueError(
            f"first losses {losses} differ: the reference is a plain Llama without dropout; the config must be one"
        )
    runs = {name: partial(seconds, run) for name, (run, _) in programs.items()}
    peaks = {f"peak {dtype}": partial(hardware.measured_flops, dtype, repeats=3) for dtype in bench.peaks}
    rounds = turns(runs | peaks, bench.seconds)
    tokens = whole["tokens_BT"].size
    flops = flops_per_token(bench.stage.model.config, bench.config.data.sequence_length) * tokens
    found = {"rounds": len(rounds["reference"])}
    for name, (_, compile_seconds) in programs.items():
        operands, title = ("float32", name) if name == "reference" else (name, f"{name} operands")
        found[f"{title}, tokens/s"] = spread(tokens / rounds[name])
        found[f"{title}, MFU of the {operands} peak"] = spread(flops / rounds[name] / rounds[f"peak {operands}"])
        found[f"{title}, times the reference"] = spread(rounds["reference"] / rounds[name])
        found[f"{title}, compile s"] = compile_seconds
    return found


def fine_tuning(bench: Bench, *, conversations: int = 2000) -> dict:
    """Updates on packed conversations, without and with NEFTune's noise, against updates on texts of the same shape."""
    batch, path = next(bench.stage.batches), bench.directory / "chat.json"
    draw, tokens = np.random.default_rng(0), batch["tokens_BT"].ravel()
    pieces = [tokens[start:][:length] for start, length in draw.integers([0, 8], [len(tokens), 80], (conversations, 2))]
    tokenizer = bench.stage.tokenizer
    words = ([token for token in piece if token not in tokenizer.special_ids] for piece in pieces)
    texts = [tokenizer.decode(each) or "." for each in words]
    chats = [{"prompt": question, "response": answer} for question, answer in zip(texts[::2], texts[1::2], strict=True)]
    path.write_text(json.dumps(chats), encoding="utf-8")
    values = dict(
        bench.values, stage="sft", tokenizer=bench.values["tokenizer"] | {"path": str(bench.directory / "tokenizer")}
    )
    source = next(iter(values["data"]["sources"].values())) | {
        "path": str(path),
        "format": "auto",
        "packing": "best_fit_whole",
    }
    values["data"] = values["data"] | {"sources": {"chat": source}}
    programs = {"texts": loop_step(bench.config, bench.stage, batch)}
    for name, alpha in (("conversations", 0.0), ("conversations, with noise", 5.0)):
        config = run_config(values | {"objective": values["objective"] | {"neftune_alpha": alpha}})
        stage = STAGES["sft"](config, bench.directory / "sft")
        chat_batch = next(stage.batches)
        programs[name] = loop_step(config, stage, chat_batch)
    rounds = turns({name: partial(seconds, run) for name, (run, _) in programs.items()}, bench.seconds)
    counts = {"tokens": chat_batch["segments_BT"], "supervised tokens": chat_batch["mask_BT"]}
    found = {"pad fraction": 1 - np.count_nonzero(chat_batch["segments_BT"]) / chat_batch["segments_BT"].size}
    for name in programs:
        of = counts if name != "texts" else {"tokens": batch["segments_BT"]}
        found |= {f"{name}, {what}/s": spread(np.count_nonzero(x) / rounds[name]) for what, x in of.items()}
        found[f"{name}, times the time of texts"] = spread(rounds[name] / rounds["texts"])
    return found


def preference(bench: Bench, *, pairs: int = 8, prompt: int = 64, answer: int = 64) -> dict:
    """DPO's updates on pairs of answers that share a prompt, with a live and a stored reference, against fine-tuning on
    the same rows.
    """
    # The prompt without its last token, and twice that token, the answer, and its end as an input.
    counts, behind = (prompt - 1, answer + 1, answer + 1), np.arange(prompt - 1, prompt + answer)
    place, answers = np.concatenate([np.arange(prompt - 1), behind, behind]), np.repeat([False, True, True], counts)
    segments, parents = np.repeat([-1, 1, 2], counts), np.full(sum(counts), -1)
    row = {"positions_BT": place, "segments_BT": segments, "parents_BT": parents}
    batch = {name: np.tile(x.astype(np.int32), (pairs, 1)) for name, x in row.items()}
    batch["mask_BT"] = np.tile(answers & (place < prompt + answer - 1), (pairs, 1))
    shape, draw = batch["mask_BT"].shape, np.random.default_rng(0)
    vocab_size = bench.stage.model.config.vocab_size
    batch |= {name: draw.integers(1, vocab_size, shape, np.int32) for name in ("tokens_BT", "targets_BT")}
    batch |= {name: np.zeros(shape, np.float32) for name in ("score_BT", "margin_BT")}
    batch = {name: x.reshape(bench.config.loop.micro_batches // 2, -1, shape[1]) for name, x in batch.items()}
    model, of = bench.stage.model, bench.config.preference
    tuned = bench.stage._replace(
        prepare=preferences.referred(model, model, of), objective=preferences.preference(model, of), keys=()
    )
    stored = batch | {"ref_logp_BT": np.zeros_like(batch["score_BT"])}
    frozen = {"ref_params": model.init(jax.random.key(bench.config.seed))}
    programs = {
        "fine-tuning": loop_step(bench.config, bench.stage, batch),
        "DPO, live reference": loop_step(bench.config, tuned, batch, frozen),
        "DPO, stored reference": loop_step(bench.config, tuned, stored),
    }
    rounds = turns({name: partial(seconds, run) for name, (run, _) in programs.items()}, bench.seconds)
    found = {f"{name}, seconds": spread(taken) for name, taken in rounds.items()}
    others = (name for name in programs if name != "fine-tuning")
    return found | {f"{name}, times fine-tuning": spread(rounds[name] / rounds["fine-tuning"]) for name in others}


def decode(bench: Bench, *, rows: int = 64, prompt: int = 64, new: int = 128) -> dict:
    """Sampling against the least time that the machine's own peak and bandwidth leave: ``decode_floor``.

    On a CPU ``JAX_NUM_CPU_DEVICES=2`` in the environment makes two devices of it, so that small operations run on two
    cores.
    """
    model = bench.stage.model
    config, key, mesh = model.config, jax.random.key(0), sharding.mesh(bench.config.mesh)
    prompts_BT = np.random.default_rng(0).integers(32, config.vocab_size, (rows, prompt), np.int32)
    with jax.set_mesh(mesh):
        params = loop.compile_programs(bench.config, bench.stage, mesh).init(key).params

    def run():
        with jax.set_mesh(mesh):
            lengths_B = np.full(rows, prompt)
            return generate(model, params, prompts_BT, lengths_B, key, max_new_tokens=new, stop_ids=())

    compile_seconds = seconds(run)
    limits = {
        "peak": partial(hardware.measured_flops, config.operand_dtype, repeats=3),
        "bandwidth": partial(hardware.measured_bandwidth, repeats=2),
    }
    rounds = turns({"decode": partial(seconds, run)} | limits, bench.seconds)
    limits = {name: rounds[name] for name in limits}
    floor = decode_floor(config, params, rows=rows, prompt=prompt, new=new, **limits)
    return {
        "batch x prompt + new": f"{rows} x {prompt} + {new}",
        "devices": jax.device_count(),
        "new tokens/s": spread(rows * new / rounds["decode"]),
        "bandwidth in the same rounds, read and written, GB/s": spread(rounds["bandwidth"] / 1e9),
        "floor, tokens/s": spread(rows * new / floor),
        "share of the floor": spread(floor / rounds["decode"]),
        "compile and first run s": compile_seconds,
        "rounds": len(rounds["decode"]),
    }


def decode_floor(config: DecoderConfig, params, *, rows, prompt, new, peak, bandwidth) -> np.ndarray:
    """Seconds of the prompts' products, then of every new token its products and its look at the cache.

    Each takes at least its bytes over the copy bandwidth (weights in the operands' dtype, the cache in its own at its
    mean length, each read once) and at least its FLOPs over the peak of products, whichever is longer.
    """
    kernels, head = tree.size(params["blocks"]), config.width * config.vocab_size
    width = jnp.dtype(config.operand_dtype).itemsize
    products = np.maximum((kernels + head) * width / bandwidth, 2 * rows * (kernels + head) / peak)
    positions = rows * config.num_layers * (prompt + new / 2)
    cached = positions * 2 * config.num_kv_heads * config.head_width * jnp.dtype(config.activation_dtype).itemsize
    attention = np.maximum(cached / bandwidth, positions * 4 * config.num_heads * config.head_width / peak)
    prefill = 2 * rows * (prompt * kernels + head) / peak
    # The first new token comes from the prompts' own products.
    return prefill + (new - 1) * (products + attention)


def loss(bench: Bench, *, V: int = 128_000, B: int = 4, T: int = 1024) -> dict:
    """Temporary memory of the loss and its gradients at a large vocabulary, as compiled; its time at the run's own."""
    width, own = bench.config.model.width, bench.stage.model.config.vocab_size
    options = dict(chunk=bench.config.model.loss_chunk, operand_dtype="float32")
    losses = {
        "dense": lambda h, w, t, weight: cross_entropy(token_logprobs(h @ w, t), weight),
        "chunked_token_logprobs": lambda h, w, t, weight: cross_entropy(
            chunked_token_logprobs(h, w, t, **options)[0], weight
        ),
        "chunked_cross_entropy": lambda h, w, t, weight: chunked_cross_entropy(h, w, t, weight, **options)[0],
    }
    programs = {name: jax.jit(jax.value_and_grad(loss, argnums=(0, 1))) for name, loss in losses.items()}

    def temporary_bytes(program):
        shapes = [((B, T, width), "float32"), ((width, V), "float32"), ((B, T), "int32"), ((B, T), "float32")]
        arguments = (jax.ShapeDtypeStruct(*shape) for shape in shapes)
        return program.lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    tokens_BT = jnp.arange(B * T).reshape(B, T) % own
    arguments = jnp.ones((B, T, width)), jnp.ones((width, own)), tokens_BT, jnp.full((B, T), 1 / (B * T))
    runs = {name: partial(seconds, partial(program, *arguments)) for name, program in programs.items()}
    [run() for run in runs.values()]
    rounds = turns(runs, bench.seconds / 4)
    memory = {name: temporary_bytes(program) for name, program in programs.items()}
    found = {"tokens": B * T, "large vocabulary": V}
    for name in programs:
        found[f"{name}, temporary MiB at the large vocabulary"] = memory[name] / 2**20
        found[f"{name}, memory as a share of dense"] = memory[name] / memory["dense"]
        found[f"{name}, float32 time in times of dense at vocabulary {own}"] = spread(rounds[name] / rounds["dense"])
    return found


def loader(bench: Bench) -> dict:
    """Batches as the loop takes them, prefetched by the run's own workers, while nothing else runs."""
    tokens, start, deadline = 0, time.perf_counter(), time.perf_counter() + min(bench.seconds, 10.0)
    next(bench.stage.batches)
    started = time.perf_counter()
    while time.perf_counter() < deadline or not tokens:
        tokens += np.count_nonzero(next(bench.stage.batches)["segments_BT"])
    return {"tokens/s": tokens / (time.perf_counter() - started), "first batch s": started - start}


def overhead(bench: Bench, *, layers: int = 12) -> dict:
    """Host time of a step of a deep, tiny model: placing the batch, and the call, which returns before its end."""
    sizes = dict(num_layers=layers, width=16, mlp_width=16, num_heads=2, num_kv_heads=2, head_width=16)
    batch = {name: x[:1, :, :8] for name, x in next(bench.stage.batches).items()}
    times = []
    with jax.set_mesh(mesh := sharding.mesh(bench.config.mesh)):
        programs = loop.compile_programs(*staged(bench, **sizes), mesh)
        state = programs.init(jax.random.key(0))
        for _ in range(50):
            jax.block_until_ready(state)
            start = time.perf_counter()
            state, _ = programs.step(state, sharding.global_batch(batch, on=mesh), {})
            times.append(time.perf_counter() - start)
    return {f"{layers} layers, ms": spread(np.array(times[5:]) * 1e3)}


def cache(bench: Bench, *, rows: int = 16, tokens: int = 64) -> dict:
    """Appending tokens to one layer's cache in a loop that carries it: done in place, its length does not matter."""
    config = dataclasses.replace(bench.stage.model.config, num_layers=1)
    new_B1KH = jnp.ones((rows, 1, config.num_kv_heads, config.head_width))

    def append(step, layer):
        positions_B1 = jnp.full((rows, 1), step)
        k_BSKH, v_BSKH = decoding._append(config.operand_dtype, layer, positions_B1, new_B1KH, new_B1KH)
        return {"key": k_BSKH.transpose(0, 2, 1, 3), "value": v_BSKH.transpose(0, 2, 1, 3)}

    program = jax.jit(lambda layer: jax.lax.fori_loop(0, tokens, append, layer), donate_argnums=0)
    runs = {}
    for length in (128, 2048):
        (layer,) = decoding.empty_cache(config, rows, length)["layers"]
        runs[length] = repeating(program, layer)
        runs[length]()
    rounds = turns({length: partial(seconds, run) for length, run in runs.items()}, bench.seconds / 10)
    found = {f"{length} positions, us per token": spread(times / tokens * 1e6) for length, times in rounds.items()}
    return found | {"2048 in times of 128": spread(rounds[2048] / rounds[128])}


def embedding(bench: Bench, *, V: int = 32_000, T: int = 2048) -> dict:
    """Looking up rows of a table, and the gradient for the table."""
    tokens_BT = jnp.asarray(np.random.default_rng(0).integers(0, V, (1, T), np.int32))
    table_VD = jnp.ones((V, bench.config.model.width))
    program = jax.jit(jax.value_and_grad(lambda table_VD, tokens_BT: jnp.sum(jnp.square(table_VD[tokens_BT]))))
    run = partial(program, table_VD, tokens_BT)
    seconds(run)
    rounds = turns({"embedding": partial(seconds, run)}, bench.seconds / 10)
    return {f"{T} ids of {V}, forward and backward ms": spread(rounds["embedding"] * 1e3)}


SECTIONS = {
    section.__name__: section
    for section in (train, fine_tuning, preference, rl, slots, decode, loss, loader, overhead, cache, embedding)
}


def main(_):
    unknown = set(ONLY.value) - set(SECTIONS)
    if unknown:
        sys.exit(f"--only={','.join(sorted(unknown))} is not one of {','.join(SECTIONS)}")
    console, values = Console(), CONFIG.value.to_dict()
    config = run_config(values)
    with tempfile.TemporaryDirectory() as directory, console.status("preparing text") as status:
        stage = STAGES[config.stage](config, Path(directory))
        status.update("measuring this machine")
        peaks = {str(dtype): hardware.measured_flops(dtype) for dtype in ("float32", "bfloat16")}
        bench = Bench(values, config, stage, Path(directory), SECONDS.value, peaks, hardware.measured_bandwidth())
        results = {"machine": machine(bench)}
        for name in ONLY.value or SECTIONS:
            status.update(f"measuring {name}")
            results[name] = SECTIONS[name](bench)
        stage.batches.close()
    console.print(table(results))
    if JSON.value:
        content = {"environment": workdir.environment(), "config": values, "results": results}
        Path(JSON.value).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
