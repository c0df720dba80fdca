"""What the hardware under this process can do at best: the denominators of MFU and of the benchmark's efficiencies."""

import time

import jax
import jax.numpy as jnp

# Dense bfloat16 peak of one device in FLOP/s, by the prefix of ``device_kind``: the vendors' data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
}


def peak_flops(operand_dtype: jnp.dtype) -> tuple[float, str]:
    """The peak of all devices in FLOP/s, and where the number is from.

    Known accelerators come from their data sheet (bfloat16). Anything else, a CPU above all, is measured on the spot by
    ``measured_flops``; the virtual devices of one host share that host's cores and so count once.
    """
    kind = jax.devices()[0].device_kind
    for prefix, flops in PEAK_FLOPS.items():
        if kind.startswith(prefix):
            return flops * jax.device_count(), f"data sheet of {kind}"
    peaks = jax.process_count() if jax.default_backend() == "cpu" else jax.device_count()
    return measured_flops(operand_dtype) * peaks, f"measured on {kind}"


def measured_flops(operand_dtype: jnp.dtype, *, size: int = 1024, repeats: int = 12) -> float:
    """FLOP/s of a ``size``-cubed matrix product with ``operand_dtype`` operands and a float32 result: the best of
    ``repeats``.
    """
    a = jnp.ones((size, size), operand_dtype)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    return 2 * size**3 / best_seconds(product, a, a, repeats=repeats)


def measured_bandwidth(*, megabytes: int = 256, repeats: int = 8) -> float:
    """Bytes per second read and written by an in-place update of a donated float32 array: the best of ``repeats``."""
    x = jnp.ones((megabytes * 2**18,), jnp.float32)
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = step(x)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        x = jax.block_until_ready(step(x))
        best = min(best, time.perf_counter() - start)
    return 2 * x.nbytes / best


def best_seconds(function, *arguments, repeats: int) -> float:
    """The shortest time of one call after a first one that compiles: the best run is the one least disturbed."""
    jax.block_until_ready(function(*arguments))
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        best = min(best, time.perf_counter() - start)
    return best
