"""One trained tokenizer for all tests of text."""

import pydoc_data.topics

import pytest

from jaxllm.text.tokenizer import byte_tokenizer, train

TOPICS = tuple(pydoc_data.topics.topics.values())


@pytest.fixture(scope="session")
def topics():
    return TOPICS


@pytest.fixture(scope="session")
def pieces():
    return train(TOPICS[:20], vocab_size=700)


@pytest.fixture(scope="session", params=["bytes", "sentencepiece"])
def tokenizer(request, pieces):
    return byte_tokenizer() if request.param == "bytes" else pieces
