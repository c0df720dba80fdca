import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.einsum import einsum
from jaxllm.sharding import parameter_spec, spec

LENGTHS = dict(b=8, t=3, d=8, n=4, k=2, h=5, f=6, v=10)
EQUATIONS = (
    "btd,dnh->btnh",
    "btd,dkh->btkh",
    "btnh,nhd->btd",
    "btd,df->btf",
    "btf,fd->btd",
    "btd,dv->btv",
    "btd,vd->btv",
)


@functools.cache
def operands(equation):
    """x, w and the cotangent of their product."""
    draw = np.random.default_rng(0)
    x, rest = equation.split(",")
    return [draw.normal(size=[LENGTHS[letter] for letter in letters]) for letters in (x, *rest.split("->"))]


def oracle(equation, x, w, ct):
    """The product and both gradients in float64."""
    x_letters, rest = equation.split(",")
    w_letters, out_letters = rest.split("->")
    x_grad = np.einsum(f"{out_letters},{w_letters}->{x_letters}", ct, w)
    w_grad = np.einsum(f"{x_letters},{out_letters}->{w_letters}", x, ct)
    return np.einsum(equation, x, w), x_grad, w_grad


def forward_and_back(equation, operand_dtype, x, w, ct):
    """The product and both gradients, ours."""
    out, pull = jax.vjp(lambda x, w: einsum(equation, x, w, operand_dtype), x, w)
    return out, *pull(ct.astype(out.dtype))


@functools.partial(jax.jit, static_argnums=0)
def every_equation(operand_dtype, arrays):
    return {equation: forward_and_back(equation, operand_dtype, *arrays[equation]) for equation in EQUATIONS}


@functools.cache
def bare(operand_dtype):
    return every_equation(
        operand_dtype, {equation: [jnp.float32(x) for x in operands(equation)] for equation in EQUATIONS}
    )


def rounded(x):
    return np.float64(jnp.bfloat16(x))


@pytest.mark.parametrize("equation", EQUATIONS)
def test_product_and_gradients_match_float64(equation):
    for found, expected in zip(bare("float32")[equation], oracle(equation, *operands(equation)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("equation", EQUATIONS)
def test_narrow_operands_are_rounded_and_results_are_wide(equation):
    expected = oracle(equation, *(rounded(x) for x in operands(equation)))
    exact = oracle(equation, *operands(equation))
    for found, rounded_, exact_ in zip(bare("bfloat16")[equation], expected, exact, strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, rounded_, rtol=1e-5, atol=1e-5)
        assert np.max(np.abs(found - exact_)) > 1e-4


def test_results_take_the_activations_dtype_and_gradients_their_own_arrays():
    x, w, ct = operands("btd,df->btf")
    out, x_grad, w_grad = forward_and_back("btd,df->btf", "bfloat16", jnp.bfloat16(x), jnp.float32(w), jnp.float32(ct))
    assert (out.dtype, x_grad.dtype, w_grad.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(w_grad, oracle("btd,df->btf", rounded(x), w, rounded(ct))[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("operand_dtype", ["float32", "bfloat16"])
def test_a_mesh_changes_no_number_and_gradients_lie_where_their_arrays_lie(operand_dtype, mesh):
    def placed(equation):
        x_letters, w_letters, out_letters = re.split(",|->", equation)
        specs = spec(x_letters), parameter_spec(w_letters), spec(out_letters)
        arrays = (np.float32(x) for x in operands(equation))
        return [jax.device_put(x, jax.NamedSharding(mesh, where)) for x, where in zip(arrays, specs, strict=True)]

    arrays = {equation: placed(equation) for equation in EQUATIONS}
    for equation, found in every_equation(operand_dtype, arrays).items():
        for ours, same in zip(found, bare(operand_dtype)[equation], strict=True):
            np.testing.assert_allclose(ours, same, rtol=1e-5, atol=1e-5)
        x, w, out = (array.sharding for array in arrays[equation])
        assert [ours.sharding for ours in found] == [out, x, w]


def test_a_tied_head_trains_in_bfloat16_through_its_transpose():
    x, _, ct = operands("btd,dv->btv")
    table_VD = operands("btd,vd->btv")[1]

    @jax.jit
    def table_gradient(table_VD, x_BTD, ct_BTV):
        return jax.grad(lambda table_VD: jnp.sum(ct_BTV * einsum("btd,dv->btv", x_BTD, table_VD.T, "bfloat16")))(
            table_VD
        )

    found = table_gradient(*(jnp.float32(x) for x in (table_VD, x, ct)))
    expected = oracle("btd,dv->btv", rounded(x), table_VD.T, rounded(ct))[2].T
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
