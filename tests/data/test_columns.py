import numpy as np

from jaxllm.data.columns import annotated
from jaxllm.data.packing import PLANS, Rows

KINDS = {"logp_BT": ("float32", 0), "ids_BTK": ("uint16", 2)}


def parts_of(plan, seen):
    """Of every row of a plan: each number is that of its token, [tokens] and [tokens, 2]."""
    for row in range(len(plan)):
        starts, counts = plan.pieces(row)
        seen.append(row)
        index = np.concatenate([np.arange(start, start + count) for start, count in zip(starts, counts, strict=True)])
        yield (starts, counts), {"logp_BT": index / 8, "ids_BTK": np.stack([index, 2 * index], axis=1)}


def test_columns_with_and_without_a_further_axis_come_along_with_their_tokens(prepared, texts, tmp_path):
    store = prepared({"a": texts})[1]["a"].train
    plan, seen = PLANS["best_fit"](store.offsets, 16), []
    for _ in range(2):
        found = annotated(store, tmp_path / "beside", KINDS, lambda: parts_of(plan, seen))
    assert seen == list(range(len(plan)))  # asked once
    assert found.columns["logp_BT"].shape == (store.num_tokens,) and found.columns["logp_BT"].dtype == np.float32
    assert found.columns["ids_BTK"].shape == (store.num_tokens, 2)
    last = np.zeros(store.num_tokens, bool)
    last[store.offsets[1:] - 1] = True  # of no pair the first
    assert np.array_equal(found.columns["logp_BT"], np.where(last, 0, np.arange(store.num_tokens) / 8))
    rows = Rows(found, plan, length=16, pad_id=0)
    row, blank = rows[0], rows.blank()
    assert row["logp_BT"].shape == blank["logp_BT"].shape == (16,) and row["ids_BTK"].shape == (16, 2)
    real = row["segments_BT"] > 0
    assert np.array_equal(row["logp_BT"][real] * 8, row["ids_BTK"][real, 0]) and not row["logp_BT"][~real].any()
    assert not blank["logp_BT"].any()
