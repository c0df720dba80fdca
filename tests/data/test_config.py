import pytest

from jaxllm.data import config as config_module
from jaxllm.data import conversations, examples, packing, preferences, selection
from jaxllm.data.config import DataConfig, SourceConfig
from jaxllm.text import chat

ONE = {"a": SourceConfig("a.txt")}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sequence_length": 1}, "sequence_length=1 is too short: a row needs at least 2 targets"),
        ({"sources": {}}, "leaves nothing to read"),
        (
            {"packing": "dense"},
            r"packing='dense' is not one of \('concatenated', 'best_fit', 'best_fit_whole', 'best_fit_truncated'\)",
        ),
        ({"split": "middle"}, r"split='middle' is not one of \('document', 'tail'\)"),
        ({"validation": 1.0}, "validation=1.0 is a share: 0 or more, and less than 1"),
        ({"validation": -0.1}, "validation=-0.1"),
        ({"workers": -1}, "workers=-1.* are 0 or more"),
        ({"prefetch": -1}, "prefetch=-1"),
        ({"shuffle_seed": -1}, "shuffle_seed=-1"),
        ({"stage_steps": (5,)}, r"stage_steps=\(5,\) must start at 0 and rise"),
        ({"stage_steps": ()}, r"stage_steps=\(\) must start at 0"),
        ({"stage_steps": (0, 9, 9)}, "must start at 0 and rise"),
        ({"stage_steps": (0, 9)}, r"source 'a' has 1 weights for 2 stages: weights=\(1.0,\), stage_steps=\(0, 9\)"),
        ({"sources": {"a": SourceConfig("a.txt", weights=(0.0,))}}, "stage that starts at step 0 is 0: raise one"),
    ],
)
def test_a_value_that_makes_no_sense_is_named_with_the_mend(fields, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**{"sources": ONE, **fields})


def test_a_source_needs_a_path_and_weights_that_are_numbers():
    with pytest.raises(ValueError, match="path='' names no source: give a file"):
        SourceConfig("")
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="a weight is a finite number"):
            SourceConfig("a.txt", weights=(weight,))


def test_sources_may_come_as_mappings_of_their_fields():
    config = DataConfig(sources={"a": {"path": "a.txt", "weights": [1, 2]}}, stage_steps=[0, 3])
    assert config.sources["a"] == SourceConfig("a.txt", weights=(1, 2)) and config.stage_steps == (0, 3)
    with pytest.raises(TypeError, match="feild"):
        DataConfig(sources={"a": {"path": "a.txt", "feild": "text"}})


def test_each_name_that_a_config_may_hold_is_a_function():
    assert set(config_module.PACKINGS) == set(packing.PLANS)
    assert set(config_module.SPLITS) == set(examples.SPLITS)
    assert set(config_module.PREFERENCES) == {"preference"} | set(preferences.FORMATS)
    chats = {"auto"} | set(conversations.FORMATS)
    assert set(config_module.FORMATS) == {"text"} | chats | set(config_module.PREFERENCES)
    assert set(config_module.PAIRS) == set(preferences.PAIRS)
    assert set(config_module.ANSWERS) == set(examples.CONTENTS)
    assert set(config_module.TURNS) == set(chat.TURNS)
    assert set(config_module.SELECTIONS) == {"all"} | set(selection.CHOICES)
    assert set(config_module.WHOLE) <= set(config_module.PACKINGS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"format": "json"},
            r"format='json' is not one of \('text', 'auto', 'messages', 'alpaca', 'sharegpt', 'prompt_",
        ),
        ({"turns": "first", "format": "auto"}, r"turns='first' is not one of \('all', 'last'\)"),
        ({"turns": "last"}, "turns='last' and response_only=False of a are of conversations: set format to 'auto'"),
        ({"response_only": True}, "response_only=True of a are of conversations"),
        ({"format": "preference", "response_only": True}, "response_only=True of a: a preference is between answers"),
        ({"format": "pairs", "pairs": "some"}, r"pairs='some' is not one of \('all', 'best_worst'\)"),
        ({"format": "thumbs", "answers": "both"}, r"answers='both' is not one of \('paired', 'alone', 'chosen'\)"),
        ({"format": "auto", "answers": "alone"}, "answers='alone' of a are of preferences: set format to 'preference'"),
        ({"pairs": "best_worst"}, "pairs='best_worst' and answers='paired' of a are of preferences: .*, not 'text'"),
        ({"on_error": "ignore"}, r"on_error='ignore' is not one of \('raise', 'skip'\)"),
        ({"packing": "dense"}, "packing='dense' is not one of"),
        ({"select": "best"}, r"select='best' is not one of \('all', 'longest'"),
        ({"select": "longest"}, "keep=0.0 with select='longest' of a: a whole number, or a share below 1"),
        ({"keep": 3}, "keep=3 with select='all' of a: .*0 with 'all'"),
        ({"select": "longest", "keep": 1.5}, "keep=1.5 with select='longest'"),
        ({"select": "longest", "keep": -1}, "keep=-1 with select='longest'"),
        ({"select": "highest", "keep": 3}, "score_field='' with select='highest' of a: 'highest' and 'lowest' need"),
        ({"select": "random", "keep": 3, "score_field": "s"}, "score_field='s' with select='random'"),
        ({"balance": 0.5}, "balance=0.5 with tag='' of a: 0 or more, with a tag"),
        ({"tag": "t", "balance": -1.0}, "balance=-1.0 with tag='t'"),
    ],
)
def test_an_option_of_a_source_that_makes_no_sense_is_named_with_the_mend(fields, message):
    with pytest.raises(ValueError, match=message):
        SourceConfig("a", **fields)


@pytest.mark.parametrize("packing", ["concatenated", "best_fit"])
def test_conversations_are_never_cut_in_the_middle(packing):
    chats = SourceConfig("a.jsonl", format="auto")
    with pytest.raises(
        ValueError, match=f"source 'a' holds conversations, which packing='{packing}' cuts in the middle"
    ):
        DataConfig(sources={"a": chats}, packing=packing)
    own = SourceConfig("a.jsonl", format="auto", packing="best_fit_truncated")
    config = DataConfig(sources={"a": own, "b": SourceConfig("b.txt")}, packing=packing)
    assert config.packing_of("a") == "best_fit_truncated" and config.packing_of("b") == packing


def test_the_tail_of_conversations_cannot_be_held_out():
    fields = dict(format="auto", packing="best_fit_whole")
    with pytest.raises(ValueError, match="source 'a' holds conversations, of which split='tail' holds out none"):
        DataConfig(sources={"a": SourceConfig("a.jsonl", **fields)}, split="tail")
    DataConfig(sources={"a": SourceConfig("a.jsonl", validation_path="b.jsonl", **fields)}, split="tail")


def test_rows_of_preferences_are_mixed_with_no_others():
    def mixed(*sources):
        named = {f"s{i}": SourceConfig("a.jsonl", **fields) for i, fields in enumerate(sources)}
        return DataConfig(sources=named, packing="best_fit_whole")

    pairs, alone = {"format": "preference"}, {"format": "pairs", "answers": "alone"}
    chosen, chats, texts = {"format": "pairs", "answers": "chosen"}, {"format": "auto"}, {}
    for some in ((pairs, chats), (pairs, texts), (alone, pairs), (chosen, pairs)):
        with pytest.raises(
            ValueError, match=r"sources \['s0', 's1'\] mix \[.*\], whose rows differ: give them to runs"
        ):
            mixed(*some)
    assert [each.is_preference for each in mixed(pairs, {"format": "thumbs"}).sources.values()] == [True, True]
    assert [each.is_preference for each in mixed(chosen, chats, texts).sources.values()] == [False] * 3
    assert all(SourceConfig("a", **fields).is_chat for fields in (pairs, alone, chosen, chats))
