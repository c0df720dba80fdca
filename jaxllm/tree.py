"""Names for the leaves of a pytree, and tables and masks that select leaves by name.

A leaf's name is its path with slashes: ``blocks/attention/query/kernel``. Every table must match every leaf exactly
once.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any


def name(path: tuple) -> str:
    """``blocks/attention/query/kernel`` from a JAX key path (dict keys, attributes and indices alike)."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def names(tree: Tree) -> list[str]:
    """The name of every leaf, in the order of ``jax.tree.leaves``."""
    return [name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def map_named(function: Callable, tree: Tree, *rest: Tree) -> Tree:
    """``jax.tree.map`` whose function takes the leaf's name first."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: function(name(path), *leaves), tree, *rest)


def match(table: Sequence[tuple[str, Any]], tree: Tree) -> Tree:
    """A tree of the table's values, one per leaf of ``tree``.

    ``table`` holds pairs (regular expression, value); the expression must match the leaf's whole name. A leaf that no
    row or more than one row matches raises ``ValueError`` with its name, its shape and the rows: there is no catch-all.
    """

    def value(leaf_name: str, leaf: Any) -> Any:
        rows = [(pattern, value) for pattern, value in table if re.fullmatch(pattern, leaf_name)]
        if len(rows) != 1:
            raise ValueError(
                f"{leaf_name} of shape {jnp.shape(leaf)} matches {len(rows)} rows of the table "
                f"{[pattern for pattern, _ in rows]}; it must match exactly one. Add or narrow a row."
            )
        return rows[0][1]

    return map_named(value, tree)


def matches(pattern: str, leaf_name: str) -> bool:
    """Whether the name contains a match of the regular expression; an empty one matches nothing."""
    return bool(pattern) and re.search(pattern, leaf_name) is not None


def mask(pattern: str, tree: Tree) -> Tree:
    """True for each leaf whose name contains a match of ``pattern``."""
    return map_named(lambda leaf_name, _: matches(pattern, leaf_name), tree)


def size(tree: Tree) -> int:
    """The number of elements of all leaves together."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def global_norm(tree: Tree) -> jax.Array:
    """The Euclidean norm of all leaves taken as one vector, accumulated in float32."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)))
