import jax
import jax.numpy as jnp
import pytest

from jaxllm.losses import token_logprobs
from jaxllm.model import build, flops_per_token

# Large enough that the matrix products outweigh all else; the masked half of the scores counts, as it is computed.
SIZES = dict(
    vocab_size=1024, num_layers=2, width=256, mlp_width=640, num_heads=4, num_kv_heads=2, head_width=96, unroll=2
)
B, T = 2, 256


@pytest.mark.parametrize(
    "changes", [{}, dict(num_kv_heads=4, tied_head=False), dict(mlp_width=64, head_width=256)], ids=str
)
def test_flops_agree_with_the_compilers_own_count(tiny, changes):
    # Autodiff of the plain product: our own attention makes its scores again in the backward pass, and the count leaves
    # out what is made again.
    config = tiny(**(SIZES | changes), attention="dot_product")
    model = build(config)

    def loss(params, tokens_BT):
        return jnp.mean(token_logprobs(model.forward(params, tokens_BT), tokens_BT))

    params = jax.eval_shape(model.init, jax.random.key(0))
    lowered = jax.jit(jax.grad(loss)).lower(params, jax.ShapeDtypeStruct((B, T), "int32"))
    counted = lowered.compile().cost_analysis()["flops"]
    assert counted / (B * T) == pytest.approx(flops_per_token(config, T), rel=0.05)


def test_a_window_shortens_the_attention_of_its_layers_alone(tiny):
    sizes = dict(SIZES, num_layers=3, layer_pattern=("local", "global"), sliding_window=16)
    every = flops_per_token(tiny(**dict(sizes, layer_pattern=("global",))), 256)
    assert every - flops_per_token(tiny(**sizes), 256) == 12 * 4 * 96 * 2 * (256 - 16)
    unrotated = dict(sizes, layer_pattern=("local_nope", "nope"))
    assert flops_per_token(tiny(**unrotated), 256) == flops_per_token(tiny(**sizes), 256)
    assert flops_per_token(tiny(**sizes), 8) == flops_per_token(tiny(**dict(sizes, layer_pattern=("global",))), 8)


def test_the_look_up_costs_nothing_and_the_head_counts_tied_or_not(tiny):
    assert flops_per_token(tiny(**SIZES), 64) == flops_per_token(tiny(**SIZES, tied_head=False), 64)
    more = flops_per_token(tiny(**dict(SIZES, vocab_size=1025)), 64) - flops_per_token(tiny(**SIZES), 64)
    assert more == 6 * 256
