"""Requests from a queue, sampled in slots that are refilled as they fall idle, so that short answers do not wait for
long ones.

The device holds a cache for the slots and nothing else; what each slot samples, and how far it is, is the host's. What
a request samples depends on its prompt, its number and the key alone: not on slots, neighbours or order.
"""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxllm.generate import programs
from jaxllm.generate.programs import CHUNK, Drawn, Turn
from jaxllm.generate.sampler import SamplerConfig
from jaxllm.model import Model
from jaxllm.sharding import place, whole_shards
from jaxllm.tree import Tree

# Prompts that are read together.
READ_TOGETHER = 8
# A look is worth this share of the slots.
WORTH_A_LOOK = 16
# The cache is made for this many positions at first, and not made for fewer slots than these: less is no faster.
FEWEST_POSITIONS, FEWEST_SLOTS = 64, 16


class Request(NamedTuple):
    """Up to ``max_new_tokens`` after ``prompt``; ``number`` tells requests apart, for the caller and the randomness."""

    number: int
    prompt: Sequence[int]
    max_new_tokens: int


class Completion(NamedTuple):
    """What was sampled for a request: exactly the ids that were drawn (int32), the stop token included.

    ``logp`` is float32, as in ``Completions``. ``ended``: by a stop token, and not by the number of tokens.
    """

    number: int
    tokens: np.ndarray
    logp: np.ndarray
    ended: bool


def completions(
    model: Model,
    params: Tree,
    queue: collections.deque[Request],
    key: jax.Array,
    *,
    slots: int,
    length: int,
    sampler: SamplerConfig = SamplerConfig(),
    stop_ids: tuple[int, ...] = (),
) -> Iterator[Completion]:
    """A completion of each request, as they finish; the queue is emptied from its left.

    Between two of them the caller may append to the queue: a conversation goes on as a request with the same number and
    a longer prompt. Up to ``slots`` are sampled at once, each of up to ``length`` tokens with its prompt, the first of
    ``stop_ids`` its last. Neighbours in the queue with the same prompt share one reading of it. Several processes give
    the same queue, and get every completion. Compiles once per ``bucket`` of the prompts' lengths, and once per bucket
    of positions and number of slots (``slots`` and its halves) that are filled. Raises ``ValueError`` for requests that
    do not fit: for those in the queue now, for others when their turn comes.
    """
    if slots < 1:
        raise ValueError(f"slots={slots} must be at least 1")
    for request in queue:
        check(model, request, length)
    how = dict(slots=slots, length=length, sampler=sampler, stop_ids=tuple(stop_ids))
    return (
        sample.completion(how["stop_ids"])
        for samples in looks(model, params, queue, key, **how)
        for sample in samples
        if sample.done
    )


def check(model: Model, request: Request, length: int) -> None:
    """``ValueError`` where the request cannot be sampled in ``length`` positions by this model."""
    number, prompt, most = request
    if not 0 <= number < 2**31:
        raise ValueError(f"request {number}: its number must be from 0 to 2**31 - 1")
    if most < 1:
        raise ValueError(f"request {number}: max_new_tokens={most} must be at least 1")
    if not len(prompt):
        raise ValueError(f"request {number} has an empty prompt; give it its <|bos|>")
    if len(prompt) + most > length:
        raise ValueError(
            f"request {number}: a prompt of {len(prompt)} tokens and max_new_tokens={most} do not fit length={length}; "
            "cut the prompt, ask for fewer tokens, or raise length"
        )
    if min(prompt) < 0 or max(prompt) >= model.config.vocab_size:
        raise ValueError(
            f"request {number} has ids from {min(prompt)} to {max(prompt)}, but "
            f"model.vocab_size={model.config.vocab_size}; encode prompts with the tokenizer that the model was trained "
            "with"
        )


def bucket(length: int, fewest: int) -> int:
    """The least length of this or more that is ``fewest`` times a power of two, or times that and a half."""
    while length > fewest:
        if length <= 3 * fewest // 2:
            return 3 * fewest // 2
        fewest *= 2
    return fewest


# ---- the slots ----


@dataclasses.dataclass
class Sample:
    """What a slot is at: a request, and what is drawn for it so far."""

    request: Request
    tokens: list[int] = dataclasses.field(default_factory=list)
    logp: list[float] = dataclasses.field(default_factory=list)
    done: bool = False

    def completion(self, stop_ids) -> Completion:
        tokens, logp = np.array(self.tokens, np.int32), np.array(self.logp, np.float32)
        return Completion(self.request.number, tokens, logp, self.tokens[-1] in stop_ids)


class Shelf(NamedTuple):
    """Prompts that were read, without their last token: the row of each in the layers of a cache."""

    rows: dict[tuple[int, ...], int]
    layers: Tree


def looks(model, params, queue, key, *, slots, length, sampler, stop_ids, limit=CHUNK) -> Iterator[list[Sample]]:
    """The samples that have grown, whenever the host looks: after ``limit`` tokens, or when enough slots are idle."""
    params, sizes = programs.ready(model, params), _sizes(slots)
    samples: list[Sample | None] = []
    layers, shelf = None, Shelf({}, None)
    while queue or any(samples):
        samples, layers = _room(model, samples, layers, queue, sizes)
        while queue and None in samples:
            if _prefix(queue[0]) not in shelf.rows:
                shelf = _read(model, params, queue, length)
            moves = _admitted(queue, samples, shelf)
            layers = _lengthened(layers, shelf.layers[0]["key"].shape[2])
            layers = programs.with_rows(layers, shelf.layers, *_moves(moves, len(samples)))
        turn = _turn(samples)
        layers = _lengthened(layers, max(turn.lengths_B + np.minimum(turn.left_B, limit)))
        how, pause = dict(sampler=sampler, stop_ids=stop_ids), _pause(samples, queue, sizes)
        layers, drawn = programs.advanced(model, params, layers, turn, key, limit, pause, **how)
        # Whole on every device, so that each of several processes can read all rows.
        grown = _grown(samples, Drawn(*(np.asarray(place(x, "..")) for x in drawn)), stop_ids)
        samples = [None if sample is None or sample.done else sample for sample in samples]
        yield grown


def _room(model, samples, layers, queue, sizes):
    """The samples and the cache with the fewest slots for them and those who wait."""
    live = [slot for slot, sample in enumerate(samples) if sample is not None]
    size = min((size for size in sizes if size >= len(live) + len(queue)), default=sizes[0])
    if layers is None:
        return [None] * size, programs.empty(model, size, FEWEST_POSITIONS)
    if size == len(samples):
        return samples, layers
    idle = [0] * (size - len(live))
    layers = programs.resized(layers, np.array(live + idle, np.int32), length=layers[0]["key"].shape[2])
    return [samples[slot] for slot in live] + [None] * len(idle), layers


def _pause(samples, queue, sizes):
    """How few slots go on when it pays to look: some of those who wait can be let in, or fewer slots are enough."""
    if queue:
        return len(samples) - max(1, len(samples) // WORTH_A_LOOK)
    return max((size for size in sizes if size < len(samples)), default=0)


def _lengthened(layers, length):
    """The cache with room for so many positions."""
    length = bucket(length, FEWEST_POSITIONS)
    return layers if length <= layers[0]["key"].shape[2] else programs.resized(layers, None, length=length)


def _read(model, params, queue, length):
    """The next prompts of the queue, read together: all of them will be asked for, if not at once."""
    prefixes = {}
    for request in queue:
        check(model, request, length)
        if len(prefixes) == READ_TOGETHER and _prefix(request) not in prefixes:
            break
        prefixes.setdefault(_prefix(request), len(prefixes))
    rows = whole_shards(1 if len(prefixes) == 1 else READ_TOGETHER)
    tokens_BT = np.zeros((rows, bucket(max(map(len, prefixes)), 16)), np.int32)
    for prefix, row in prefixes.items():
        tokens_BT[row, : len(prefix)] = prefix
    return Shelf(prefixes, programs.prefilled(model, params, tokens_BT))


def _admitted(queue, samples, shelf):
    """(row of the shelf, slot) of each request that leaves the queue for an idle slot."""
    moves = []
    for slot, sample in enumerate(samples):
        if sample is None and queue and _prefix(queue[0]) in shelf.rows:
            samples[slot] = Sample(queue.popleft())
            moves.append((shelf.rows[_prefix(samples[slot].request)], slot))
    return moves


def _moves(moves, slots):
    rows_A, places_A = np.zeros((2, slots), np.int32)
    rows_A[: len(moves)], places_A[: len(moves)] = zip(*moves, strict=True)
    return rows_A, places_A, len(moves)


def _turn(samples):
    turn = Turn(*np.zeros((4, len(samples)), np.int32))
    for slot, sample in enumerate(samples):
        if sample is not None:
            (number, prompt, most), new = sample.request, len(sample.tokens)
            turn.tokens_B[slot] = sample.tokens[-1] if new else prompt[-1]
            turn.lengths_B[slot] = len(prompt) - 1 + new
            turn.left_B[slot], turn.numbers_B[slot] = most - new, number
    return turn


def _grown(samples, drawn, stop_ids):
    """The samples, what was drawn appended."""
    grown = [(slot, sample) for slot, sample in enumerate(samples) if sample is not None]
    for slot, sample in grown:
        sample.tokens += drawn.tokens_BT[slot][drawn.mask_BT[slot]].tolist()
        sample.logp += drawn.logp_BT[slot][drawn.mask_BT[slot]].tolist()
        sample.done = sample.tokens[-1] in stop_ids or len(sample.tokens) == sample.request.max_new_tokens
    return [sample for _, sample in grown]


def _prefix(request):
    return tuple(request.prompt[:-1])


def _sizes(slots):
    """``slots`` and its halves, the largest first."""
    halves = (slots >> halvings for halvings in range(slots.bit_length()))
    return list(dict.fromkeys(whole_shards(half) for half in halves if half in (slots, max(half, FEWEST_SLOTS))))
