"""The plain float32 step that the benchmark's ratios refer to: Llama by the book, with no work done for speed."""

from functools import partial

import jax
import jax.numpy as jnp
import optax

from jaxllm.model import DecoderConfig, Model
from jaxllm.run_config import RunConfig


def loss(config: DecoderConfig, params, batch):
    """Llama by the book: a scan over layers, dense logits [B, T, V], JAX's own differentiation, float32 throughout."""
    tokens_BT, positions_BT, segments_BT = (batch[name] for name in ("tokens_BT", "positions_BT", "segments_BT"))
    frequencies = config.rope.theta ** (-jnp.arange(0, config.head_width, 2) / config.head_width)
    angles = positions_BT[:, :, None, None] * frequencies[None, None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    seen_BTS = (positions_BT[:, :, None] >= positions_BT[:, None, :]) & (
        segments_BT[:, :, None] == segments_BT[:, None, :]
    )

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


def step(config: RunConfig, model: Model):
    """(the jitted step on a whole batch with optax's AdamW, its state from the run's first parameters)."""
    o = config.optimizer
    adamw = optax.adamw(o.learning_rate / max(o.warmup, 1), o.b1, o.b2, o.eps, weight_decay=o.weight_decay)
    optimizer = optax.chain(optax.clip_by_global_norm(o.clip_norm), adamw)
    gradients = jax.value_and_grad(partial(loss, model.config))

    def step(state, batch, frozen):
        params, opt_state = state
        value, grads = gradients(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), {"loss": value}

    params = jax.jit(model.init)(jax.random.key(config.seed))
    return jax.jit(step, donate_argnums=0), (params, optimizer.init(params))
