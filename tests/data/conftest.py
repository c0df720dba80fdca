"""Small corpora on disk, and the tokens of them."""

import json
import random

import pytest

from jaxllm.data.config import DataConfig, SourceConfig
from jaxllm.data.tokens import prepare
from jaxllm.text.tokenizer import byte_tokenizer


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


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
