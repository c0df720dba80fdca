import collections
import itertools
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
SHARED = 4  # of a prompt of one letter: its document's beginning, its role, the letter and its end


def tokens_of(prompt, answer):
    """Oracle: the ids of a document, and how many of them the prompt has."""
    asked = chat.prompt(Conversation(({"role": "user", "content": prompt},)), TOKENIZER)
    return [*asked, *TOKENIZER.encode(answer), END_ID, EOS_ID], len(asked)


def rows_of(store, packing, length):
    rows = Rows(store, plan(store, store.offsets, packing, length), length=length, pad_id=PAD_ID)
    return rows, [rows[index] for index in range(len(rows))]


@pytest.fixture
def pairs(chats, random_preferences):
    records = random_preferences(40)
    return records, chats({"a": records}, PREFERENCE, validation=0.0)[1]["a"].train


@pytest.mark.parametrize("packing", list(UNIT_PLANS))
@pytest.mark.parametrize("length", [150, 400])
def test_the_answers_of_a_unit_lie_behind_their_prompt_and_every_unit_is_there_once(pairs, packing, length, answers_of):
    records, store = pairs
    rows, built = rows_of(store, packing, length)
    found = []
    for row in built:
        segments = answers_of(row)
        numbers = [number for number, _ in itertools.groupby(row["segments_BT"].tolist()) if number]
        assert numbers == [n for unit in range(1, len(numbers) // 3 + 1) for n in (-unit, 2 * unit - 1, 2 * unit)]
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


def test_each_document_has_its_score_and_both_the_margin_and_padding_has_neither(pairs, answers_of):
    records, store = pairs
    rows, built = rows_of(store, "best_fit_whole", 200)
    found = []
    for row in [*built, rows.blank()]:
        assert row["score_BT"].dtype == row["margin_BT"].dtype == np.float32 and row["score_BT"].shape == (200,)
        padding = row["segments_BT"] == 0
        assert not row["score_BT"][padding].any() and not row["margin_BT"][padding].any()
        segments = answers_of(row)
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


def test_a_lone_document_leaves_the_number_of_its_neighbour_out(chats, answers_of):
    records = [{"prompt": f"{i}?", "completion": f"answer {i}", "label": i % 2 == 0} for i in range(9)]
    store = chats({"a": records}, PREFERENCE, validation=0.0)[1]["a"].train
    rows, built = rows_of(store, "best_fit_whole", 60)
    found = []
    for row in built:
        segments = answers_of(row)
        assert list(segments) == list(range(1, 2 * len(segments), 2))
        found += [(tuple(inputs), scores[0], margins[0]) for inputs, _, _, scores, margins in segments.values()]
    expected = [
        (tuple(tokens_of(record["prompt"], record["completion"])[0][:-1]), float(record["label"]), 0.0)
        for record in records
    ]
    assert sorted(found) == sorted(expected)
    assert rows.report["documents_without_target"] == 0 and max(map(len, map(answers_of, built))) > 1
    assert rows.report["pad_fraction"] == pytest.approx(np.mean([row["segments_BT"] == 0 for row in built]))


def test_a_score_that_is_not_known_is_nan(chats, answers_of):
    store = chats({"a": [{"prompt": "a", "chosen": "b", "rejected": "c"}]}, PREFERENCE, validation=0.0)[1]["a"].train
    ((_, _, _, scores, margins), (_, _, _, others, _)) = answers_of(rows_of(store, "best_fit_whole", 40)[1][0]).values()
    assert all(map(math.isnan, scores + others)) and set(margins) == {0.0}


def test_both_documents_together_must_fit_a_row_or_the_unit_is_dropped_and_counted(chats, answers_of):
    records = [
        {"prompt": "p", "chosen": "x" * 20, "rejected": "y" * 20},
        {"prompt": "q", "chosen": "x" * 30, "rejected": "y"},
    ]
    store = chats({"a": records}, PREFERENCE, validation=0.0)[1]["a"].train
    needed = {
        record["prompt"]: SHARED + sum(map(len, (record["chosen"], record["rejected"]))) + 4 for record in records
    }
    assert needed == {"p": 48, "q": 39}
    for length, kept in ((48, 2), (47, 1), (39, 1), (38, 0)):
        rows, built = rows_of(store, "best_fit_whole", length)
        assert sum(len(answers_of(row)) for row in built) == 2 * kept
        assert rows.report["dropped_documents"] == 2 - kept
        assert rows.report["dropped_targets"] == (0, 48, 87)[2 - kept]


@pytest.mark.parametrize("length", [24, 25, 40, 41])
def test_a_unit_longer_than_a_row_is_cut_to_half_of_what_its_prompt_leaves_or_to_what_the_other_does(
    chats, random_preferences, length, answers_of
):
    records = random_preferences(60, longest=25)
    store = chats({"a": records}, PREFERENCE, validation=0.0)[1]["a"].train
    rows, built = rows_of(store, "best_fit_truncated", length)
    expected, cut, unanswered, identical = collections.Counter(), 0, 0, 0
    for record in records:
        (a, asked), (b, _) = (tokens_of(record["prompt"], record[name]) for name in ("chosen", "rejected"))
        sizes, room = [len(a) - asked, len(b) - asked], length - (asked - 1)
        if sum(sizes) > room:
            half = room // 2
            sizes = [max(half, room - sizes[1]) if sizes[0] > half else sizes[0],
                     max(half, room - sizes[0]) if sizes[1] > half else sizes[1]]  # fmt: skip
        sizes = [asked - 1 + size for size in sizes]
        cut += (sizes[0] < len(a) - 1) + (sizes[1] < len(b) - 1)
        if min(sizes) < asked:
            unanswered += 1
        elif a[: sizes[0] + 1] == b[: sizes[1] + 1]:
            identical += 1
        else:
            expected[tuple(a[: sizes[0]]), tuple(b[: sizes[1]])] += 1
    found = collections.Counter()
    for row in built:
        segments = answers_of(row)
        found.update((tuple(segments[n][0]), tuple(segments[n + 1][0])) for n in range(1, len(segments), 2))
    assert found == expected and found.total() + identical + unanswered == 60
    report = rows.report
    assert report["dropped_ends"] == cut > 0 and report["documents_without_target"] == 0
    assert (report["dropped_identical"], report["dropped_unanswered"]) == (identical, unanswered)


@pytest.mark.parametrize(("length", "kept"), [(21, 0), (39, 0), (40, 1), (61, 1), (62, 1)])
def test_pairs_that_the_cut_makes_identical_are_dropped_and_counted(chats, length, kept):
    """After 4 pairs of a prompt, the answers are a role, 17 equal tokens, 10 that differ and an end: 29 pairs each."""
    record = {"prompt": "p", "chosen": "s" * 17 + "x" * 10, "rejected": "s" * 17 + "y" * 10}
    store = chats({"a": [record]}, PREFERENCE, validation=0.0)[1]["a"].train
    a, b = (tokens_of("p", record[name])[0] for name in ("chosen", "rejected"))
    assert len(a) == SHARED + 30 and next(i for i in range(len(a)) if a[i] != b[i]) == SHARED + 18
    rows, built = rows_of(store, "best_fit_truncated", length)
    assert len(built) == kept and rows.report["dropped_identical"] == 1 - kept
    assert rows.report["dropped_targets"] == (58 - 2 * ((length - SHARED) // 2) if kept else 62)
    assert rows.report["dropped_unanswered"] == 0


@pytest.mark.parametrize(("shared", "last"), [(0, 10), (3, 11)])
def test_the_last_target_of_a_cut_document_may_be_what_differs(shared, last):
    """Of documents of 19 pairs in a row of 20: each is cut to its last target."""
    starts, counts = np.array([[0, shared, 20]]), np.array([[shared, 19 - shared, 19 - shared]])
    marks = np.arange(40) > shared
    for differ, kept in ((last - 1, 1), (last, 1), (last + 1, 0)):
        table = UNIT_PLANS["best_fit_truncated"](Units(starts, counts, np.array([differ]), marks), 20)
        assert (len(table), table.dropped.identical) == (kept, 1 - kept)


def test_an_answer_that_is_the_beginning_of_the_other_is_not_the_same():
    """Of 8 pairs, and of 12 that the cut leaves, the first 8 are the same."""
    units = Units(np.array([[0, 0, 20]]), np.array([[0, 19, 8]]), np.array([9]), np.ones(40, bool))
    table = UNIT_PLANS["best_fit_truncated"](units, 20)
    assert table.counts.tolist() == [[0, 12, 8]] and not table.dropped.identical


def test_one_answer_without_a_target_drops_the_unit():
    """Its first turns, from which nothing is learned, reach beyond the cut."""
    for first, second, dropped in ((7, 22, 0), (8, 22, 1), (7, 27, 1)):
        places = np.arange(40)
        marks = ((places >= first) & (places < 20)) | (places >= second)
        units = Units(np.array([[2, 2, 20]]), np.array([[2, 17, 10]]), np.array([3]), marks)
        table = UNIT_PLANS["best_fit_truncated"](units, 12)
        assert (table.dropped.unanswered, len(table)) == (dropped, 1 - dropped)


def test_mismatched_documents_are_never_taken_for_identical():
    units = Units(np.array([[0, 2, 20]]), np.array([[2, 17, 17]]), np.array([0]), np.ones(40, bool))
    for packing, length in (("best_fit_whole", 40), ("best_fit_truncated", 10)):
        assert len(UNIT_PLANS[packing](units, length)) == 1


@pytest.mark.parametrize("letters", [35, 36, 37, 50])
def test_a_prompt_that_leaves_no_room_for_an_answer_drops_the_unit_and_counts_it(chats, letters, answers_of):
    """In a row of 40: of the prompt all but two, one, none or less is left, and each answer needs one."""
    long = {"prompt": "p" * letters, "chosen": "x", "rejected": "y"}
    store = chats({"a": [long, {"prompt": "q", "chosen": "x", "rejected": "y"}]}, PREFERENCE, validation=0.0)[1]["a"]
    rows, built = rows_of(store.train, "best_fit_truncated", 40)
    report, kept = rows.report, letters < 36
    assert sum(len(answers_of(row)) for row in built) == 2 + 2 * kept
    assert sum(row["mask_BT"].sum() for row in built) == 4 + 2 * kept
    assert (report["dropped_unanswered"], report["dropped_identical"], report["dropped_ends"]) == (1 - kept, 0, 2)
    assert report["dropped_targets"] == (4 if kept else 3 + letters + 6)


@pytest.mark.parametrize("packing", list(UNIT_PLANS))
def test_a_slice_of_the_offsets_plans_the_units_of_the_slice_alone(pairs, packing):
    _, store = pairs
    part = store.offsets[5:12]
    table = plan(store, part, packing, 200)
    starts, counts = (values.reshape(-1, 3) for values in table.spans)
    assert sorted(starts[:, 0]) == part[:-1].tolist()
    assert sorted(starts[:, 2] + counts[:, 2] + 1) == part[1:].tolist()
    assert len(plan(store, store.offsets[-1:], packing, 200)) == len(plan(store, store.offsets[:1], packing, 200)) == 0


def test_conversations_and_texts_are_planned_as_ever(prepared, texts):
    store = prepared({"a": texts})[1]["a"].train
    for packing in PLANS:
        assert np.array_equal(plan(store, store.offsets, packing, 16).spans, PLANS[packing](store.offsets, 16).spans)
    assert "dropped_identical" not in Rows(store, PLANS["best_fit"](store.offsets, 16), length=16, pad_id=0).report
    row = Rows(store, PLANS["best_fit"](store.offsets, 16), length=16, pad_id=0)[0]
    assert not {"score_BT", "parents_BT"} & row.keys()


def test_units_have_a_plan_of_each_packing_of_whole_documents():
    assert set(UNIT_PLANS) == set(config_module.WHOLE)
