import hashlib
import subprocess
import sys

import pytest

from jaxllm.data import embedded


@pytest.mark.slow
def test_the_embedded_corpus_is_millions_of_bytes_of_prose_and_the_same_on_every_run():
    documents = embedded.documents()
    assert sum(len(text.encode()) for text in documents) > 2_000_000 and len(documents) > 300
    digest = hashlib.sha256("\0".join(documents).encode()).hexdigest()
    program = "import hashlib; from jaxllm.data.embedded import documents as d;" + (
        "print(hashlib.sha256('\\0'.join(d()).encode()).hexdigest())"
    )
    again = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True)
    assert again.stdout.strip() == digest


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A standard library of our own; a function that adds files to it."""
    monkeypatch.setattr(embedded.sysconfig, "get_path", lambda name: str(tmp_path))
    embedded.documents.cache_clear()

    def add(name, source):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source, encoding="utf-8")

    yield add
    embedded.documents.cache_clear()


LONG = "This sentence is long enough to be taken for prose by the filter"


def test_docstrings_and_comments_come_in_the_order_of_the_file(library):
    library(
        "a.py",
        f'"""{LONG} one."""\n# {LONG} two,\n# and on.\nclass A:\n    """{LONG} three."""\n\n'
        f'    def f(self):\n        """{LONG} four."""\n',
    )
    assert embedded.documents() == (f"{LONG} one.\n\n{LONG} two,\nand on.\n\n{LONG} three.\n\n{LONG} four.",)


def test_no_passage_appears_twice(library):
    library("a.py", f'"""{LONG}."""\ndef f():\n    """{LONG}."""\n')
    library("b.py", f'"""{LONG}."""\ndef f():\n    """{LONG} again."""\n')
    library("c.py", f'"""{LONG}."""\n')
    assert embedded.documents() == (f"{LONG}.", f"{LONG} again.")


def test_topics_are_documents_of_their_own(library):
    library("pydoc_data/topics.py", "# made by a tool,\n# on a day\ntopics = {'a': 'short\\n', 'b': 'other'}\n")
    assert embedded.documents() == ("short\n", "other")


def test_tests_packages_code_and_broken_files_are_left_out(library):
    library("test/a.py", f'"""{LONG}."""\n')
    library("site-packages/a.py", f'"""{LONG}."""\n')
    library("b.py", f'"""{LONG}.')
    library("c.py", "# x = [(1, 2), (3, 4), (5, 6), (7, 8)]; y = {1: 2}\n# z = [(1, 2), (3, 4), (5, 6), (7, 8)]\n")
    library("d.py", '"""Short."""\n')
    assert embedded.documents() == ()
