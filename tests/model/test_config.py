import pytest


def test_the_layer_pattern_repeats_over_the_depth(tiny):
    config = tiny(num_layers=5, layer_pattern=("local", "global"), sliding_window=4)
    assert config.layer_kinds == ("local", "global", "local", "global", "local")
    assert tiny(num_layers=1, layer_pattern=("nope", "global")).layer_kinds == ("nope",)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(num_kv_heads=3), r"model\.num_heads=4 is not a multiple of model\.num_kv_heads=3"),
        (dict(head_width=7), r"model\.head_width=7 must be even: RoPE rotates pairs"),
        (dict(width=0), r"model\.width=0 must be at least 1"),
        (dict(num_layers=0), r"model\.num_layers=0 must be at least 1"),
        (dict(loss_chunk=0), r"model\.loss_chunk=0 must be at least 1"),
        (dict(norm_eps=-1.0), r"model\.norm_eps=-1\.0 must not be negative"),
        (dict(attention_scale=float("nan")), r"model\.attention_scale=nan must not be negative"),
        (dict(logit_soft_cap=-1.0), r"model\.logit_soft_cap=-1\.0 must not be negative"),
        (dict(unroll=-1), r"model\.unroll=-1 must be at least 1, or 0 to unroll all layers"),
        (dict(vocab_size=-1), r"model\.vocab_size=-1 must be at least 1, or 0 to take the tokenizer's"),
        (dict(dropout=1.0), r"model\.dropout=1\.0 must be in \[0, 1\)"),
        (dict(layer_pattern=("globl",)), r"'globl' must be one of \('global', 'local', 'nope', 'local_nope'\)"),
        (dict(layer_pattern=()), r"model\.layer_pattern=\(\) must name at least one layer kind"),
        (
            dict(layer_pattern=("local",)),
            r"model\.sliding_window=0 must be at least 1 where model\.layer_pattern has 'local'",
        ),
        (
            dict(layer_pattern=("global", "local_nope")),
            r"model\.sliding_window=0 .* model\.layer_pattern has 'local_nope'",
        ),
        (dict(pre_norm=False), r"model\.pre_norm and model\.post_norm are both False"),
        (dict(activation="relu"), r"model\.activation='relu' must be one of \('silu', 'gelu', 'gelu_tanh'\)"),
        (dict(qk_norm="every"), r"model\.qk_norm='every' must be one of"),
        (dict(activation_dtype="float16"), r"model\.activation_dtype='float16' must be one of"),
        (dict(operand_dtype="float64"), r"model\.operand_dtype='float64' must be one of"),
        (dict(attention="flash"), r"model\.attention='flash' must be one of"),
        (dict(remat="some"), r"model\.remat='some' must be one of"),
    ],
)
def test_wrong_values_are_named_with_the_mend(tiny, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_a_vocabulary_of_zero_takes_the_tokenizers_and_a_smaller_one_is_refused(tiny):
    assert tiny(vocab_size=0).with_vocabulary(288).vocab_size == 288
    assert tiny(vocab_size=300).with_vocabulary(288).vocab_size == 300
    with pytest.raises(ValueError, match=r"model\.vocab_size=40 is smaller than the tokenizer's 288"):
        tiny().with_vocabulary(288)
