import collections

import numpy as np
import pytest

from jaxllm.data import packing as packing_module
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


def test_brim_full_rows_are_taken_where_they_are_fewer():
    # best fit alone gives 4 + 4, 3 + 3 + 3 and 3 to rows of 10
    offsets = np.cumsum([0, *(count + 1 for count in (4, 4, 3, 3, 3, 3))])
    table = PLANS["best_fit"](offsets, 10)
    assert [sorted(table.pieces(row)[1].tolist()) for row in range(len(table))] == [[3, 3, 4], [3, 3, 4]]


@pytest.mark.parametrize("seed", range(4))
def test_pieces_as_long_as_conversations_waste_little(seed):
    """Many are of a third to a half of a row, where best fit alone wastes more than 2.5 % on each of these seeds."""
    lengths = np.random.default_rng(seed).lognormal(np.log(95), 0.3, 600)
    counts = np.clip(lengths, 20, 256).astype(int)
    offsets = np.concatenate([[0], np.cumsum(counts + 1)])
    table = PLANS["best_fit"](offsets, 256)
    found = [table.pieces(row) for row in range(len(table))]
    pieces = [piece for starts, sizes in found for piece in zip(starts, sizes, strict=True)]
    assert sorted(pieces) == list(zip(offsets[:-1], counts, strict=True))
    assert all(0 < sizes.sum() <= 256 for _, sizes in found)
    assert counts.sum() / (256 * len(table)) > 0.98


def test_of_many_sizes_best_fit_is_taken_at_once(monkeypatch):
    offsets = np.concatenate([[0], np.cumsum(np.arange(1, 1200) + 1)])
    monkeypatch.setattr(packing_module, "_brim_full_rows", lambda *arguments: pytest.fail("takes too long"))
    assert len(PLANS["best_fit"](offsets, 1200)) == 600


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


@pytest.mark.parametrize("packing", list(PLANS))
def test_a_document_of_one_token_has_no_pair_and_is_in_no_row(packing):
    plan = PLANS[packing](np.array([0, 1, 4, 5]), 4)
    assert len(plan) == 1 and plan.dropped == packing_module.Dropped()
    starts, counts = plan.pieces(0)
    assert (starts[counts > 0].tolist(), counts[counts > 0].tolist()) == ([1], [2])
    assert len(PLANS[packing](np.array([0, 1]), 4)) == 0


def test_a_slice_of_the_offsets_plans_the_documents_of_the_slice_alone(store):
    documents = documents_of(store)
    for packing in PLANS:
        plan = PLANS[packing](store.offsets[5:12], 500)
        rows = Rows(store, plan, length=500, pad_id=PAD)
        pairs = collections.Counter(
            pair for index in range(len(rows)) for segment in segments_of(rows[index]) for pair in segment
        )
        assert pairs == collections.Counter(
            pair for tokens in documents[5:11] for pair in zip(tokens, tokens[1:], strict=False)
        )


# ---- conversations ----


def answers_of(tokens, supervised):
    """Oracle in a plain loop: the targets of a document that are supervised, in order."""
    return [int(tokens[i]) for i in range(1, len(tokens)) if supervised[i]]


@pytest.mark.parametrize("packing", ["best_fit_whole", "best_fit_truncated"])
def test_the_mask_is_that_of_the_target_and_every_kept_answer_is_a_target_once(chats, random_chats, packing):
    _, stores = chats({"a": random_chats(60)})
    store = stores["a"].train
    rows, built = all_rows(store, packing, 64)
    bounds = list(zip(store.offsets, store.offsets[1:], strict=False))
    kept = [(a, b if packing == "best_fit_whole" else min(a + 65, b)) for a, b in bounds]
    kept = [(a, b) for a, b in kept if b - a <= 65]
    expected = collections.Counter(
        target for a, b in kept for target in answers_of(store.tokens[a:b], store.supervised[a:b])
    )
    assert collections.Counter(t for row in built for t in row["targets_BT"][row["mask_BT"]].tolist()) == expected
    assert rows.num_targets == expected.total() == rows.report["targets"]
    pairs = sum(b - a - 1 for a, b in kept)
    assert sum((row["segments_BT"] > 0).sum() for row in built) == pairs
    assert rows.report["supervised_fraction"] == pytest.approx(expected.total() / pairs)
    assert rows.report["pad_fraction"] == pytest.approx(1 - pairs / (64 * len(built)))
    whole = sum(b - a - 1 for a, b in bounds)
    assert rows.report["dropped_targets"] == whole - pairs > 0


def test_a_truncated_document_keeps_its_beginning_and_is_counted(chats):
    records = [{"prompt": "p" * 30, "response": "r" * 30}, {"prompt": "q" * 80, "response": "s"}]
    _, stores = chats({"a": records}, validation=0.0)
    rows, built = all_rows(stores["a"].train, "best_fit_truncated", 40)
    p, q, r = byte_tokenizer().encode("pqr")
    # BOS, role, 30 times p, end, role, 7 times r, of which the last is a target only
    assert sum((row["tokens_BT"] == p).sum() for row in built) == 30
    assert sum((row["targets_BT"] == r).sum() for row in built) == sum(row["mask_BT"].sum() for row in built) == 7
    assert sum((row["targets_BT"] == q).sum() for row in built) == 39
    report = rows.report
    assert (report["dropped_ends"], report["dropped_documents"], report["documents_without_target"]) == (2, 0, 1)
    assert len(built) == 2 and report["pad_fraction"] == 0.0


def test_a_prompt_longer_than_a_row_leaves_a_row_without_targets_that_is_counted(chats):
    _, stores = chats({"a": [{"prompt": "p" * 99, "response": "r"}]}, validation=0.0)
    rows, (row,) = all_rows(stores["a"].train, "best_fit_truncated", 40)
    assert not row["mask_BT"].any() and row["segments_BT"].all()
    assert rows.report["documents_without_target"] == 1 and rows.report["targets"] == 0


def test_best_fit_wastes_little_on_short_conversations(chats, random_chats):
    _, stores = chats({"a": random_chats(300, longest=40)}, validation=0.0)
    rows, _ = all_rows(stores["a"].train, "best_fit_whole", 512)
    assert rows.report["pad_fraction"] < 0.05 and rows.report["dropped_documents"] == 0
