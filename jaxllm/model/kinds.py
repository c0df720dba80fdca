"""What differs from layer to layer inside one scanned block: the RoPE table and the attention window, chosen by a
scanned index.
"""

import jax
import jax.numpy as jnp

from jaxllm.model import rope
from jaxllm.model.config import WINDOWED, DecoderConfig

NO_WINDOW = 2**30


class LayerKinds:
    """RoPE tables and windows of the kinds of layer that occur; a single kind costs no selection inside the scan."""

    def __init__(self, config: DecoderConfig, positions_BT: jax.Array):
        kinds = sorted(set(config.layer_kinds))
        self.tables = [rope.table(config.rope, config.head_width, positions_BT, kind) for kind in kinds]
        self.windows = [config.sliding_window if kind in WINDOWED else None for kind in kinds]
        several = len(kinds) > 1
        self.index_L = jnp.array([kinds.index(kind) for kind in config.layer_kinds]) if several else None
        if several:
            self.windows = jnp.array([window or NO_WINDOW for window in self.windows])
            self.tables = jnp.stack(self.tables)

    def of(self, index):
        """(RoPE table, window) of the kind with this index."""
        return (self.tables[0], self.windows[0]) if index is None else (self.tables[index], self.windows[index])
