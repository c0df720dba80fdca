"""Rows to batches: shuffled, mixed, shared among processes and resumable, by random access all the way (Grain).

Batch k depends on the configuration and on k alone. Hence a resumed run reads what an uninterrupted one would, in O(1),
and the processes together read what a single one would, micro-batch by micro-batch.
"""

import functools
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

from jaxllm.data.config import DataConfig, SourceConfig
from jaxllm.data.packing import Rows, supervised
from jaxllm.data.pairing import plan
from jaxllm.data.tokens import Split, TokenStore

Batch = dict[str, np.ndarray]
_CYCLE = 10_000  # rows after which a mixture repeats: the grain of its weights


class TrainBatches:
    """Endless iterator over batches; see `train_batches`.

    fingerprint: hex digest of everything that decides batch k. reports: counts of the rows of each source.
    """

    def __init__(self, batches: grain.MapDataset, config: DataConfig, fingerprint: str, reports: dict[str, dict]):
        self._batches, self._config = batches, config
        self.fingerprint, self.reports = fingerprint, reports
        self._next = 0
        self._iterator: grain.DatasetIterator | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = _iterator(self._batches[self._next :], self._config)
        batch = next(self._iterator)
        self._next += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """The number of the next batch, as JSON can hold it: prefetched batches do not count as read."""
        return {"next_batch": self._next}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Continues at the batch that `get_state` named, in O(1), with any number of processes and workers."""
        if set(state) != {"next_batch"} or state["next_batch"] < 0:
            raise ValueError(f"data position {dict(state)} is not of the form {{'next_batch': 0 or more}}")
        self.close()
        self._next = int(state["next_batch"])

    def close(self) -> None:
        """Ends the workers, if there are any. A later `next` starts them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


class ValidationBatches:
    """Finite batches, the same at every iteration; see `validation_batches`. reports: counts of each source's rows."""

    def __init__(self, batches: grain.MapDataset, config: DataConfig, reports: dict[str, dict]):
        self._batches, self._config, self.reports = batches, config, reports

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches.to_iter_dataset(_read_options(self._config)))


def train_batches(
    stores: Mapping[str, Split],
    config: DataConfig,
    *,
    batch_size: int,
    micro_batches: int,
    pad_id: int,
    process_index: int = 0,
    process_count: int = 1,
) -> TrainBatches:
    """This process's share of every batch, without end: arrays [M, B / M / process_count, T].

    Args:
      stores: what `prepare` returned for the same config.
      batch_size: B, sequences per update over all processes.
      micro_batches: M, leading axis of each array.
      pad_id: id in the places of `tokens_BT` that hold no token.

    Raises:
      ValueError: B is not divisible by M times process_count, or a source has no row.
    """
    _check_divisible(batch_size, micro_batches, process_index, process_count)
    streams = [stream for name in stores for stream in _streams(name, stores[name].train, config, pad_id)]
    weights = np.transpose([stream.weights for stream in streams])
    mixture = StagedMixture(weights, [step * batch_size for step in config.stage_steps])
    shuffled = [_shuffled(stream.rows, [config.shuffle_seed, *stream.name]) for stream in streams]
    mixed = grain.MapDataset.select_from_datasets(shuffled, mixture)
    content = [
        [[name, store.train.fingerprint, *_overrides(config.sources[name])] for name, store in stores.items()],
        [config.sources[name].weights for name in stores], config.stage_steps, config.sequence_length, config.packing,
        config.shuffle_seed, batch_size,
    ]  # fmt: skip
    batches = _batched(mixed, batch_size, micro_batches, process_index, process_count)
    reports = {"/".join(stream.name): stream.rows.report for stream in streams}
    return TrainBatches(batches, config, _digest(content).hex(), reports)


def validation_batches(
    stores: Mapping[str, Split],
    config: DataConfig,
    *,
    batch_size: int,
    micro_batches: int,
    pad_id: int,
    process_index: int = 0,
    process_count: int = 1,
) -> ValidationBatches:
    """Every target of the held-out documents exactly once, but for what the packing of conversations drops.

    Texts lie in concatenated rows whatever the training rows are, conversations whole in rows like those of training.
    Same arguments and shapes as `train_batches`. The last batch is filled with rows whose mask is False.
    """
    _check_divisible(batch_size, micro_batches, process_index, process_count)
    held_out = {name: store.validation for name, store in stores.items() if store.validation.num_documents}
    sources = {name: _validation_rows(name, store, config, pad_id) for name, store in held_out.items()}
    rows = grain.MapDataset.source(_FilledRows(list(sources.values()), batch_size))
    batches = _batched(rows, batch_size, micro_batches, process_index, process_count)
    return ValidationBatches(batches, config, {name: each.report for name, each in sources.items()})


def validation_by_source(
    stores: Mapping[str, Split], config: DataConfig, **arguments: int
) -> dict[str, ValidationBatches]:
    """`validation_batches` of each source alone, with the same arguments; of those that hold anything out."""
    return {
        name: validation_batches({name: store}, config, **arguments)
        for name, store in stores.items()
        if store.validation.num_documents
    }


def rows_by_side(name: str, store: Split, config: DataConfig, *, pad_id: int) -> tuple[list[Rows], list[Rows]]:
    """The rows of a source that training and validation read; a pair of tokens lies in one of them, or is dropped.

    Raises ValueError where a side with documents has no row.
    """
    held_out = [_validation_rows(name, store.validation, config, pad_id)] if store.validation.num_documents else []
    return [stream.rows for stream in _streams(name, store.train, config, pad_id)], held_out


def batch_fingerprint(batch: Batch) -> str:
    """Hex digest of the tokens of a batch: names it in a log."""
    return hashlib.sha256(batch["tokens_BT"].tobytes()).hexdigest()[:16]


class StagedMixture(grain.transforms.DatasetSelectionMap):
    """Which row of which source comes at each place, for weights that change at given places.

    Within a stage a cycle of places repeats, in which each source has its share, evenly spread. A source is read in its
    own order whatever the weights, so that it gives every row once before any row twice.
    """

    def __init__(self, weights: np.ndarray, starts: Sequence[int]):
        """weights: [stages, sources]. starts: first place of each stage, the first being 0."""
        self._starts = np.array(starts)
        self._cycles = [_cycle(stage) for stage in weights]
        self._before = [0 * self._cycles[0].counts]  # rows of each source that came before each stage
        for cycle, places in zip(self._cycles, np.diff(self._starts), strict=False):
            self._before.append(self._before[-1] + cycle.drawn(int(places)))

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        stage = int(np.searchsorted(self._starts, index, side="right")) - 1
        cycle = self._cycles[stage]
        repeats, place = divmod(index - int(self._starts[stage]), len(cycle.sources))
        source = int(cycle.sources[place])
        return source, int(self._before[stage][source] + repeats * cycle.counts[source] + cycle.ranks[place])


class _Cycle(NamedTuple):
    """sources: which one comes at each place. ranks: places of that source before this one. counts: of each source."""

    sources: np.ndarray
    ranks: np.ndarray
    counts: np.ndarray

    def drawn(self, places: int) -> np.ndarray:
        """How often each source comes in so many places from the start."""
        repeats, rest = divmod(places, len(self.sources))
        return repeats * self.counts + np.bincount(self.sources[:rest], minlength=len(self.counts))


def _cycle(weights: np.ndarray) -> _Cycle:
    """The shortest cycle that holds the shares exactly; where none does, the longest, which rounds them."""
    shares = weights / np.sum(weights)
    lengths = np.arange(1, _CYCLE + 1)
    exact = np.abs(np.outer(lengths, shares) - np.round(np.outer(lengths, shares))).max(axis=1) < 1e-6
    length = lengths[np.argmax(exact)] if exact.any() else _CYCLE
    counts = np.round(shares * length).astype(np.int64)
    counts[np.argmax(counts)] += length - counts.sum()
    if np.any((counts == 0) & (weights > 0)):
        raise ValueError(f"weights={weights.tolist()} hold one below 1/{_CYCLE} of their sum: raise it, or set it to 0")
    sources = np.repeat(np.arange(len(counts)), counts)
    ranks = np.concatenate([np.arange(count) for count in counts])
    order = np.argsort((ranks + 0.5) / counts[sources], kind="stable")
    return _Cycle(sources[order], ranks[order], counts)


class _Stream(NamedTuple):
    """Rows that are shuffled among themselves: of a source, or of a task of it. weights: in each stage."""

    name: tuple[str, ...]
    rows: Rows
    weights: np.ndarray


def _streams(name: str, store: TokenStore, config: DataConfig, pad_id: int) -> list[_Stream]:
    """A source's rows: of each task apart where their balance is to change."""
    source, packing = config.sources[name], config.packing_of(name)
    parts = {"": store.offsets} if source.balance == 1 else store.offsets_of_tasks
    rows = {task: _rows(store, offsets, packing, config, pad_id) for task, offsets in parts.items()}
    rows = {task: some for task, some in rows.items() if len(some)}
    if not rows:
        raise _no_row(name, packing, _rows(store, store.offsets, packing, config, pad_id))
    sizes = np.array([len(some) for some in rows.values()]) ** float(source.balance)
    return [
        _Stream((name, task) if task else (name,), rows[task], share * np.array(source.weights))
        for task, share in zip(rows, sizes / sizes.sum(), strict=True)
    ]


def _validation_rows(name: str, store: TokenStore, config: DataConfig, pad_id: int) -> Rows:
    packing = "concatenated" if supervised(store) is None else config.packing_of(name)
    rows = _rows(store, store.offsets, packing, config, pad_id)
    if not len(rows):
        raise _no_row(name, packing, rows)
    return rows


def _rows(store: TokenStore, offsets: np.ndarray, packing: str, config: DataConfig, pad_id: int) -> Rows:
    length = config.sequence_length
    return Rows(store, plan(store, offsets, packing, length), length=length, pad_id=pad_id)


def _no_row(name: str, packing: str, rows: Rows) -> ValueError:
    return ValueError(f"source {name!r} has no row: packing={packing!r} gives {rows.report}; raise sequence_length")


def _overrides(source: SourceConfig) -> list[Any]:
    """What a source changes for its rows alone: nothing, in general."""
    changes = source.packing, source.balance
    return [] if changes == ("", 1.0) else list(changes)


def _shuffled(rows: Rows, key: object) -> grain.MapDataset:
    """All rows over and over, in another order each time: Grain counts the seed up, hence the digest of the key."""
    seed = int.from_bytes(_digest(key)[:4], "little")
    return grain.MapDataset.source(rows).shuffle(seed).repeat()


def _batched(
    rows: grain.MapDataset, batch_size: int, micro_batches: int, process_index: int, process_count: int
) -> grain.MapDataset:
    """Every process_count-th row from process_index on: a micro-batch of all processes together is a run of rows."""
    local = rows[process_index::process_count].batch(batch_size // process_count, drop_remainder=True)
    return local.map(functools.partial(_with_micro_batches, count=micro_batches))


def _check_divisible(batch_size: int, micro_batches: int, process_index: int, process_count: int) -> None:
    if min(batch_size, micro_batches, process_count) < 1 or batch_size % (micro_batches * process_count):
        raise ValueError(
            f"batch_size={batch_size} is not a multiple of micro_batches={micro_batches} times "
            f"process_count={process_count}: each process holds an equal part of each micro-batch"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} is outside of process_count={process_count}")


def _with_micro_batches(batch: Batch, *, count: int) -> Batch:
    return {name: array.reshape(count, -1, *array.shape[1:]) for name, array in batch.items()}


class _FilledRows:
    """The rows of several sources one after the other, filled with blank ones to a multiple of the batch size."""

    def __init__(self, sources: Sequence[Rows], batch_size: int):
        self._sources = sources
        self._ends = np.cumsum([len(source) for source in sources])
        self._length = -(-sum(map(len, sources)) // batch_size) * batch_size

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Batch:
        source = int(np.searchsorted(self._ends, index, side="right"))
        if source == len(self._sources):
            return self._sources[0].blank()
        return self._sources[source][index - int(self._ends[source]) + len(self._sources[source])]


def _iterator(batches: grain.MapDataset, config: DataConfig) -> grain.DatasetIterator:
    dataset = batches.to_iter_dataset(_read_options(config))
    if config.workers:
        if not flags.FLAGS.is_parsed():  # Grain reads its flags, also where the program has none
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(config.workers, per_worker_buffer_size=max(config.prefetch, 1))
        dataset = dataset.mp_prefetch(options)
    return iter(dataset)


def _read_options(config: DataConfig) -> grain.ReadOptions:
    """One thread: rows are made by Python, which runs one thread at a time; more speed is in `workers`."""
    return grain.ReadOptions(num_threads=min(config.prefetch, 1), prefetch_buffer_size=config.prefetch)


def _digest(content: object) -> bytes:
    return hashlib.sha256(json.dumps(content).encode()).digest()
