"""Small corpora on disk, and the tokens of them."""

import json
import random

import pytest

from jaxllm.data.config import DataConfig, SourceConfig
from jaxllm.data.tokens import prepare
from jaxllm.text.tokenizer import byte_tokenizer


def write_records(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_jsonl(path, texts):
    return write_records(path, [{"text": text} for text in texts])


def _random_documents(count, *, longest=60, seed=0):
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdé ▁\n", k=draw.randint(1, longest))) + f"#{index}" for index in range(count)]


@pytest.fixture
def random_documents():
    """A function: how many, longest=60, seed=0 -> distinct texts."""
    return _random_documents


@pytest.fixture
def texts():
    return _random_documents(80)


@pytest.fixture
def prepared(tmp_path):
    """A function: texts by source name, and fields of DataConfig -> (config, stores)."""

    def prepared(sources, weights=None, **fields):
        configs = {
            name: SourceConfig(
                str(write_jsonl(tmp_path / f"{name}.jsonl", texts)), weights=(weights or {}).get(name, (1.0,))
            )
            for name, texts in sources.items()
        }
        fields = {"sequence_length": 16, "validation": 0.2, **fields}
        config = DataConfig(sources=configs, **fields)
        return config, prepare(config, byte_tokenizer(), directory=tmp_path / "cache")

    return prepared


def _random_chats(count, *, longest=30, seed=0):
    draw = random.Random(seed)

    def said(tail):
        return "".join(draw.choices("abcdé ▁\n", k=draw.randint(0, longest))) + tail

    return [
        {
            "messages": [
                *({"role": "user", "content": said(f"?{index}")}, {"role": "assistant", "content": said("!")})
                * draw.randint(1, 2)
            ],
            "task": draw.choice(["maths", "prose", "prose", "prose"]),
            "score": draw.random(),
        }
        for index in range(count)
    ]


@pytest.fixture
def random_chats():
    """A function: how many, longest=30, seed=0 -> records of distinct conversations of one or two turns."""
    return _random_chats


def _random_preferences(count, *, longest=30, seed=0):
    draw = random.Random(seed)

    def said(tail):
        return "".join(draw.choices("abcdé ▁\n", k=draw.randint(0, longest))) + tail

    return [
        {
            "prompt": f"{index // 2}?",
            "chosen": said(f"!{index}"),
            "rejected": said(f".{index}"),
            "score_chosen": 1 + draw.randint(1, 4),
            "score_rejected": 1,
            "margin": draw.random(),
            "task": draw.choice(["maths", "prose"]),
        }
        for index in range(count)
    ]


@pytest.fixture
def random_preferences():
    """A function: how many, longest=30, seed=0 -> records of pairs of distinct answers, two of them to each prompt."""
    return _random_preferences


@pytest.fixture
def chats(tmp_path):
    """A function: records by source name, fields of each SourceConfig, fields of DataConfig -> (config, stores)."""

    def chats(sources, source=None, tokenizer=None, **fields):
        configs = {
            name: SourceConfig(
                str(write_records(tmp_path / f"{name}.jsonl", records)), **{"format": "auto", **(source or {})}
            )
            for name, records in sources.items()
        }
        fields = {"sequence_length": 64, "validation": 0.2, "packing": "best_fit_whole", **fields}
        config = DataConfig(sources=configs, **fields)
        return config, prepare(config, tokenizer or byte_tokenizer(), directory=tmp_path / "cache")

    return chats


def _answers_of(row):
    places = {}
    for place, number in enumerate(row["segments_BT"].tolist()):
        if number:
            places.setdefault(number, []).append(place)
    prompts = {number for number in places if number < 0}
    parents = {number: set(row["parents_BT"][own].tolist()) for number, own in places.items()}
    continued = {number: prompt if (prompt := -((number + 1) // 2)) in prompts else number for number in places}
    assert parents == {number: {number if number < 0 else continued[number]} for number in places}
    assert not row["parents_BT"][row["segments_BT"] == 0].any()
    assert all({-2 * number - 1, -2 * number} <= places.keys() for number in prompts), "a prompt of fewer than two"
    found = {}
    for number, own in places.items():
        assert own == list(range(own[0], own[-1] + 1)), "a segment in two places"
        if number < 0:
            assert not any(row[name][own].any() for name in ("mask_BT", "score_BT", "margin_BT"))
            continue
        read = own if continued[number] == number else places[continued[number]] + own
        assert row["positions_BT"][read].tolist() == list(range(len(read)))
        inputs, targets = (row[name][read].tolist() for name in ("tokens_BT", "targets_BT"))
        learned = row["targets_BT"][own][row["mask_BT"][own]].tolist()
        found[number] = inputs, targets, learned, *(row[name][own].tolist() for name in ("score_BT", "margin_BT"))
    return found


@pytest.fixture
def answers_of():
    """A function: a row of preferences -> {segment of an answer: (inputs and targets, those of its prompt included,
    supervised targets, scores, margins)}, in plain loops; it checks parents and positions.
    """
    return _answers_of
