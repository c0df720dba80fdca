"""The one matrix product of the project: an activation times a weight, in narrow operands and wide results.

Operands are cast to ``operand_dtype`` (bfloat16 on fast hardware), products accumulate and come out in the activation's
dtype, in the backward pass too, where plain differentiation would cast the operands up again. Under a mesh the weight's
shards are gathered just in time.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def einsum(equation: str, x: jax.Array, w: jax.Array, operand_dtype: jnp.dtype) -> jax.Array:
    """``jnp.einsum(equation, x, w)`` of an activation ``x`` and a weight ``w``; the result has the dtype of ``x``.

    The equation is explicit (``'btd,dnh->btnh'``), and no letter is summed within one operand. The gradient for ``x``
    has its dtype and the gradient for ``w`` has that of ``w`` (float32 masters get float32 gradients), whatever
    ``operand_dtype`` is. Under an explicit mesh each mesh axis that shards ``x`` along one letter and ``w`` along
    another is gathered on ``w`` (fully sharded data parallelism, in the narrow dtype: half the traffic), and the
    gradient for ``w`` comes back scattered as ``w`` is.
    """
    return _forward(equation, x, w, operand_dtype)[0]


def _forward(equation, x, w, operand_dtype):
    x_letters, w_letters, _ = _letters(equation)
    x_low = x.astype(operand_dtype)
    w_low = _gathered(x_letters, x, w_letters, w, operand_dtype)
    return _product(equation, x_low, w_low, x.dtype, _joined(equation, x_low, w_low)), (x_low, w)


def _backward(equation, operand_dtype, residuals, out_grad):
    x_low, w = residuals
    x_letters, w_letters, out_letters = _letters(equation)
    out_grad_low = out_grad.astype(operand_dtype)
    w_low = _gathered(x_letters, x_low, w_letters, w, operand_dtype)
    x_grad = _product(f"{out_letters},{w_letters}->{x_letters}", out_grad_low, w_low, out_grad.dtype, _sharding(x_low))
    w_grad = _product(f"{x_letters},{out_letters}->{w_letters}", x_low, out_grad_low, w.dtype, _sharding(w))
    # No transpose behind may be folded into this product: XLA's CPU backend runs the transposed one slowly or, in
    # bfloat16 on JAX 0.10.2, not at all.
    return x_grad, jax.lax.optimization_barrier(w_grad)


einsum.defvjp(_forward, _backward)


def _letters(equation: str) -> tuple[str, str, str]:
    operands, out_letters = equation.split("->")
    x_letters, w_letters = operands.split(",")
    return x_letters, w_letters, out_letters


def _product(equation, a, b, dtype, sharding):
    return jnp.einsum(equation, a, b, preferred_element_type=dtype, out_sharding=sharding)


def _sharding(array: jax.Array) -> NamedSharding | None:
    """The sharding in the array's type; None without a mesh."""
    sharding = jax.typeof(array).sharding
    return None if sharding.mesh.empty else sharding


def _axes(letters: str, array: jax.Array) -> dict[str, tuple[str, ...]]:
    """Letter -> the mesh axes that shard it."""
    spec = jax.typeof(array).sharding.spec
    return {
        letter: (axes if isinstance(axes, tuple) else (axes,)) if axes else ()
        for letter, axes in zip(letters, spec, strict=True)
    }


def _joined(equation: str, a: jax.Array, b: jax.Array) -> NamedSharding | None:
    """The product's sharding: each letter of the result is sharded as in the operand that has it."""
    sharding = _sharding(a)
    if sharding is None:
        return None
    a_letters, b_letters, out_letters = _letters(equation)
    axes = _axes(b_letters, b) | _axes(a_letters, a)
    return NamedSharding(sharding.mesh, PartitionSpec(*(axes[letter] or None for letter in out_letters)))


def _gathered(x_letters, x, w_letters, w, dtype):
    """``w`` in ``dtype``, with every mesh axis gathered that shards another letter of ``x``."""
    w = w.astype(dtype)
    sharding = _sharding(w)
    if sharding is None:
        return w
    x_axes = _axes(x_letters, x)
    kept = {
        letter: tuple(axis for axis in axes if not any(axis in x_axes[other] for other in x_axes if other != letter))
        for letter, axes in _axes(w_letters, w).items()
    }
    return jax.reshard(w, NamedSharding(sharding.mesh, PartitionSpec(*(kept[letter] or None for letter in w_letters))))
