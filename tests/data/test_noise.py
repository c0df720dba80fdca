import random
import re
from collections import Counter

import pytest

from jaxllm.data import minhash, world
from jaxllm.data.noise import KINDS, LONG, noise

WORLD = world.create(0)
LIVES = list(world.documents(WORLD.asked, seed=0, biographies=5))


def of(kind, documents=LIVES, seed=0, share=0.5):
    return [record["text"] for record in noise(documents, seed=seed, share=share) if record["noise"] == kind]


@pytest.mark.parametrize("share", [0.0, 0.15, 0.5])
def test_mixed_with_the_documents_it_is_the_share_of_all_and_each_kind_is_as_often(share):
    counts = Counter(record["noise"] for record in noise(LIVES, seed=0, share=share))
    assert counts.total() / (counts.total() + len(LIVES)) == pytest.approx(share, abs=0.01)
    if share:
        assert set(counts) == set(KINDS) and max(counts.values()) - min(counts.values()) <= 1


def test_a_seed_decides_everything_and_another_one_changes_it():
    first, again, other = (list(noise(iter(LIVES), seed=seed, share=0.2)) for seed in (3, 3, 4))
    assert first == again != other and len(first) == len(other)
    random.seed(0)
    drawn = random.random()
    random.seed(0)
    list(noise(LIVES, seed=3, share=0.2))
    assert random.random() == drawn, "the common generator was used"


def test_repeated_characters_are_most_of_their_text():
    for text in of("repeated_characters"):
        run = max((match[0] for match in re.finditer(r"(.{1,4}?)\1{9,}", text)), key=len)
        assert len(run) > len(text) / 2


def test_most_of_the_repeated_lines_were_there_before():
    for text in of("repeated_lines"):
        lines = [line for line in text.split("\n") if line]
        assert len(lines) >= 4 and len(set(lines)) <= 2


def test_boilerplate_says_nothing_of_the_documents_and_names_nothing_unfilled():
    texts = of("boilerplate")
    names = {person.name for person in WORLD.asked}
    assert not any(name in text for name in names for text in texts) and not any(set("{}") & set(t) for t in texts)
    assert len(set(texts)) > 0.9 * len(texts)


def test_markup_is_rather_signs_than_words():
    for text in of("markup"):
        assert sum(character.isalpha() for character in text) < 0.75 * len(text) and "<" in text and "class=" in text


def test_copies_are_of_the_documents_and_near_ones_differ_a_little():
    texts = {record["text"] for record in LIVES}
    assert set(of("exact_copy")) <= texts
    known = [minhash.runs(text) for text in texts]
    near = of("near_copy")
    assert not set(near) & texts and len({text.count("\n") for text in near}) == 2
    for text in near:
        assert max(minhash.resemblance(minhash.runs(text), runs) for runs in known) > 0.75


def test_near_copies_are_of_long_documents_where_there_are_some():
    short = [{"text": f"{number} is short."} for number in range(50)]
    assert all(len(text.split()) >= LONG - 1 for text in of("near_copy", [*short, *LIVES[:50]]))
    assert len(of("near_copy", short)) == 50 // len(KINDS)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_that_is_none_is_named(share):
    with pytest.raises(ValueError, match=f"share={share} of all documents cannot be noise: it must be at least 0"):
        list(noise(LIVES, seed=0, share=share))
