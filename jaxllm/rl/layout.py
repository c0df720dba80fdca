"""Where completions lie in the rows of a batch: a prompt is read once, and each of its completions in the row sees it.

A prompt without its last token is a segment; a completion's inputs begin with that last token, and its segment's parent
is the prompt's. Rows that completions do not fill are empty, and micro-batches of empty rows are not computed.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Batch = dict[str, np.ndarray]
# The id where no token is: any does, since nothing that counts reads it.
FILLER = 0


class Sample(NamedTuple):
    """What was sampled after a prompt, all of one length but for the prompt.

    tokens: int32 ids behind it, sampled ones and those of a tool between. sampled: bool, which. logp: float32, of the
    sampled ones under the policy that sampled, 0 elsewhere.
    """

    prompt: tuple[int, ...]
    tokens: np.ndarray
    sampled: np.ndarray
    logp: np.ndarray


class Shape(NamedTuple):
    """Of a batch: micro-batches, rows of each, places of a row."""

    micro_batches: int
    rows: int
    length: int


class Layout(NamedTuple):
    """``batch`` [M, B, T]: tokens, targets, positions, segments, parents, and the mask of what was sampled. ``places``:
    for each sample its (row, first place), rows counted over all micro-batches.
    """

    batch: Batch
    places: list[tuple[int, int]]

    def lay(self, columns: Mapping[str, np.ndarray], lengths: Sequence[int]) -> Batch:
        """Numbers of each sample's tokens, [N, W], as columns of the batch, 0 elsewhere."""
        return {name: self._laid(values_NW, lengths) for name, values_NW in columns.items()}

    def read(self, found_MBT: np.ndarray, lengths: Sequence[int], width: int) -> np.ndarray:
        """[N, W] of what was found at each sample's tokens, 0 behind them."""
        rows = found_MBT.reshape(-1, found_MBT.shape[-1])
        values_NW = np.zeros((len(self.places), width), found_MBT.dtype)
        for values_W, (row, start), length in zip(values_NW, self.places, lengths, strict=True):
            values_W[:length] = rows[row, start : start + length]
        return values_NW

    def _laid(self, values_NW: np.ndarray, lengths: Sequence[int]) -> np.ndarray:
        laid_MBT = np.zeros(self.batch["tokens_BT"].shape, values_NW.dtype)
        rows = laid_MBT.reshape(-1, laid_MBT.shape[-1])
        for values_W, (row, start), length in zip(values_NW, self.places, lengths, strict=True):
            rows[row, start : start + length] = values_W[:length]
        return laid_MBT


def layout(samples: Sequence[Sample], shape: Shape) -> Layout:
    """The samples in rows, those of one prompt that follow each other together.

    Raises ``ValueError`` where a sample is longer than a row, or where there are more samples than rows.
    """
    total = shape.micro_batches * shape.rows
    if len(samples) > total:
        raise ValueError(f"{len(samples)} samples may need as many rows, and there are {total}: raise loop.batch_size")
    kinds = {"tokens_BT": FILLER, "targets_BT": FILLER, "positions_BT": 0, "segments_BT": 0, "parents_BT": 0}
    batch = {name: np.full((total, shape.length), fill, np.int32) for name, fill in kinds.items()}
    batch["mask_BT"] = np.zeros((total, shape.length), bool)
    used, segments, places = np.zeros(total, int), np.zeros(total, int), []
    prompt, row, parent = None, 0, 0
    for sample in samples:
        length, before = len(sample.tokens), len(sample.prompt) - 1
        if before + length > shape.length:
            raise ValueError(
                f"a sample has {before + length} pairs of tokens, a row {shape.length}: raise data.sequence_length"
            )
        if sample.prompt != prompt or used[row] + length > shape.length:
            prompt, row = sample.prompt, int(np.argmax(used + before + length <= shape.length))
            parent = _write(batch, used, segments, row, np.array(prompt, np.int32), 0)
        start = used[row]
        ids = np.concatenate([sample.prompt[-1:], sample.tokens]).astype(np.int32)
        _write(batch, used, segments, row, ids, before, parent)
        batch["mask_BT"][row, start : start + length] = sample.sampled
        places.append((row, int(start)))
    shaped = {name: array.reshape(*shape) for name, array in batch.items()}
    return Layout(shaped, places)


def filled(batch: Mapping[str, jax.Array]) -> jax.Array:
    """How many micro-batches hold anything: the empty ones come last."""
    return jnp.sum(jnp.any(batch["segments_BT"] != 0, axis=(1, 2)), dtype=jnp.int32)


def _write(batch, used, segments, row, ids, position, parent=0) -> int:
    """Writes the pairs of neighbouring ids as the row's next segment, and returns its number, or 0 where there is no
    pair.
    """
    pairs = len(ids) - 1
    if not pairs:
        return 0
    segments[row] += 1
    here = slice(used[row], used[row] + pairs)
    batch["tokens_BT"][row, here], batch["targets_BT"][row, here] = ids[:-1], ids[1:]
    batch["positions_BT"][row, here] = position + np.arange(pairs)
    batch["segments_BT"][row, here], batch["parents_BT"][row, here] = segments[row], parent or segments[row]
    used[row] += pairs
    return int(segments[row])
