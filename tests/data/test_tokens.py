import collections
import hashlib
import json
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxllm.data import tokens as tokens_module
from jaxllm.data import units
from jaxllm.data.config import DataConfig, SourceConfig
from jaxllm.data.sources import DocumentSource
from jaxllm.data.tokens import open_store, prepare, training_texts
from jaxllm.text import chat
from jaxllm.text.special_tokens import BOS_ID, EOS_ID
from jaxllm.text.tokenizer import byte_tokenizer, train

TOKENIZER = byte_tokenizer()


def documents_of(store):
    return [store.tokens[a:b].tolist() for a, b in zip(store.offsets, store.offsets[1:], strict=False)]


def texts_of(store):
    found = documents_of(store)
    assert all(tokens[0] == BOS_ID and tokens[-1] == EOS_ID for tokens in found)
    return [TOKENIZER.decode(tokens[1:-1]) for tokens in found]


def text_config(tmp_path, text, **fields):
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    return DataConfig(sources={"a": SourceConfig(str(path))}, **fields)


def test_every_document_is_stored_once_between_bos_and_eos(prepared, texts):
    _, stores = prepared({"a": texts})
    assert sorted(texts_of(stores["a"].train) + texts_of(stores["a"].validation)) == sorted(texts)
    assert len(texts_of(stores["a"].validation)) in range(5, 30)


def test_counts_are_exact(prepared, texts):
    _, stores = prepared({"a": [*texts, "", ""]})
    for store in stores["a"]:
        kept = texts_of(store)
        assert store.num_documents == len(kept) and store.num_tokens == len(store.tokens) == store.offsets[-1]
        assert store.num_bytes == sum(len(text.encode()) for text in kept)
        assert store.num_bytes == TOKENIZER.byte_lengths_V[store.tokens].sum()
        assert store.report == {
            "num_documents": store.num_documents,
            "num_tokens": store.num_tokens,
            "num_bytes": store.num_bytes,
            "dropped_empty": 2,
        }


def test_bytes_are_exact_for_pieces_with_byte_fallback(tmp_path, prepared, texts):
    pieces = train(texts, vocab_size=330)
    config, _ = prepared({"a": [*texts, "漢字 😀 ▁"]})
    for store in prepare(config, pieces, directory=tmp_path / "pieces")["a"]:
        assert store.num_bytes == pieces.byte_lengths_V[store.tokens].sum()


def test_duplicates_never_lie_on_both_sides_nor_side_by_side(prepared, texts):
    _, stores = prepared({"a": texts * 6})
    train_texts, held_out = texts_of(stores["a"].train), texts_of(stores["a"].validation)
    assert not set(train_texts) & set(held_out) and len(train_texts) + len(held_out) == 6 * len(texts)
    neighbours = sum(a == b for a, b in zip(train_texts, train_texts[1:], strict=False))
    assert neighbours < 0.1 * len(train_texts)


def test_the_sides_depend_on_the_content_alone(prepared, texts):
    _, stores = prepared({"a": texts, "b": texts[::-1], "c": texts[:40]})
    held_out = [set(texts_of(store.validation)) for store in stores.values()]
    assert held_out[0] == held_out[1] and held_out[2] == held_out[0] & set(texts[:40])


def test_the_documents_that_are_held_out_never_change(prepared):
    _, stores = prepared({"a": [str(number) for number in range(20)]}, validation=0.2)
    assert sorted(texts_of(stores["a"].validation)) == ["15", "16", "7"]


def test_documents_are_shuffled_in_the_store_and_equally_at_every_run(prepared, texts):
    _, stores = prepared({"a": texts, "b": texts})
    order = texts_of(stores["a"].train)
    assert order == texts_of(stores["b"].train)
    places = [texts.index(text) for text in order]
    assert abs(np.corrcoef(places, np.arange(len(places)))[0, 1]) < 0.4


def test_tail_holds_out_the_end_of_the_only_document_at_a_character(tmp_path):
    text = "aé漢" * 99 + "z"
    for share in (0.1 + byte / len(text.encode()) for byte in range(6)):
        config = text_config(tmp_path, text, split="tail", validation=share)
        stores = prepare(config, TOKENIZER, directory=tmp_path / "cache")["a"]
        (head,), (tail,) = map(texts_of, stores)
        assert head + tail == text
        assert len(tail.encode()) == pytest.approx(share * len(text.encode()), abs=3)


def test_tail_of_several_documents_is_refused(prepared, texts):
    with pytest.raises(ValueError, match="split='tail' holds out the end of the only document"):
        prepared({"a": texts}, split="tail")


def test_a_validation_path_is_held_out_whole_and_kept_out_of_the_training(prepared, texts, tmp_path):
    prepared({"a": texts[:60], "held": [*texts[50:], ""]})
    source = SourceConfig(str(tmp_path / "a.jsonl"), validation_path=str(tmp_path / "held.jsonl"))
    stores = prepare(DataConfig(sources={"x": source}), TOKENIZER, directory=tmp_path / "cache")["x"]
    assert sorted(texts_of(stores.validation)) == sorted(texts[50:])
    assert sorted(texts_of(stores.train)) == sorted(texts[:50])
    assert stores.train.report["dropped_in_validation"] == 10 and stores.train.report["dropped_empty"] == 1


def test_nothing_is_held_out_at_validation_0(prepared, texts):
    _, stores = prepared({"a": texts}, validation=0.0)
    assert stores["a"].validation.num_tokens == stores["a"].validation.num_bytes == 0
    assert stores["a"].train.num_documents == len(texts)


def test_a_side_without_documents_is_named(prepared, texts, tmp_path):
    message = r"source 'a' \(.*a.jsonl\) has 1 documents, and none for {} with split='document', validation={}"
    with pytest.raises(ValueError, match=message.format("validation", 0.01) + ".*split='tail' for a single document"):
        prepared({"a": texts[:1]}, validation=0.01)
    with pytest.raises(ValueError, match=message.format("train", 0.99)):
        prepared({"a": texts[:1]}, validation=0.99)
    assert not list((tmp_path / "cache").iterdir())


def test_a_side_without_documents_is_told_with_what_was_dropped_and_why(chats):
    tie = {"prompt": "q", "chosen": "a", "rejected": "b", "tie": True}
    identical = {"prompt": "q", "chosen": "a", "rejected": "a", "tie": None}
    message = r"has 5 documents \(dropped: {'identical': 1, 'tie': 4}\), and none for train .*: mend what is dropped, "
    with pytest.raises(ValueError, match=message):
        chats({"a": [tie] * 4 + [identical]}, PREFERENCE)


def test_texts_are_tokenised_once(prepared, texts, monkeypatch):
    first = prepared({"a": texts})[1]["a"]
    monkeypatch.setattr(tokens_module, "_tokenise", lambda *arguments: pytest.fail("tokenised again"))
    again = prepared({"a": texts}, shuffle_seed=9, sequence_length=99)[1]["a"]
    assert again == first


def test_another_source_tokenizer_or_option_is_another_cache(prepared, texts, tmp_path):
    config, stores = prepared({"a": texts})
    found = [stores["a"].train]
    found.append(prepared({"a": texts[1:]})[1]["a"].train)
    found.append(prepared({"a": texts}, validation=0.3)[1]["a"].train)
    prepared({"a": texts})
    found.append(prepare(config, train(texts, vocab_size=330), directory=tmp_path / "cache")["a"].train)
    assert len({store.fingerprint for store in found}) == len({store.directory for store in found}) == 4
    assert stores["a"].train.fingerprint != stores["a"].validation.fingerprint


def test_ids_are_stored_in_as_few_bytes_as_the_vocabulary_needs(prepared, texts, monkeypatch, tmp_path):
    config, stores = prepared({"a": texts})
    assert stores["a"].train.tokens.dtype == np.uint16
    monkeypatch.setattr(type(TOKENIZER), "vocab_size", 2**16 + 1)
    large = prepare(config, TOKENIZER, directory=tmp_path / "large")["a"].train
    assert large.tokens.dtype == np.uint32 and np.array_equal(large.tokens, stores["a"].train.tokens)


def test_a_failing_tokenisation_leaves_nothing(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": 1}\n')
    with pytest.raises(ValueError, match="line 2"):
        prepare(DataConfig(sources={"a": SourceConfig(str(path))}), TOKENIZER, directory=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path):
    config = text_config(tmp_path, "abc" * 100_000, validation=0.0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            prepare(config, TOKENIZER, directory=tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "cache").iterdir())
    assert prepare(config, TOKENIZER, directory=tmp_path / "cache")["a"].train.num_bytes == 300_000


def test_a_killed_tokenisation_is_never_taken_for_whole(tmp_path, texts):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = DataConfig(sources={"a": SourceConfig(str(path))}, validation=0.2)
    program = (
        "import sys, time; from jaxllm.data import tokens; from jaxllm.data.config import *;"
        "from jaxllm.text.tokenizer import byte_tokenizer;"
        "tokens._Writer.finish = lambda self, *rest: (print('reached', flush=True), time.sleep(60));"
        "config = DataConfig(sources={'a': SourceConfig(sys.argv[1])}, validation=0.2);"
        "tokens.prepare(config, byte_tokenizer(), directory=sys.argv[2])"
    )
    arguments = [sys.executable, "-c", program, str(path), str(tmp_path / "cache")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"reached\n"
        process.send_signal(signal.SIGKILL)
    assert [place.name.split(".")[1][:8] for place in (tmp_path / "cache").iterdir()] == ["partial-"]
    stores = prepare(config, TOKENIZER, directory=tmp_path / "cache")["a"]
    assert sorted(texts_of(stores.train) + texts_of(stores.validation)) == sorted(texts)
    assert list((tmp_path / "cache").iterdir()) == [stores.train.directory.parent], "what was killed is gone"


def test_what_is_still_written_or_another_hosts_is_left_alone(tmp_path):
    here, elsewhere = tmp_path / f"c{tokens_module._PARTIAL}1", tmp_path / "c.partial-elsewhere-1"
    elsewhere.mkdir()

    def write(partial):
        here.mkdir()
        tokens_module.write_whole(tmp_path / "b", lambda inner: (inner / "file").touch())
        assert here.is_dir() and partial.is_dir(), "somebody writes here"

    tokens_module.write_whole(tmp_path / "a", write)
    assert set(tmp_path.iterdir()) == {tmp_path / "a", tmp_path / "b", here, elsewhere}
    tokens_module.write_whole(tmp_path / "d", lambda partial: None)
    assert set(tmp_path.iterdir()) == {tmp_path / "a", tmp_path / "b", tmp_path / "d", elsewhere}


def test_without_locks_it_is_written_and_nothing_removed(tmp_path, monkeypatch):
    def locks(*_):
        raise OSError("no locks here")

    monkeypatch.setattr(tokens_module.fcntl, "flock", locks)
    left = tmp_path / f"c{tokens_module._PARTIAL}1"
    left.mkdir()
    tokens_module.write_whole(tmp_path / "a", lambda partial: None)
    assert set(tmp_path.iterdir()) == {tmp_path / "a", left}


def test_only_the_last_renaming_gives_a_cache_its_name(prepared, texts, monkeypatch, tmp_path):
    def failing(self, target):
        assert (self / "validation/store.json").is_file()
        raise OSError("no renaming today")

    monkeypatch.setattr(tokens_module.Path, "rename", failing)
    with pytest.raises(OSError, match="no renaming today"):
        prepared({"a": texts})
    assert not list((tmp_path / "cache").iterdir())


def test_a_process_that_finishes_second_takes_the_cache_of_the_first(prepared, texts, monkeypatch, tmp_path):
    tokenise = tokens_module._tokenise

    def slow(*arguments):
        tokenise(*arguments)
        monkeypatch.setattr(tokens_module, "_tokenise", tokenise)
        prepared({"a": texts})

    monkeypatch.setattr(tokens_module, "_tokenise", slow)
    _, stores = prepared({"a": texts})
    assert sorted(texts_of(stores["a"].train) + texts_of(stores["a"].validation)) == sorted(texts)
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.bin"])
def test_a_cache_cut_short_is_refused(prepared, texts, name):
    store = prepared({"a": texts})[1]["a"].train
    os.truncate(store.directory / name, 10)  # the store in hand keeps its mapping, and reads it no more
    with pytest.raises(ValueError, match=f"token cache .* is damaged .*{name} has 10 bytes, not .*: delete it"):
        open_store(store.directory)
    for missing in (name, "store.json"):
        (store.directory / missing).unlink()
        with pytest.raises(ValueError, match=f"is damaged .*{missing}"):
            prepared({"a": texts})


def test_a_store_is_pickled_by_its_place(prepared, texts):
    store = prepared({"a": texts * 20})[1]["a"].train
    assert len(pickle.dumps(store)) < 1000
    copy = pickle.loads(pickle.dumps(store))
    assert copy == store and np.array_equal(copy.tokens, store.tokens)


def test_training_texts_come_from_the_sources_in_turn_without_held_out_documents(prepared, texts):
    config, stores = prepared({"a": texts[:50], "b": texts[50:]})
    found = list(training_texts(config))
    assert sorted(found) == sorted(texts_of(stores["a"].train) + texts_of(stores["b"].train))
    assert [found[i] in texts[50:] for i in range(4)] == [False, True, False, True]


def test_chunks_bound_what_is_held_in_memory(prepared, texts, monkeypatch):
    expected = prepared({"a": texts})[1]["a"].train.tokens.copy()
    monkeypatch.setattr(tokens_module, "_CHUNK_BYTES", 300)
    monkeypatch.setattr(tokens_module, "_FORMAT", 0)
    assert np.array_equal(prepared({"a": texts})[1]["a"].train.tokens, expected)


def test_nothing_is_printed_where_stderr_is_no_terminal(prepared, texts, capfd):
    prepared({"a": texts})
    time.sleep(0.2)
    assert capfd.readouterr() == ("", "")


# ---- conversations ----


def rendered_of(records, **options):
    """What the template makes of each record, in an order of their own."""
    conversations = [chat.Conversation(tuple(record["messages"])) for record in records]
    return sorted(
        (rendered.tokens.tolist(), rendered.supervised.tolist())
        for rendered in chat.render(conversations, TOKENIZER, **options)
    )


def stored_of(*stores):
    return sorted(
        (store.tokens[a:b].tolist(), store.supervised[a:b].tolist())
        for store in stores
        for a, b in zip(store.offsets, store.offsets[1:], strict=False)
    )


def test_a_store_of_conversations_holds_their_ids_and_masks(chats, random_chats):
    records = random_chats(50)
    for turns in ("all", "last"):
        _, stores = chats({"a": records}, {"turns": turns})
        assert stored_of(*stores["a"]) == rendered_of(records, turns=turns)
        for store in stores["a"]:
            assert store.chat and store.supervised.dtype == bool
            assert store.num_bytes == TOKENIZER.byte_lengths_V[store.tokens[store.supervised]].sum()
            assert store.report["format"] == "messages" and store.num_documents > 3


def test_a_store_of_texts_has_no_mask_and_the_fingerprint_that_it_always_had(prepared, texts):
    _, stores = prepared({"a": texts})
    store = stores["a"].train
    assert not store.chat and store.supervised is None and not (store.directory / "supervised.bin").exists()
    content = [1, DocumentSource(str(store.directory.parents[2] / "a.jsonl")).fingerprint, TOKENIZER.fingerprint]
    whole = hashlib.sha256(json.dumps([*content, "document", 0.2]).encode()).hexdigest()
    assert store.fingerprint == hashlib.sha256(f"{whole} train".encode()).hexdigest()


def test_every_option_that_decides_the_tokens_and_the_template_is_another_cache(chats, random_chats, monkeypatch):
    records, found = random_chats(50), []
    for options in (
        {}, {"format": "messages"}, {"packing": "best_fit_truncated"}, {"turns": "last"}, {"response_only": True},
        {"on_error": "skip"}, {"tag": "task"}, {"tag": "task", "balance": 0.5}, {"select": "longest", "keep": 5},
        {"select": "longest", "keep": 6}, {"select": "highest", "keep": 5, "score_field": "score"},
        {"select": "random", "keep": 5}, {"select": "random", "keep": 5, "select_seed": 1},
    ):  # fmt: skip
        found.append(chats({"a": records}, options)[1]["a"].train.fingerprint)
    assert found[0] == found[1] == found[2] and found[6] == found[7]
    monkeypatch.setattr(chat, "JINJA", "another")
    found.append(chats({"a": records})[1]["a"].train.fingerprint)
    assert len(set(found)) == len(found) - 3


def test_what_is_skipped_or_not_selected_is_counted_and_the_held_out_side_stays(chats, random_chats):
    records = random_chats(50)
    _, whole = chats({"a": records})
    everything = [stored_of(store) for store in whole["a"]]
    _, stores = chats({"a": [*records, {"messages": []}]}, {"on_error": "skip", "select": "longest", "keep": 7})
    train, held_out = stores["a"]
    assert stored_of(held_out) == everything[1]
    assert train.num_documents == 7 and train.report["dropped_no_answer"] == 1
    assert train.report["dropped_not_selected"] + 7 == len(everything[0])
    assert all(document in everything[0] for document in stored_of(train))


def test_tasks_lie_one_after_the_other_and_are_counted(chats, random_chats):
    records = random_chats(80)
    _, stores = chats({"a": records}, {"tag": "task"}, validation=0.0)
    store = stores["a"].train
    expected = collections.Counter(record["task"] for record in records)
    assert store.tasks == store.report["tasks"] == dict(sorted(expected.items()))
    parts = store.offsets_of_tasks
    assert list(parts) == ["maths", "prose"] and sum(len(part) - 1 for part in parts.values()) == 80
    for task, part in parts.items():
        found = sorted(store.tokens[a:b].tolist() for a, b in zip(part, part[1:], strict=False))
        assert found == [tokens for tokens, _ in rendered_of([r for r in records if r["task"] == task])]
    _, untagged = chats({"a": records}, validation=0.0)
    assert list(untagged["a"].train.offsets_of_tasks) == [""] and untagged["a"].train.tasks == {}


def test_a_mask_cut_short_is_refused(chats, random_chats):
    store = chats({"a": random_chats(50)})[1]["a"].train
    os.truncate(store.directory / "supervised.bin", 10)
    with pytest.raises(ValueError, match="supervised.bin has 10 bytes, not .*: delete it"):
        open_store(store.directory)


def test_a_tokenizer_may_learn_from_what_conversations_say(chats, random_chats):
    config, stores = chats({"a": random_chats(40)}, {"select": "longest", "keep": 9})
    found = list(training_texts(config))
    assert len(found) == 9
    spelled = [TOKENIZER.decode(tokens) for tokens, _ in stored_of(stores["a"].train)]
    said = [re.sub(r"<\|\w+\|>", "", text) for text in spelled]
    assert sorted(text.replace("\n", "") for text in found) == sorted(text.replace("\n", "") for text in said)


# ---- preferences ----


PREFERENCE = {"format": "preference"}


def units_of(records):
    """What the template makes of both conversations of each record, an end of document after each, the second without
    what comes before its assistant's role, and the unit's numbers.
    """
    found = []
    for record in records:
        asked = {"role": "user", "content": record["prompt"]}
        pair = [
            chat.Conversation((asked, {"role": "assistant", "content": record[name]}))
            for name in ("chosen", "rejected")
        ]
        tokens, marks = [], []
        shared = len(TOKENIZER.encode(record["prompt"])) + 3
        for rendered, taken in zip(chat.render(pair, TOKENIZER), (0, shared), strict=True):
            tokens.append([*rendered.tokens.tolist(), EOS_ID])
            marks += [*rendered.supervised.tolist(), False][taken:]
        differ = next(place for place, (a, b) in enumerate(zip(*tokens, strict=False)) if a != b)
        numbers = (
            shared,
            len(tokens[0]),
            differ,
            np.float32(record["margin"]),
            record["score_chosen"],
            record["score_rejected"],
        )
        found.append((tokens[0] + tokens[1][shared:], marks, tuple(map(float, numbers))))
    return sorted(found)


def stored_units_of(*stores):
    return sorted(
        (
            store.tokens[a:b].tolist(),
            store.supervised[a:b].tolist(),
            tuple(map(float, (*unit.tolist()[:4], *unit["scores"]))),
        )
        for store in stores
        for a, b, unit in zip(store.offsets, store.offsets[1:], store.units, strict=False)
    )


@pytest.mark.parametrize("options", [{}, {"tag": "task"}])
def test_a_store_of_preferences_holds_units_with_what_is_known_of_them(chats, random_preferences, options):
    records = random_preferences(50)
    _, stores = chats({"a": records}, {**PREFERENCE, **options})
    assert stored_units_of(*stores["a"]) == units_of(records)
    for store in stores["a"]:
        assert store.paired and store.chat and len(store.units) == store.num_documents > 3
        assert store.num_bytes == TOKENIZER.byte_lengths_V[store.tokens[store.supervised]].sum()
        assert store.report["format"] == "pairs"
        again = pickle.loads(pickle.dumps(store))
        assert again == store and again.units.tobytes() == store.units.tobytes()


def test_what_is_dropped_of_preferences_is_counted_in_the_store(chats, random_preferences):
    flaws = [
        {"prompt": "q", "chosen": "a", "rejected": "a"},
        {"prompt": "q", "chosen": "a", "rejected": "b", "tie": True},
    ]
    _, stores = chats({"a": [*random_preferences(40), *flaws]}, PREFERENCE)
    report = stores["a"].train.report
    assert (report["dropped_identical"], report["dropped_tie"]) == (1, 1)
    assert stores["a"].train.num_documents + stores["a"].validation.num_documents == 40


def test_a_store_of_others_has_no_units(chats, prepared, random_chats, random_preferences, texts):
    others = [
        prepared({"a": texts})[1]["a"].train,
        chats({"b": random_chats(50)})[1]["b"].train,
        chats({"c": random_preferences(50)}, {**PREFERENCE, "answers": "chosen"})[1]["c"].train,
    ]
    for store in others:
        assert store.units is None and not store.paired and not (store.directory / "units.bin").exists()
        assert "paired" not in json.loads((store.directory / "store.json").read_text())
    assert EOS_ID not in others[2].tokens


def test_units_cut_short_are_refused(chats, random_preferences):
    store = chats({"a": random_preferences(50)}, PREFERENCE)[1]["a"].train
    os.truncate(store.directory / "units.bin", 10)
    with pytest.raises(ValueError, match="units.bin has 10 bytes, not .*: delete it"):
        open_store(store.directory)


def test_every_option_that_decides_the_units_is_another_cache(chats, random_preferences):
    records, found = random_preferences(50), []
    for options in (
        {}, {"format": "pairs"}, {"packing": "best_fit_truncated"}, {"answers": "alone"}, {"answers": "chosen"},
        {"pairs": "best_worst"},
    ):  # fmt: skip
        found.append(chats({"a": records}, {**PREFERENCE, **options})[1]["a"].train.fingerprint)
    assert found[0] == found[1] == found[2] and len(set(found)) == 4


def test_a_tokenizer_may_learn_from_what_preferences_say(chats, random_preferences):
    config, stores = chats({"a": random_preferences(40)}, PREFERENCE)
    found = list(training_texts(config))
    spelled = []
    for tokens, _, (shared, second, *_) in stored_units_of(stores["a"].train):
        first, rest = tokens[: int(second)], tokens[int(second) :]
        spelled.append(TOKENIZER.decode([*first, *first[: int(shared)], *rest]))
    assert sorted(text.replace("\n", "") for text in found) == sorted(
        re.sub(r"<\|\w+\|>", "", text).replace("\n", "") for text in spelled
    )


def test_another_layout_of_units_is_another_cache_of_preferences_alone(chats, random_preferences, monkeypatch):
    def fingerprints():
        stores = [
            chats({"a": random_preferences(50)}, {**PREFERENCE, "answers": each})[1] for each in ("paired", "chosen")
        ]
        return [store["a"].train.fingerprint for store in stores]

    before = fingerprints()
    monkeypatch.setattr(units, "FORMAT", units.FORMAT + 1)
    after = fingerprints()
    assert before[0] != after[0] and before[1] == after[1]


# ---- tokenizers of other people's models ----


def exchange(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_documents_are_between_what_the_tokenizer_says_opens_and_ends_them(theirs, texts, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    config = DataConfig(sources={"a": SourceConfig(str(path))}, sequence_length=16, validation=0.2)
    for name in ("qwen", "llama3"):
        tokenizer = theirs(name)
        store = prepare(config, tokenizer, directory=tmp_path / name)["a"].train
        for tokens in documents_of(store):
            ids = list(tokens)
            opening, text = ids[: len(tokenizer.bos_ids)], ids[len(tokenizer.bos_ids) : -1]
            assert (tuple(opening), ids[-1]) == (tokenizer.bos_ids, tokenizer.eos_id)
            assert tokenizer.encode(tokenizer.decode(text)) == text and tokenizer.decode(text) in texts
        assert store.num_bytes == tokenizer.byte_lengths_V[store.tokens].sum()


def test_conversations_are_stored_as_the_tokenizers_own_template_has_them(chats, theirs):
    asked = [exchange(f"{number}?", f"It is {number}.") for number in range(20)]
    _, stores = chats({"a": [{"messages": messages} for messages in asked]}, tokenizer=theirs("qwen"))
    rendered = chat.render([chat.Conversation(tuple(messages)) for messages in asked], theirs("qwen"))
    expected = {each.tokens.tobytes(): each.supervised.tolist() for each in rendered}
    count = 0
    for store in stores["a"]:
        for start, stop in zip(store.offsets, store.offsets[1:], strict=False):
            tokens = store.tokens[start:stop].astype(np.int32)
            assert store.supervised[start:stop].tolist() == expected[tokens.tobytes()]
            count += 1
    assert count == 20


def test_what_a_template_refuses_is_an_error_or_counted(chats, theirs):
    """This one knows no system turn."""
    good = [{"messages": exchange(f"{number}?", "Yes.")} for number in range(20)]
    bad = [{"messages": [{"role": "system", "content": "s"}, *record["messages"]]} for record in good[:3]]
    with pytest.raises(chat.Malformed, match="refuses the conversation: System role not supported"):
        chats({"a": good + bad}, tokenizer=theirs("gemma"))
    _, stores = chats({"b": [*good[:9], *bad, *good[9:]]}, {"on_error": "skip"}, tokenizer=theirs("gemma"))
    reports = [store.report for store in stores["b"]]
    assert sum(report["num_documents"] for report in reports) == 20
    assert {report["dropped_template"] for report in reports} == {3}
    with pytest.raises(ValueError, match=r"has 3 documents \(dropped: {'template': 3}\), and none for train"):
        chats({"c": bad}, {"on_error": "skip"}, tokenizer=theirs("gemma"))
