import collections

import numpy as np
import pytest

from jaxllm.data.packing import PLANS, Rows
from jaxllm.text.tokenizer import byte_tokenizer

PAD = 0


def documents_of(store):
    return [store.tokens[a:b].tolist() for a, b in zip(store.offsets, store.offsets[1:], strict=False)]


def all_rows(store, packing, length=16):
    rows = Rows(store, PLANS[packing](store.offsets, length), length=length, pad_id=PAD)
    return rows, [rows[index] for index in range(len(rows))]


def segments_of(row):
    """Oracle in plain loops: the (inputs, targets) of each segment of a row."""
    found = collections.defaultdict(list)
    for token, target, segment, real in zip(
        row["tokens_BT"], row["targets_BT"], row["segments_BT"], row["mask_BT"], strict=True
    ):
        if real:
            found[int(segment)].append((int(token), int(target)))
    return [found[segment] for segment in sorted(found)]


@pytest.fixture
def store(prepared, texts):
    _, stores = prepared({"a": texts})
    return stores["a"].train


@pytest.mark.parametrize("packing", ["concatenated", "best_fit"])
@pytest.mark.parametrize("length", [2, 7, 16, 500])
def test_every_token_but_the_first_of_a_document_is_a_target_exactly_once(store, packing, length):
    _, rows = all_rows(store, packing, length)
    pairs = collections.Counter(pair for row in rows for segment in segments_of(row) for pair in segment)
    expected = collections.Counter(
        pair for tokens in documents_of(store) for pair in zip(tokens, tokens[1:], strict=False)
    )
    assert pairs == expected


@pytest.mark.parametrize("packing", list(PLANS))
def test_a_segment_is_a_run_of_one_document_and_its_targets_are_the_next_tokens(store, packing):
    documents = documents_of(store)
    _, rows = all_rows(store, packing)
    for row in rows:
        for segment in segments_of(row):
            inputs, targets = map(list, zip(*segment, strict=True))
            assert inputs[1:] == targets[:-1]
            run = [*inputs, targets[-1]]
            assert any(
                run == tokens[start : start + len(run)] for tokens in documents for start in range(len(tokens))
            ), "a segment mixes documents"


@pytest.mark.parametrize("packing", list(PLANS))
def test_positions_restart_with_each_segment_and_padding_is_inert(store, packing):
    rows, built = all_rows(store, packing)
    for row in [*built, rows.blank()]:
        assert {name: array.dtype for name, array in row.items()} == {
            "tokens_BT": np.int32, "targets_BT": np.int32, "positions_BT": np.int32, "segments_BT": np.int32,
            "mask_BT": bool,
        }  # fmt: skip
        assert all(array.shape == (16,) for array in row.values())
        used = int(row["mask_BT"].sum())
        assert row["mask_BT"][:used].all()
        sizes = [len(segment) for segment in segments_of(row)]
        assert row["positions_BT"].tolist() == [p for size in sizes for p in range(size)] + [0] * (16 - used)
        assert row["segments_BT"].tolist() == [i for i, s in enumerate(sizes, 1) for _ in range(s)] + [0] * (16 - used)
        assert (row["tokens_BT"][used:] == PAD).all() and (row["targets_BT"][used:] == PAD).all()
    assert not rows.blank()["mask_BT"].any()


def test_concatenated_rows_follow_the_store_and_only_the_last_is_padded(store):
    rows, built = all_rows(store, "concatenated")
    stream = [pair for tokens in documents_of(store) for pair in zip(tokens, tokens[1:], strict=False)]
    assert [pair for row in built for segment in segments_of(row) for pair in segment] == stream
    assert all(row["mask_BT"].all() for row in built[:-1]) and len(rows) == -(-len(stream) // 16)


def test_best_fit_rows_hold_whole_documents_where_they_fit(prepared, random_documents):
    _, stores = prepared({"a": random_documents(60, longest=12)}, sequence_length=40)
    rows, built = all_rows(stores["a"].train, "best_fit", 40)
    segments = collections.Counter(
        (segment[0][0], *(target for _, target in segment)) for row in built for segment in segments_of(row)
    )
    assert segments == collections.Counter(map(tuple, documents_of(stores["a"].train)))
    assert rows.report["pad_fraction"] < 0.1


def test_best_fit_takes_the_tightest_room():
    # in rows of 10, pieces of 8, 5 and 2: the 2 goes to the 8, not to the 5 where there is more room
    for counts, rows in (((2, 5, 8), [[2, 8], [5]]), ((3, 6, 4, 7), [[3, 7], [4, 6]])):
        offsets = np.cumsum([0, *(count + 1 for count in counts)])  # a document has one token more than pairs
        table = PLANS["best_fit"](offsets, 10)
        assert [sorted(table.pieces(row)[1].tolist()) for row in range(len(table))] == rows


def test_best_fit_cuts_a_long_document_and_best_fit_whole_drops_and_counts_it(prepared, random_documents):
    texts = random_documents(20, longest=10) + ["x" * 95, "y" * 39]  # 96 pairs, and 40: as many as a row holds
    config, stores = prepared({"a": texts}, validation=0.0)
    cut, cut_rows = all_rows(stores["a"].train, "best_fit", 40)
    whole, whole_rows = all_rows(stores["a"].train, "best_fit_whole", 40)
    x, y = byte_tokenizer().encode("xy")
    assert sum((row["targets_BT"] == y).sum() for row in whole_rows) == 39
    assert sum((row["targets_BT"] == x).sum() for row in cut_rows) == 95
    assert not any((row["targets_BT"] == x).any() for row in whole_rows)
    assert whole.report["dropped_documents"] == 1 and whole.report["dropped_targets"] == 96
    assert whole.report["targets"] + 96 == cut.report["targets"] and cut.report["dropped_documents"] == 0


def test_reports_count_rows_targets_and_padding(store):
    for packing in PLANS:
        rows, built = all_rows(store, packing)
        masks = np.array([row["mask_BT"] for row in built])
        assert rows.report["rows"] == len(built) and rows.report["targets"] == masks.sum()
        assert rows.report["pad_fraction"] == pytest.approx(1 - masks.mean())


@pytest.mark.parametrize("packing", list(PLANS))
def test_a_store_without_documents_has_no_rows(prepared, texts, packing):
    _, stores = prepared({"a": texts}, validation=0.0)
    rows, built = all_rows(stores["a"].validation, packing)
    assert built == [] and rows.report["pad_fraction"] == 0.0
