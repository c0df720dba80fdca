import collections
import json
import pickle
import time

import numpy as np
import pytest

from jaxllm.data.config import DataConfig, SourceConfig
from jaxllm.data.loader import (
    StagedMixture,
    batch_fingerprint,
    train_batches,
    validation_batches,
    validation_by_source,
)
from jaxllm.data.packing import PLANS, Rows
from jaxllm.text.special_tokens import IDS
from jaxllm.text.tokenizer import byte_tokenizer, train

SHAPE = dict(batch_size=8, micro_batches=2, pad_id=0)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def lines(batches):
    """Rows of batches as bytes, in order; rows of padding alone left out."""
    return [
        row.tobytes()
        for batch in batches
        for row, mask in zip(
            batch["tokens_BT"].reshape(-1, batch["tokens_BT"].shape[-1]),
            batch["mask_BT"].reshape(-1, batch["mask_BT"].shape[-1]),
            strict=True,
        )
        if mask.any()
    ]


def same(ours, theirs):
    return len(ours) == len(theirs) and all(
        ours[i].keys() == theirs[i].keys() and all(np.array_equal(ours[i][k], theirs[i][k]) for k in ours[i])
        for i in range(len(ours))
    )


def rows_of(store, length=16):
    rows = Rows(store, PLANS["concatenated"](store.offsets, length), length=length, pad_id=0)
    return [rows[index]["tokens_BT"].tobytes() for index in range(len(rows))]


@pytest.fixture
def one(prepared, texts):
    return prepared({"a": texts})


def test_a_batch_has_micro_batches_first_and_the_dtypes_of_the_contract(one):
    config, stores = one
    batch = next(train_batches(stores, config, **SHAPE))
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        "tokens_BT": ((2, 4, 16), np.int32), "targets_BT": ((2, 4, 16), np.int32),
        "positions_BT": ((2, 4, 16), np.int32), "segments_BT": ((2, 4, 16), np.int32), "mask_BT": ((2, 4, 16), bool),
    }  # fmt: skip


def test_targets_are_the_next_tokens_wherever_the_mask_is_true(one):
    config, stores = one
    for batch in take(train_batches(stores, config, **SHAPE), 30):
        inner = (batch["segments_BT"][..., 1:] == batch["segments_BT"][..., :-1]) & batch["mask_BT"][..., 1:]
        assert inner.any()
        assert np.array_equal(batch["targets_BT"][..., :-1][inner], batch["tokens_BT"][..., 1:][inner])
        assert not (batch["targets_BT"] == 2)[batch["mask_BT"]].any(), "BOS is never predicted"


def test_each_epoch_visits_each_row_once_and_the_orders_differ(one):
    config, stores = one
    expected = rows_of(stores["a"].train)
    count, batches = len(expected), train_batches(stores, config, **SHAPE)
    read = lines(take(batches, 3 * count // 8 + 1))
    epochs = [read[epoch * count : (epoch + 1) * count] for epoch in range(3)]
    assert all(collections.Counter(epoch) == collections.Counter(expected) for epoch in epochs)
    assert expected not in epochs and epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_seeds_give_orders_of_their_own_and_no_shifted_copies(prepared, texts):
    reads = []
    for seed in (0, 0, 1):
        config, stores = prepared({"a": texts}, shuffle_seed=seed)
        reads.append(lines(take(train_batches(stores, config, **SHAPE), 3 * len(rows_of(stores["a"].train)) // 8)))
    assert reads[0] == reads[1] != reads[2]
    count = len(rows_of(stores["a"].train))
    assert reads[0][count : 2 * count] != reads[2][:count]


@pytest.mark.parametrize("prefetch", [0, 3])
def test_the_position_is_resumed_bitwise_in_the_middle_of_an_epoch(prepared, texts, prefetch):
    config, stores = prepared({"a": texts}, prefetch=prefetch)
    straight = take(train_batches(stores, config, **SHAPE), 40)
    first = train_batches(stores, config, **SHAPE)
    take(first, 13)
    state = json.loads(json.dumps(first.get_state()))
    second = train_batches(stores, config, **SHAPE)
    second.set_state(state)
    assert same(take(second, 27), straight[13:])
    assert second.get_state() == {"next_batch": 40}
    first.set_state({"next_batch": 2})
    assert same(take(first, 5), straight[2:7])


def test_resuming_far_away_takes_no_time(one):
    config, stores = one
    batches = train_batches(stores, config, **SHAPE)
    batches.set_state({"next_batch": 10**12})
    start = time.monotonic()
    next(batches)
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("state", [{}, {"next_batch": -1}, {"step": 3}])
def test_a_position_of_another_form_is_refused(one, state):
    config, stores = one
    with pytest.raises(ValueError, match="data position .* is not of the form"):
        train_batches(stores, config, **SHAPE).set_state(state)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_each_micro_batch_of_a_single_process(prepared, texts, processes):
    config, stores = prepared({"a": texts[:50], "b": texts[50:]}, weights={"b": (3.0,)})
    whole = take(train_batches(stores, config, **SHAPE), 25)
    shares = [
        take(train_batches(stores, config, **SHAPE, process_index=index, process_count=processes), 25)
        for index in range(processes)
    ]
    for step, batch in enumerate(whole):
        for micro in range(2):
            parts = [share[step]["tokens_BT"][micro] for share in shares]
            assert all(len(part) == 4 // processes for part in parts)
            together = sorted(row.tobytes() for part in parts for row in part)
            assert together == sorted(row.tobytes() for row in batch["tokens_BT"][micro])


def test_processes_together_visit_each_row_once_and_none_twice(one):
    config, stores = one
    expected = rows_of(stores["a"].train)
    shape = dict(batch_size=2, micro_batches=1, pad_id=0)
    shares = [
        lines(take(train_batches(stores, config, **shape, process_index=i, process_count=2), len(expected) // 2 + 1))
        for i in range(2)
    ]
    read = [row for pair in zip(*shares, strict=True) for row in pair][: len(expected)]
    assert collections.Counter(read) == collections.Counter(expected)


@pytest.mark.slow
def test_workers_give_the_batches_of_a_thread_and_resume(prepared, texts):
    config, stores = prepared({"a": texts})
    straight = take(train_batches(stores, config, **SHAPE), 9)
    config, stores = prepared({"a": texts}, workers=2)
    batches = train_batches(stores, config, **SHAPE)
    batches.set_state({"next_batch": 3})
    try:
        assert same(take(batches, 6), straight[3:])
    finally:
        batches.close()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            dict(batch_size=8, micro_batches=3),
            "batch_size=8 is not a multiple of micro_batches=3 times",
        ),
        (
            dict(batch_size=6, micro_batches=2, process_count=2),
            "batch_size=6 .* micro_batches=2 times process_count=2",
        ),
        (dict(batch_size=0, micro_batches=1), "batch_size=0"),
        (dict(batch_size=8, micro_batches=0), "micro_batches=0"),
        (dict(batch_size=8, micro_batches=1, process_count=2, process_index=2), "process_index=2 is outside of"),
    ],
)
@pytest.mark.parametrize("batches", [train_batches, validation_batches])
def test_a_batch_that_cannot_be_shared_equally_is_refused(one, batches, shape, message):
    config, stores = one
    with pytest.raises(ValueError, match=message):
        batches(stores, config, pad_id=0, **shape)


def test_a_source_whose_documents_are_all_dropped_is_refused(prepared):
    config, stores = prepared({"a": ["x" * 99, "y" * 99]}, validation=0.0, packing="best_fit_whole")
    with pytest.raises(ValueError, match=r"source 'a' has no row: packing='best_fit_whole' gives .*_documents': 2"):
        train_batches(stores, config, **SHAPE)


def test_the_fingerprint_follows_everything_that_decides_a_batch(prepared, texts):
    seen = set()
    for fields in (
        {}, {"shuffle_seed": 1}, {"sequence_length": 8}, {"packing": "best_fit"}, {"validation": 0.3},
    ):  # fmt: skip
        config, stores = prepared({"a": texts}, **fields)
        seen.add(train_batches(stores, config, **SHAPE).fingerprint)
    config, stores = prepared({"a": texts})
    seen.add(train_batches(stores, config, **{**SHAPE, "batch_size": 16}).fingerprint)
    seen.add(train_batches(*prepared({"b": texts})[::-1], **SHAPE).fingerprint)
    assert len(seen) == 7
    shared = train_batches(stores, config, batch_size=8, micro_batches=1, pad_id=0, process_count=2)
    config, stores = prepared({"a": texts}, workers=3, prefetch=9)
    assert shared.fingerprint == train_batches(stores, config, **SHAPE).fingerprint


def sources_of(mixture, places):
    return [mixture[place] for place in places]


def test_a_mixture_has_the_proportions_of_its_weights_in_every_stretch():
    mixture = StagedMixture(np.array([[0.5, 0.3, 0.2]]), [0])
    drawn = np.array([source for source, _ in sources_of(mixture, range(1000))])
    for start in range(0, 1000, 40):
        counts = np.bincount(drawn[start : start + 40], minlength=3)
        assert np.abs(counts - [20, 12, 8]).max() <= 1


def test_a_staged_mixture_changes_its_weights_and_gives_each_source_in_its_order():
    mixture = StagedMixture(np.array([[3.0, 1.0, 0.0], [1 / 3, 1 / 3, 1 / 3], [0.0, 0.0, 5.0]]), [0, 403, 1000])
    drawn = sources_of(mixture, range(1500))
    for start, stop, shares in ((0, 403, [0.75, 0.25, 0]), (403, 1000, [1 / 3] * 3), (1000, 1500, [0, 0, 1])):
        counts = np.bincount([source for source, _ in drawn[start:stop]], minlength=3)
        assert np.abs(counts - (stop - start) * np.array(shares)).max() <= 1.5
    for source in range(3):
        keys = [key for drawn_from, key in drawn if drawn_from == source]
        assert keys == list(range(len(keys)))


def test_a_mixture_is_found_at_any_place_without_the_places_before():
    mixture = StagedMixture(np.array([[2.0, 1.0], [1.0, 2.0]]), [0, 7])
    first = [key for _, key in (mixture[7], mixture[8], mixture[9])]
    far = [mixture[7 + place + 3 * 10**12] for place in range(3)]
    assert far == [(mixture[7 + place][0], first[place] + (1 + mixture[7 + place][0]) * 10**12) for place in range(3)]


def test_a_weight_too_small_for_the_cycle_is_refused():
    with pytest.raises(ValueError, match="hold one below 1/10000 of their sum: raise it, or set it to 0"):
        StagedMixture(np.array([[1.0, 1e-6]]), [0])


def test_batches_follow_the_stages_by_step_and_each_source_visits_its_rows_once_per_epoch(prepared, random_documents):
    texts = {"a": ["a" * 40] * 30, "b": ["b" * 40] * 30}
    config, stores = prepared(texts, weights={"a": (1.0, 0.0), "b": (1.0, 1.0)}, stage_steps=(0, 5), validation=0.0)
    batches = take(train_batches(stores, config, **SHAPE), 20)
    a, b = 32 + ord("a"), 32 + ord("b")
    share = [np.mean((batch["targets_BT"] == a).any(-1)) for batch in batches]
    assert share[:5] == [0.5] * 5 and share[5:] == [0.0] * 15
    assert all((batch["targets_BT"] == b).any() for batch in batches)
    read = lines(batches)
    from_b = [row for row in read if (np.frombuffer(row, np.int32) == b).any()]
    expected = rows_of(stores["b"].train)
    assert collections.Counter(from_b[: len(expected)]) == collections.Counter(expected)


@pytest.mark.parametrize("batch_size", [1, 4, 12, 400])
@pytest.mark.parametrize("processes", [1, 2])
def test_validation_gives_every_target_once_whatever_the_batch(prepared, texts, batch_size, processes):
    config, stores = prepared({"a": texts[:40], "b": texts[40:]}, packing="best_fit_whole")
    batch_size *= processes
    loaders = [
        validation_batches(
            stores, config, batch_size=batch_size, micro_batches=1, pad_id=0, process_index=i, process_count=processes
        )
        for i in range(processes)
    ]
    batches = [batch for loader in loaders for batch in loader]
    targets = np.concatenate([batch["targets_BT"][batch["mask_BT"]] for batch in batches])
    held_out = [store.validation for store in stores.values()]
    assert all(batch["tokens_BT"].shape == (1, batch_size // processes, 16) for batch in batches)
    expected = np.concatenate([np.delete(store.tokens, store.offsets[:-1]) for store in held_out])
    assert sorted(targets) == sorted(expected)
    assert sum(report["targets"] for report in loaders[0].reports.values()) == len(expected)
    assert sum(store.num_bytes for store in held_out) == (targets >= 32).sum()
    assert len(batches) == sum(map(len, loaders)) and len({len(loader) for loader in loaders}) == 1


def test_validation_batches_can_be_read_again_and_are_the_same(one):
    config, stores = one
    batches = validation_batches(stores, config, **SHAPE)
    assert same(list(batches), list(batches)) and len(list(batches)) == len(batches) > 1


def test_validation_of_nothing_has_no_batches(prepared, texts):
    config, stores = prepared({"a": texts}, validation=0.0)
    batches = validation_batches(stores, config, **SHAPE)
    assert len(batches) == 0 and list(batches) == [] and batches.reports == {}


def test_a_batch_fingerprint_names_its_tokens(one):
    config, stores = one
    first, second = take(train_batches(stores, config, **SHAPE), 2)
    assert batch_fingerprint(first) == batch_fingerprint({**first}) != batch_fingerprint(second)


# ---- conversations ----

LONG = dict(sequence_length=300, validation=0.3)
FORMATS = {
    "messages": (
        [
            {
                "messages": [
                    {"role": "system", "content": f"<|assistant|> {i}"},
                    {"role": "user", "content": "<|end|>?"},
                    {
                        "role": "assistant",
                        "content": "<think>é</think>",
                        "tool_calls": [{"function": {"name": "f", "arguments": '{"x": "ä"}'}}] * (1 + i % 2),
                    },
                    {"role": "tool", "content": "<answer>no</answer>"},
                    {"role": "assistant", "content": f"answer {i}"},
                ],
                "tools": [{"name": "f"}],
            }
            for i in range(30)
        ],
        lambda i: [
            "<think>é</think>" + '<|tool_call|>{"name": "f", "arguments": {"x": "ä"}}' * (1 + i % 2) + "<|end|>",
            f"answer {i}<|end|>",
        ],
    ),
    "alpaca": (
        [{"instruction": f"q {i}", "input": "x" * (i % 2), "output": f"answer {i}"} for i in range(30)],
        lambda i: [f"answer {i}<|end|>"],
    ),
    "sharegpt": (
        [
            {
                "conversations": [
                    {"from": "human", "value": f"q {i}"},
                    {"from": "gpt", "value": "first"},
                    {"from": "human", "value": "more"},
                    {"from": "gpt", "value": f"answer {i}"},
                ]
            }
            for i in range(30)
        ],
        lambda i: ["first<|end|>", f"answer {i}<|end|>"],
    ),
    "prompt_response": (
        [{"question": f"q {i}", "answer": f"answer {i}"} for i in range(30)],
        lambda i: [f"answer {i}<|end|>"],
    ),
}


def supervised_runs(batches, tokenizer):
    """The text of each run of targets under the mask, by a plain loop over the batches; a run never joins segments."""
    found = []
    for batch in batches:
        rows = (batch[name].reshape(-1, batch[name].shape[-1]) for name in ("targets_BT", "mask_BT", "segments_BT"))
        for row in zip(*rows, strict=True):
            run, before = [], 0
            for target, supervised, segment in zip(*(values.tolist() for values in row), strict=True):
                if run and (not supervised or segment != before):
                    found.append(tokenizer.decode(run))
                    run = []
                run += [target] * supervised
                before = segment
            found += [tokenizer.decode(run)] * bool(run)
    return found


@pytest.mark.parametrize("turns", ["all", "last"])
@pytest.mark.parametrize("format", list(FORMATS))
def test_the_mask_of_real_batches_is_the_assistants_text_and_its_end(chats, format, turns):
    records, answers = FORMATS[format]
    tokenizer = train(["answer first more q"] * 9, vocab_size=310) if turns == "last" else byte_tokenizer()
    config, stores = chats({"a": records}, {"turns": turns}, tokenizer, **LONG)
    batches = train_batches(stores, config, batch_size=1, micro_batches=1, pad_id=0)
    trained = supervised_runs(take(batches, batches.reports["a"]["rows"]), tokenizer)
    held_out = supervised_runs(validation_batches(stores, config, **SHAPE), tokenizer)
    spoken = [run for i in range(30) for run in answers(i)[0 if turns == "all" else -1 :]]
    assert sorted(trained + held_out) == sorted(spoken)
    last = {answers(i)[-1] for i in range(30)}
    assert len(last & set(trained)) + len(last & set(held_out)) == 30 and len(last & set(held_out)) > 2


def test_response_tuning_trains_on_answers_alone_and_validates_on_whole_conversations(chats):
    records, _ = FORMATS["alpaca"]
    config, stores = chats({"a": records}, {"response_only": True}, **LONG)
    trained = take(train_batches(stores, config, **SHAPE), 3)
    held_out = validation_batches(stores, config, **SHAPE)
    users = [sum((batch["tokens_BT"] == IDS["<|user|>"]).sum() for batch in side) for side in (trained, held_out)]
    assert users[0] == 0 < users[1]
    assert set(supervised_runs(trained, byte_tokenizer())) <= {f"answer {i}<|end|>" for i in range(30)}


def test_conversations_and_texts_mix_and_each_keeps_its_packing_and_its_mask(prepared, chats, texts, random_chats):
    """Replay, against forgetting: half of the rows are text, of which every target counts."""
    replay, replayed = prepared({"replay": texts}, sequence_length=64)
    chatting, stores = chats({"chat": random_chats(60)})
    own = SourceConfig(chatting.sources["chat"].path, format="messages", packing="best_fit_whole")
    config = DataConfig(sources={"replay": replay.sources["replay"], "chat": own}, sequence_length=64, validation=0.2)
    both = replayed | stores
    batches = train_batches(both, config, **SHAPE)
    rows = {name: array.reshape(8, 64) for name, array in next(batches).items()}
    is_text = ~(rows["tokens_BT"] == IDS["<|user|>"]).any(-1)
    assert is_text.sum() == 4
    assert np.array_equal(rows["mask_BT"][is_text], rows["segments_BT"][is_text] > 0)
    assert (rows["mask_BT"][~is_text].sum(-1) < (rows["segments_BT"][~is_text] > 0).sum(-1)).all()
    assert batches.reports["replay"]["supervised_fraction"] == 1.0 > batches.reports["chat"]["supervised_fraction"]
    each, every = validation_by_source(both, config, **SHAPE), validation_batches(both, config, **SHAPE)
    assert list(each) == ["replay", "chat"]
    assert {name: one.reports[name] for name, one in each.items()} == every.reports
    for one in [*each.values(), every]:
        targets = sum(report["targets"] for report in one.reports.values())
        assert sum(batch["mask_BT"].sum() for batch in one) == targets
    held_out = replayed["replay"].validation
    assert every.reports["replay"]["targets"] == held_out.num_tokens - held_out.num_documents


def test_a_source_that_holds_nothing_out_has_no_validation_of_its_own(prepared, texts):
    config, stores = prepared({"a": texts}, validation=0.0)
    assert validation_by_source(stores, config, **SHAPE) == {}


def test_conversations_that_all_are_too_long_are_refused_on_both_sides(chats):
    config, stores = chats({"a": [{"prompt": f"{i}" + "p" * 99, "response": "r"} for i in range(20)]})
    for batches in (train_batches, validation_batches):
        with pytest.raises(
            ValueError, match="source 'a' has no row: packing='best_fit_whole' .*; raise sequence_length"
        ):
            batches(stores, config, **SHAPE)


@pytest.mark.parametrize(("balance", "expected"), [(1.0, 0.15), (0.5, 0.296), (0.0, 0.5)])
def test_the_balance_of_tasks_decides_their_share(chats, balance, expected):
    """30 rows of one task and 170 of the other: shares as 30, sqrt 30, or 1 to 170, sqrt 170, or 1."""
    records = [{"prompt": "m" * 20, "response": "m" * 20, "task": "maths"}] * 30
    records += [{"prompt": "p" * 20, "response": "p" * 20, "task": "prose"}] * 170
    config, stores = chats({"a": records}, {"tag": "task", "balance": balance}, validation=0.0, sequence_length=44)
    batches = train_batches(stores, config, **SHAPE)
    (m,) = byte_tokenizer().encode("m")
    found = np.mean([(batch["tokens_BT"] == m).any(-1) for batch in take(batches, 100)])
    assert found == pytest.approx(expected, abs=0.01)
    assert list(batches.reports) == (["a"] if balance == 1 else ["a/maths", "a/prose"])


def test_a_task_without_rows_is_left_out_of_the_balance(chats):
    records = [{"prompt": "a", "response": "b", "task": "short"}] * 9
    records += [{"prompt": "a" * 99, "response": "b", "task": "long"}] * 9
    config, stores = chats({"a": records}, {"tag": "task", "balance": 0.0}, validation=0.0)
    assert list(train_batches(stores, config, **SHAPE).reports) == ["a/short"]


def test_the_fingerprint_follows_the_packing_and_the_balance_of_a_source(chats, random_chats):
    records, found = random_chats(40), set()
    for options in ({}, {"packing": "best_fit_truncated"}, {"tag": "task"}, {"tag": "task", "balance": 0.5}):
        config, stores = chats({"a": records}, options)
        found.add(train_batches(stores, config, **SHAPE).fingerprint)
    assert len(found) == 4


def test_rows_of_conversations_go_to_another_process_by_their_place(chats, random_chats):
    store = chats({"a": random_chats(400)})[1]["a"].train
    rows = Rows(store, PLANS["best_fit_whole"](store.offsets[:2], 300), length=300, pad_id=0)
    assert rows[0]["mask_BT"].any() and rows.report["rows"] == 1
    copy = pickle.dumps(rows)
    assert len(copy) < 2000 < store.num_tokens
    assert np.array_equal(pickle.loads(copy)[0]["mask_BT"], rows[0]["mask_BT"])


# ---- preferences ----

ONE = dict(batch_size=1, micro_batches=1, pad_id=0)


def compared(chats, records, fields=(), **options):
    return chats({"a": records}, {"format": "preference", **options}, **{"sequence_length": 150, **dict(fields)})


def epoch_of(stores, config):
    batches = train_batches(stores, config, **ONE)
    return take(batches, batches.reports["a"]["rows"])


def units_of(batches, answers_of):
    """Of every pair of answers: the text of the inputs, the supervised text, score and margin of each."""
    found = []
    for batch in batches:
        flat = {name: array.reshape(-1, array.shape[-1]) for name, array in batch.items()}
        for line in range(len(flat["tokens_BT"])):
            answers = answers_of({name: array[line] for name, array in flat.items()})
            found += [tuple(map(_document, (answers[n], answers[n + 1]))) for n in sorted(answers)[::2]]
    return sorted(found)


def _document(answer):
    inputs, _, learned, scores, margins = answer
    (score,), (margin,) = np.unique(scores), np.unique(margins)
    return byte_tokenizer().decode(inputs), byte_tokenizer().decode(learned), float(score), float(margin)


def expected_of(records):
    return sorted(
        tuple(
            (
                f"<|bos|><|user|>{record['prompt']}<|end|><|assistant|>{record[name]}<|end|>",
                f"{record[name]}<|end|>",
                float(record[f"score_{name}"]),
                float(np.float32(record["margin"])),
            )
            for name in ("chosen", "rejected")
        )
        for record in records
    )


def test_an_epoch_holds_each_pair_once_and_the_end_of_an_answer_is_an_input(chats, random_preferences, answers_of):
    records = random_preferences(60)
    config, stores = compared(chats, records, {"validation": 0.3})
    trained = units_of(epoch_of(stores, config), answers_of)
    held_out = units_of(validation_batches(stores, config, **SHAPE), answers_of)
    assert held_out and sorted(trained + held_out) == expected_of(records)
    asked, kept = ({unit[0][0].split("<|end|>")[0] for unit in side} for side in (trained, held_out))
    assert not asked & kept and len(asked) + len(kept) == 30


def test_a_batch_of_preferences_has_the_dtypes_of_the_contract_however_it_is_cut(chats, random_preferences):
    config, stores = compared(chats, random_preferences(60))
    whole = next(train_batches(stores, config, **{**SHAPE, "micro_batches": 1}))
    assert {name: array.dtype for name, array in whole.items()} == {
        "tokens_BT": np.int32, "targets_BT": np.int32, "positions_BT": np.int32, "segments_BT": np.int32,
        "parents_BT": np.int32, "mask_BT": bool, "score_BT": np.float32, "margin_BT": np.float32,
    }  # fmt: skip
    parts = next(train_batches(stores, config, **SHAPE))
    assert {array.shape for array in parts.values()} == {(2, 4, 150)}
    assert same([parts], [{name: array.reshape(2, 4, 150) for name, array in whole.items()}])
    (filled,) = validation_batches(stores, config, **{**SHAPE, "batch_size": 32})
    blank = ~filled["segments_BT"].any(axis=-1)
    assert blank.any() and not filled["score_BT"][blank].any() and not filled["margin_BT"][blank].any()


def test_an_answer_alone_comes_with_its_verdict_beside_one_of_which_none_is_known(
    chats, random_preferences, answers_of
):
    records = random_preferences(40)
    config, stores = compared(chats, records, {"validation": 0.0}, answers="alone")
    found = units_of(epoch_of(stores, config), answers_of)
    liked = {f"{record['chosen']}<|end|>": record["prompt"] for record in records}
    disliked = {f"{record['rejected']}<|end|>": record["prompt"] for record in records}
    prompts = liked | disliked
    verdicts = sorted((own[1], own[2]) for own, _ in found)
    assert verdicts == sorted([(text, 1.0) for text in liked] + [(text, 0.0) for text in disliked])
    for own, other in found:
        for text, spoken, *_ in (own, other):
            assert text == f"<|bos|><|user|>{prompts[own[1]]}<|end|><|assistant|>{spoken}"
        assert prompts[other[1]] != prompts[own[1]] and np.isnan(other[2]) and own[3] == other[3] == 0.0


def test_better_answers_alone_are_conversations_and_mix_with_texts(prepared, chats, texts, random_preferences):
    records = random_preferences(40)
    config, stores = compared(chats, records, {"validation": 0.0}, answers="chosen")
    found = supervised_runs(epoch_of(stores, config), byte_tokenizer())
    assert sorted(found) == sorted(f"{record['chosen']}<|end|>" for record in records)
    replay, replayed = prepared({"replay": texts}, sequence_length=150)
    both = DataConfig(sources=config.sources | replay.sources, sequence_length=150, packing="best_fit_whole")
    batch = next(train_batches(stores | replayed, both, **SHAPE))
    assert "score_BT" not in batch and batch["mask_BT"].any()


def test_batches_of_preferences_resume_and_are_shared_by_processes(chats, random_preferences):
    config, stores = compared(chats, random_preferences(60), {"validation": 0.0}, format="pairs", answers="paired")
    batches = train_batches(stores, config, **SHAPE)
    take(batches, 3)
    state, expected = batches.get_state(), take(batches, 2)
    batches.set_state(state)
    assert same(take(batches, 2), expected)
    shares = [take(train_batches(stores, config, **SHAPE, process_index=index, process_count=2), 5) for index in (0, 1)]
    whole = take(train_batches(stores, config, **SHAPE), 5)
    for name in ("tokens_BT", "score_BT", "margin_BT"):
        together = [np.concatenate([share[i][name] for share in shares], axis=1) for i in range(5)]
        for found, batch in zip(together, whole, strict=True):
            assert sorted(map(bytes, found.reshape(8, -1))) == sorted(map(bytes, batch[name].reshape(8, -1)))


def test_preferences_that_all_are_too_long_are_refused(chats, random_preferences):
    config, stores = compared(chats, random_preferences(40), {"sequence_length": 12})
    with pytest.raises(ValueError, match=r"source 'a' has no row: .*'dropped_documents': [1-9].*raise sequence_length"):
        train_batches(stores, config, **SHAPE)


def test_tasks_of_preferences_are_balanced(chats, random_preferences, answers_of):
    config, stores = compared(chats, random_preferences(80), {"validation": 0.0}, tag="task", balance=0.0)
    batches = train_batches(stores, config, **SHAPE)
    assert set(batches.reports) == {"a/maths", "a/prose"}
    assert sum(report["rows"] for report in batches.reports.values()) > 4
    units = units_of(take(batches, 8), answers_of)
    assert {unit for unit in units} <= set(expected_of(random_preferences(80)))
