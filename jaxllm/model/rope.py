"""Rotary position embedding: float32 tables of cosines and sines, and the rotation itself.

The two halves of a head rotate against each other (the layout of Hugging Face checkpoints), not neighbouring pairs.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.model.config import UNROTATED, RopeConfig
from jaxllm.sharding import spec


def wavelengths(config: RopeConfig, head_width: int, *, local: bool) -> tuple[np.ndarray, float]:
    """(inverse frequencies [H / 2] in float64 of radians per position, factor on the attention's cosines and sines).

    Sources: linear interpolation, Chen et al. 2023 (arXiv:2306.15595); llama3, the Llama 3.1 report (arXiv:2407.21783,
    section 3.4.2 and its reference code); yarn, Peng et al. 2023 (arXiv:2309.00071, equations 19 to 23), whose factor
    0.1 ln(s) + 1 scales q and k.
    """
    own_theta = local and config.local_theta > 0
    theta = config.local_theta if own_theta else config.theta
    inverse = theta ** (-np.arange(0, head_width, 2, dtype=np.float64) / head_width)
    if own_theta or config.scaling == "none":
        return inverse, 1.0
    if config.scaling == "linear":
        return inverse / config.factor, 1.0
    if config.scaling == "llama3":
        rotations = config.original_length * inverse / (2 * math.pi)
        kept = (rotations - config.low_frequency) / (config.high_frequency - config.low_frequency)
        kept = np.clip(kept, 0.0, 1.0)
        return kept * inverse + (1 - kept) * inverse / config.factor, 1.0
    first, last = (
        _rotating(config, theta, head_width, turns) for turns in (config.high_frequency, config.low_frequency)
    )
    first, last = max(math.floor(first), 0), min(math.ceil(last), head_width - 1)
    kept = 1 - np.clip((np.arange(head_width // 2) - first) / max(last - first, 1e-3), 0.0, 1.0)
    return kept * inverse + (1 - kept) * inverse / config.factor, 0.1 * math.log(config.factor) + 1.0


def _rotating(config, theta, head_width, turns):
    """The (fractional) pair that makes ``turns`` turns over the original length."""
    return head_width * math.log(config.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))


def table(config: RopeConfig, head_width: int, positions_BT: jax.Array, kind: str) -> jax.Array:
    """Cosines and sines for a layer of this kind, float32 [2, B, T, H / 2], exact to 1e-6 for positions below 2**20.

    A float32 product of position and frequency would be off by 1e-4 at position 4095 (a bfloat16 one by 1.5). Positions
    are cut into 1024 a + b instead, both tables are made in float64, and the two rotations are multiplied.
    """
    inverse, factor = wavelengths(config, head_width, local=kind == "local")
    if kind in UNROTATED:
        inverse, factor = np.zeros_like(inverse), 1.0
    (cos_a, sin_a), (cos_b, sin_b) = (
        (_rows(np.cos(angles), index_BT), _rows(np.sin(angles), index_BT))
        for angles, index_BT in (
            (np.outer(np.arange(1024) * 1024, inverse), positions_BT // 1024),
            (np.outer(np.arange(1024), inverse), positions_BT % 1024),
        )
    )
    return factor * jnp.stack([cos_a * cos_b - sin_a * sin_b, sin_a * cos_b + cos_a * sin_b])


def _rows(table: np.ndarray, index_BT: jax.Array) -> jax.Array:
    return jnp.asarray(table, jnp.float32).at[index_BT].get(out_sharding=spec("bth"))


def rotate(x_BTNH: jax.Array, table: jax.Array) -> jax.Array:
    """Rotates each head of ``x_BTNH`` by its position's angles, in float32, back in the dtype of ``x_BTNH``."""
    cos, sin = table[:, :, :, None, None, :]
    halves = x_BTNH.astype(jnp.float32).reshape(*x_BTNH.shape[:-1], 2, -1)
    rotated = halves * cos + halves[..., ::-1, :] * jnp.concatenate([-sin, sin], axis=-2)
    return rotated.reshape(x_BTNH.shape).astype(x_BTNH.dtype)
