"""The decoder as pure functions over a plain dict of parameters, its blocks stacked on a leading layer axis and
scanned.
"""

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxllm.model import decoding, heads
from jaxllm.model.attention import Visibility
from jaxllm.model.config import DecoderConfig
from jaxllm.model.kinds import LayerKinds
from jaxllm.model.layers import Block, Embedding, Projection, RMSNorm
from jaxllm.sharding import parameter_shardings
from jaxllm.tree import Tree

TRUNK = ("embedding", "blocks", "final_norm")  # what hidden states come of
PARTS = (*TRUNK, "head")
REMATS = {
    "none": lambda block: block,
    "full": partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable),
    "projections": partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("projection")),
}


class Model(NamedTuple):
    """A model is its configuration and pure functions; parameters come first, always."""

    config: DecoderConfig
    init: Callable  # (key) -> params
    forward: Callable  # the same as hidden -> logits_BTV
    # (params, tokens_BT, *, positions_BT, segments_BT, parents_BT, dropout_key, embedding_noise_BTD) -> hidden_BTD
    hidden: Callable
    score: Callable  # (params, hidden_BTD, tokens_BT, *, temperature, mask_BT) -> (logp_BT, logz_BT, entropy_BT)
    cross_entropy: Callable  # (params, hidden_BTD, tokens_BT, weight_BT, *, z_coef) -> (loss, logp_BT)
    scalars: Callable  # (params, hidden_BTD) -> scalar_BT, of a model with a scalar head
    cache: Callable  # (batch_size, length) -> cache
    extend: Callable  # (params, cache, tokens_BT, lengths_B) -> (logits_BV, cache)
    decode: Callable  # (params, cache, tokens_B) -> (logits_BV, cache)


@functools.cache
def build(config: DecoderConfig) -> Model:
    """The model of ``config``; of equal ones the very same, so that what is compiled for one run serves another."""
    parts = {
        "embedding": _functions(lambda rngs: Embedding(config, rngs)),
        "blocks": _functions(lambda rngs: Block(config, rngs)),
        "final_norm": _functions(lambda rngs: RMSNorm((config.width,), config)),
    }
    if not config.tied_head:
        shape = (config.width, config.vocab_size)
        parts["head"] = _functions(lambda rngs: Projection("btd,dv->btv", shape, False, config, rngs))
    apply = {name: part.apply for name, part in parts.items()}
    hidden = partial(_hidden, config, apply)
    extend = partial(decoding.extend, config, apply)
    return Model(
        config=config,
        init=partial(_init, config, {name: part.init for name, part in parts.items()}),
        forward=lambda params, tokens_BT, **options: heads.logits(config, params, hidden(params, tokens_BT, **options)),
        hidden=hidden,
        score=partial(heads.score, config),
        cross_entropy=partial(heads.cross_entropy, config),
        scalars=heads.scalars,
        cache=partial(decoding.empty_cache, config),
        extend=extend,
        decode=lambda params, cache, tokens_B: extend(params, cache, tokens_B[:, None], jnp.ones_like(tokens_B)),
    )


def parameter_rules(config: DecoderConfig) -> tuple[tuple[str, str], ...]:
    """(pattern of a parameter's name, letters of its dimensions), which place it on the mesh.

    A dot is a dimension that stays whole whatever it is: vectors of the model's width are added to activations on every
    device. A critic's parameters lie as the policy's do.
    """
    all_heads = config.qk_norm == "all"
    rules = (
        (r"embedding/table", "vd"),
        (r"blocks/attention/query/kernel", "ldnh"),
        (r"blocks/attention/query/bias", "lnh"),
        (r"blocks/attention/(key|value)/kernel", "ldkh"),
        (r"blocks/attention/(key|value)/bias", "lkh"),
        (r"blocks/attention/output/kernel", "lnhd"),
        (r"blocks/attention/output/bias", "l."),
        (r"blocks/attention/query_norm/scale", "lnh" if all_heads else "lh"),
        (r"blocks/attention/key_norm/scale", "lkh" if all_heads else "lh"),
        (r"blocks/mlp/(gate|up)/kernel", "ldf"),
        (r"blocks/mlp/(gate|up)/bias", "lf"),
        (r"blocks/mlp/down/kernel", "lfd"),
        (r"blocks/mlp/down/bias", "l."),
        (r"blocks/(attention|mlp)_(pre|post)_norm/scale", "l."),
        (r"final_norm/scale", "."),
        (r"scalar_head/kernel", "."),
        (r"scalar_head/bias", ""),
    )
    return (*((f"(critic/)?{pattern}", letters) for pattern, letters in rules), (r"head/kernel", "dv"))


def placement(model: Model, on: Mesh) -> Tree:
    """The sharding of each of the model's parameters on this mesh. Raises as ``parameter_shardings`` does."""
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    return parameter_shardings(parameter_rules(model.config), abstract, on)


def policy(model: Model, params: Tree) -> tuple[Model, Tree]:
    """The language model alone, of one that has a scalar head or a critic too: programs for it serve both."""
    if not model.config.scalar_head:
        return model, params
    alone = {name: each for name, each in params.items() if name not in ("scalar_head", "critic")}
    return build(dataclasses.replace(model.config, scalar_head=False, critic=False)), alone


def with_scalar_head(config: DecoderConfig, params: Tree) -> Tree:
    """The parameters of a model without a scalar head as those of one with it, all zeros, where the config has it: with
    a critic on a copy of them.

    Raises ``ValueError`` where they have one and the config has not.
    """
    if ("scalar_head" in params and not config.scalar_head) or ("critic" in params and not config.critic):
        raise ValueError(
            "the parameters to start from have a scalar head (a reward or value model's), this run's model has none: "
            "set model.scalar_head=True (and model.critic, as there), or start from another run"
        )
    if not config.scalar_head or "critic" in params:
        return params
    if config.critic:
        return params | {"critic": {name: params[name] for name in TRUNK} | _scalar_head(config)}
    return _scalar_head(config) | params


class _Functions(NamedTuple):
    init: Callable  # (key) -> params
    apply: Callable  # (params, *inputs) -> outputs


def _functions(create: Callable[[nnx.Rngs], nnx.Module]) -> _Functions:
    """A module as two pure functions over a plain dict."""
    structure = nnx.graphdef(nnx.eval_shape(lambda: create(nnx.Rngs(0))))
    return _Functions(
        init=lambda key: nnx.to_pure_dict(nnx.state(create(nnx.Rngs(key)), nnx.Param)),
        apply=lambda params, *inputs: nnx.merge(structure, params)(*inputs),
    )


def _init(config: DecoderConfig, inits: dict[str, Callable], key: jax.Array) -> Tree:
    """Random parameters, float32; each part from its own key, so that adding a part changes no other."""

    def drawn(key: jax.Array, names: tuple[str, ...]) -> Tree:
        keys = {name: jax.random.fold_in(key, index) for index, name in enumerate(PARTS)}
        params = {name: inits[name](keys[name]) for name in names if name != "blocks"}
        params["blocks"] = jax.vmap(inits["blocks"])(jax.random.split(keys["blocks"], config.num_layers))
        return params

    params = drawn(key, tuple(inits))
    if config.critic:
        return params | {"critic": drawn(jax.random.fold_in(key, len(PARTS)), TRUNK) | _scalar_head(config)}
    return params | (_scalar_head(config) if config.scalar_head else {})


def _scalar_head(config: DecoderConfig) -> Tree:
    return {"scalar_head": heads.empty_scalar_head(config)}


def _hidden(
    config,
    apply,
    params,
    tokens_BT,
    *,
    positions_BT=None,
    segments_BT=None,
    parents_BT=None,
    dropout_key=None,
    embedding_noise_BTD=None,
):
    """The final norm's output [B, T, D] for each position.

    ``positions_BT`` count from 0 in each document (0..T-1 unless told); ``segments_BT`` number the documents of a
    packed row, and attention never crosses from one to another, except into a segment's parent: ``parents_BT`` give for
    each position the segment that its own continues, such as a prompt of several answers, or its own. Nothing that
    lies behind a position in its row is seen, so a document lies in order, and a parent before what continues it.
    ``dropout_key`` switches dropout on; ``embedding_noise_BTD`` is added to the embeddings, times ``embedding_scale``
    as they are. Raises ``ValueError`` for parents without segments.
    """
    if parents_BT is not None and segments_BT is None:
        raise ValueError("parents_BT name segments, and segments_BT is not given: number the documents of each row")
    if positions_BT is None:
        positions_BT = jnp.zeros_like(tokens_BT) + jnp.arange(tokens_BT.shape[1])[None, :]
    x_BTD = apply["embedding"](params["embedding"], tokens_BT)
    if embedding_noise_BTD is not None:
        x_BTD += (config.embedding_scale * embedding_noise_BTD).astype(x_BTD.dtype)
    visibility = Visibility(positions_BT, positions_BT, segments_BT, segments_BT, query_parents_BT=parents_BT)
    kinds = LayerKinds(config, positions_BT)

    @REMATS[config.remat]
    def block(x_BTD, layer):
        layer_params, kind, key = layer
        table, window = kinds.of(kind)
        x_BTD, _ = apply["blocks"](
            layer_params, x_BTD, table, visibility._replace(window=window), lambda k, v: (k, v), key
        )
        return x_BTD, None

    keys = None if dropout_key is None else jax.random.split(dropout_key, config.num_layers)
    layers = (params["blocks"], kinds.index_L, keys)
    if 0 < config.unroll < config.num_layers:
        x_BTD, _ = jax.lax.scan(block, x_BTD, layers, unroll=config.unroll)
    else:
        for layer in _apart(layers, config.num_layers):
            x_BTD, _ = block(x_BTD, layer)
    return apply["final_norm"](params["final_norm"], x_BTD)


def _apart(layers: Tree, count: int) -> list[Tree]:
    """The tree of each layer. Split and not indexed: the gradient of a split is a single concatenation."""
    leaves, structure = jax.tree.flatten(layers)
    parts = [[jax.lax.squeeze(part, (0,)) for part in jax.lax.split(leaf, (1,) * count)] for leaf in leaves]
    return [structure.unflatten(layer) for layer in zip(*parts, strict=True)]
