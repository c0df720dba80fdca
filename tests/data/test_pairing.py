import collections
import math

import numpy as np
import pytest

from jaxllm.data import config as config_module
from jaxllm.data.packing import PLANS, Rows
from jaxllm.data.pairing import UNIT_PLANS, Units, plan
from jaxllm.text import chat
from jaxllm.text.chat import Conversation
from jaxllm.text.special_tokens import END_ID, EOS_ID, PAD_ID
from jaxllm.text.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
PREFERENCE = {"format": "preference"}


def tokens_of(prompt, answer):
    """Oracle: the ids of a document, and how many of them the prompt has."""
    asked = chat.prompt(Conversation(({"role": "user", "content": prompt},)), TOKENIZER)
    return [*asked, *TOKENIZER.encode(answer), END_ID, EOS_ID], len(asked)


def rows_of(store, packing, length):
    rows = Rows(store, plan(store, store.offsets, packing, length), length=length, pad_id=PAD_ID)
    return rows, [rows[index] for index in range(len(rows))]


def segments_of(row):
    """Oracle in a plain loop: number -> (inputs, targets, supervised targets, scores, margins) of a row's segments."""
    found = {}
    for place, number in enumerate(row["segments_BT"].tolist()):
        if number:
            lists = found.setdefault(number, ([], [], [], [], []))
            lists[0].append(int(row["tokens_BT"][place]))
            lists[1].append(int(row["targets_BT"][place]))
            if row["mask_BT"][place]:
                lists[2].append(int(row["targets_BT"][place]))
            lists[3].append(float(row["score_BT"][place]))
            lists[4].append(float(row["margin_BT"][place]))
            assert row["positions_BT"][place] == len(lists[0]) - 1
    return found


@pytest.fixture
def pairs(chats, random_preferences):
    records = random_preferences(40)
    return records, chats({"a": records}, PREFERENCE, validation=0.0)[1]["a"].train


@pytest.mark.parametrize("packing", list(UNIT_PLANS))
@pytest.mark.parametrize("length", [150, 400])
def test_the_documents_of_a_unit_are_neighbours_and_every_unit_is_there_once(pairs, packing, length):
    records, store = pairs
    rows, built = rows_of(store, packing, length)
    found = []
    for row in built:
        segments = segments_of(row)
        assert list(segments) == list(range(1, len(segments) + 1)) and len(segments) % 2 == 0
        for number in range(1, len(segments), 2):
            for (inputs, targets, supervised, *_), name in ((segments[number], 0), (segments[number + 1], 1)):
                assert inputs[1:] == targets[:-1] and inputs[-1] == END_ID and targets[-1] == EOS_ID
                found.append((tuple(inputs), tuple(supervised), name))
    expected = []
    for record in records:
        for place, name in enumerate(("chosen", "rejected")):
            ids, asked = tokens_of(record["prompt"], record[name])
            expected.append((tuple(ids[:-1]), tuple(ids[asked:-1]), place))
    assert sorted(found) == sorted(expected)
    assert (
        rows.report["dropped_documents"] == rows.report["dropped_identical"] == rows.report["dropped_unanswered"] == 0
    )
    assert rows.num_targets == sum(len(supervised) for _, supervised, _ in expected) == rows.report["targets"]


def test_each_document_has_its_score_and_both_the_margin_and_padding_has_neither(pairs):
    records, store = pairs
    rows, built = rows_of(store, "best_fit_whole", 200)
    found = []
    for row in [*built, rows.blank()]:
        assert row["score_BT"].dtype == row["margin_BT"].dtype == np.float32 and row["score_BT"].shape == (200,)
        padding = row["segments_BT"] == 0
        assert not row["score_BT"][padding].any() and not row["margin_BT"][padding].any()
        segments = segments_of(row)
        for number in range(1, len(segments), 2):
            (chosen, _, _, *numbers), (rejected, _, _, *others) = segments[number], segments[number + 1]
            (score, *rest), (other, *more) = numbers[0], others[0]
            assert {*rest} <= {score} and {*more} <= {other} and len({*numbers[1], *others[1]}) == 1
            found.append((tuple(chosen), tuple(rejected), score, other, numbers[1][0]))
    expected = [
        (
            *(tuple(tokens_of(record["prompt"], record[name])[0][:-1]) for name in ("chosen", "rejected")),
            record["score_chosen"], record["score_rejected"], float(np.float32(record["margin"])),
        )
        for record in records
    ]  # fmt: skip
    assert sorted(found) == sorted(expected)
    assert not rows.blank()["segments_BT"].any() and not rows.blank()["mask_BT"].any()


def test_a_lone_document_leaves_the_number_of_its_neighbour_out(chats):
    records = [{"prompt": f"{i}?", "completion": f"answer {i}", "label": i % 2 == 0} for i in range(9)]
    store = chats({"a": records}, PREFERENCE, validation=0.0)[1]["a"].train
    rows, built = rows_of(store, "best_fit_whole", 60)
    found = []
    for row in built:
        segments = segments_of(row)
        assert list(segments) == list(range(1, 2 * len(segments), 2))
        found += [(tuple(inputs), scores[0], margins[0]) for inputs, _, _, scores, margins in segments.values()]
    expected = [
        (tuple(tokens_of(record["prompt"], record["completion"])[0][:-1]), float(record["label"]), 0.0)
        for record in records
    ]
    assert sorted(found) == sorted(expected)
    assert rows.report["documents_without_target"] == 0 and max(map(len, map(segments_of, built))) > 1
    assert rows.report["pad_fraction"] == pytest.approx(np.mean([row["segments_BT"] == 0 for row in built]))


def test_a_score_that_is_not_known_is_nan(chats):
    store = chats({"a": [{"prompt": "a", "chosen": "b", "rejected": "c"}]}, PREFERENCE, validation=0.0)[1]["a"].train
    ((_, _, _, scores, margins), (_, _, _, others, _)) = segments_of(
        rows_of(store, "best_fit_whole", 40)[1][0]
    ).values()
    assert all(map(math.isnan, scores + others)) and set(margins) == {0.0}


def test_both_documents_together_must_fit_a_row_or_the_unit_is_dropped_and_counted(chats):
    records = [
        {"prompt": "p", "chosen": "x" * 20, "rejected": "y" * 20},
        {"prompt": "q", "chosen": "x" * 30, "rejected": "y"},
    ]
    store = chats({"a": records}, PREFERENCE, validation=0.0)[1]["a"].train
    needed = {record["prompt"]: sum(len(tokens_of("p", record[name])[0]) - 1 for name in ("chosen", "rejected"))
              for record in records}  # fmt: skip
    assert needed == {"p": 52, "q": 43}
    for length, kept in ((52, 2), (51, 1), (43, 1), (42, 0)):
        rows, built = rows_of(store, "best_fit_whole", length)
        assert sum(len(segments_of(row)) for row in built) == 2 * kept
        assert rows.report["dropped_documents"] == 2 - kept
        assert rows.report["dropped_targets"] == (0, 52, 95)[2 - kept]


@pytest.mark.parametrize("length", [24, 25, 40, 41])
def test_a_unit_longer_than_a_row_is_cut_to_half_a_row_or_to_what_the_other_leaves(chats, random_preferences, length):
    records = random_preferences(60, longest=25)
    store = chats({"a": records}, PREFERENCE, validation=0.0)[1]["a"].train
    rows, built = rows_of(store, "best_fit_truncated", length)
    expected, cut, unanswered, identical = collections.Counter(), 0, 0, 0
    for record in records:
        (a, asked), (b, _) = (tokens_of(record["prompt"], record[name]) for name in ("chosen", "rejected"))
        sizes = [len(a) - 1, len(b) - 1]
        if sum(sizes) > length:
            half = length // 2
            sizes = [max(half, length - sizes[1]) if sizes[0] > half else sizes[0],
                     max(half, length - sizes[0]) if sizes[1] > half else sizes[1]]  # fmt: skip
        cut += (sizes[0] < len(a) - 1) + (sizes[1] < len(b) - 1)
        if min(sizes) < asked:
            unanswered += 1
        elif a[: sizes[0] + 1] == b[: sizes[1] + 1]:
            identical += 1
        else:
            expected[tuple(a[: sizes[0]]), tuple(b[: sizes[1]])] += 1
    found = collections.Counter()
    for row in built:
        segments = segments_of(row)
        found.update((tuple(segments[n][0]), tuple(segments[n + 1][0])) for n in range(1, len(segments), 2))
    assert found == expected and found.total() + identical + unanswered == 60
    report = rows.report
    assert report["dropped_ends"] == cut > 0 and report["documents_without_target"] == 0
    assert (report["dropped_identical"], report["dropped_unanswered"]) == (identical, unanswered)


@pytest.mark.parametrize(("length", "kept"), [(40, 0), (41, 0), (42, 0), (44, 1), (62, 1)])
def test_pairs_that_the_cut_makes_identical_are_dropped_and_counted(chats, length, kept):
    """The documents are 3 tokens of a prompt, its end and a role, 17 equal ones and 10 that differ, of 32 pairs."""
    record = {"prompt": "p", "chosen": "s" * 17 + "x" * 10, "rejected": "s" * 17 + "y" * 10}
    store = chats({"a": [record]}, PREFERENCE, validation=0.0)[1]["a"].train
    a, b = (tokens_of("p", record[name])[0] for name in ("chosen", "rejected"))
    assert len(a) == 34 and next(i for i in range(len(a)) if a[i] != b[i]) == 22
    rows, built = rows_of(store, "best_fit_truncated", length)
    assert len(built) == kept and rows.report["dropped_identical"] == 1 - kept
    assert rows.report["dropped_targets"] == (66 - 2 * (length // 2) if kept else 66)
    assert rows.report["dropped_unanswered"] == 0


def test_the_last_target_of_a_cut_document_may_be_what_differs():
    starts, supervised = np.array([[0, 20]]), np.ones(40, bool)
    for differ, kept in ((9, 1), (10, 1), (11, 0)):
        units = Units(starts, np.array([[19, 19]]), np.array([differ]), supervised)
        table = UNIT_PLANS["best_fit_truncated"](units, 20)
        assert (len(table), table.dropped.identical) == (kept, 1 - kept)


def test_mismatched_documents_are_never_taken_for_identical():
    units = Units(np.array([[0, 20]]), np.array([[19, 19]]), np.array([0]), np.ones(40, bool))
    for packing, length in (("best_fit_whole", 40), ("best_fit_truncated", 10)):
        assert len(UNIT_PLANS[packing](units, length)) == 1


def test_a_prompt_that_leaves_no_room_for_an_answer_drops_the_unit_and_counts_it(chats):
    records = [{"prompt": "p" * 30, "chosen": "x", "rejected": "y"}, {"prompt": "q", "chosen": "x", "rejected": "y"}]
    store = chats({"a": records}, PREFERENCE, validation=0.0)[1]["a"].train
    rows, (row,) = rows_of(store, "best_fit_truncated", 40)
    assert len(segments_of(row)) == 2 and row["mask_BT"].sum() == 4
    report = rows.report
    assert (report["dropped_unanswered"], report["dropped_identical"], report["dropped_ends"]) == (1, 0, 2)
    assert report["dropped_targets"] == 2 * (len(tokens_of("p" * 30, "x")[0]) - 1)


@pytest.mark.parametrize("packing", list(UNIT_PLANS))
def test_a_slice_of_the_offsets_plans_the_units_of_the_slice_alone(pairs, packing):
    _, store = pairs
    part = store.offsets[5:12]
    table = plan(store, part, packing, 200)
    starts, counts = (values.reshape(-1, 2) for values in table.spans)
    assert sorted(starts[:, 0]) == part[:-1].tolist()
    assert sorted(starts[:, 1] + counts[:, 1] + 1) == part[1:].tolist()
    assert len(plan(store, store.offsets[-1:], packing, 200)) == len(plan(store, store.offsets[:1], packing, 200)) == 0


def test_conversations_and_texts_are_planned_as_ever(prepared, texts):
    store = prepared({"a": texts})[1]["a"].train
    for packing in PLANS:
        assert np.array_equal(plan(store, store.offsets, packing, 16).spans, PLANS[packing](store.offsets, 16).spans)
    assert "dropped_identical" not in Rows(store, PLANS["best_fit"](store.offsets, 16), length=16, pad_id=0).report
    assert "score_BT" not in Rows(store, PLANS["best_fit"](store.offsets, 16), length=16, pad_id=0)[0]


def test_units_have_a_plan_of_each_packing_of_whole_documents():
    assert set(UNIT_PLANS) == set(config_module.WHOLE)
