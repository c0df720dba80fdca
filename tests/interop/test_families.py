import collections
import json
import runpy
from pathlib import Path

import ml_collections
import numpy as np
import pytest

from configs import architectures, common
from jaxllm.configure import section
from jaxllm.interop import families
from jaxllm.interop.families import FAMILIES, Tensor
from jaxllm.model import DecoderConfig
from jaxllm.model.config import COMPUTATION

MAKER = runpy.run_path(str(Path(__file__).with_name("make_golden.py")))
SIZES = dict(vocab_size=99, hidden_size=32, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4)
LLAMA = SIZES | dict(model_type="llama", num_key_value_heads=2)
# What transformers leaves to its defaults.
YARN = collections.defaultdict(dict, qwen2_yarn=dict(beta_fast=32.0, beta_slow=1.0))
PUBLISHED = {
    "llama3_8b": "llama",
    "llama3_2_1b": "llama",
    "mistral_7b": "mistral",
    "qwen2_7b": "qwen2",
    "qwen2_5_0_5b": "qwen2",
    "qwen3_0_6b": "qwen3",
    "smollm2_135m": "llama",
    "gemma2_2b": "gemma2",
    "gemma3_1b": "gemma3_text",
    "olmo2_1b": "olmo2",
}
# The files that lie beside the published weights, in the spelling of their day.
FILES = {
    "llama3_2_1b": dict(
        architectures=["LlamaForCausalLM"], attention_bias=False, attention_dropout=0.0, bos_token_id=128000,
        eos_token_id=128001, head_dim=64, hidden_act="silu", hidden_size=2048, initializer_range=0.02,
        intermediate_size=8192, max_position_embeddings=131072, mlp_bias=False, model_type="llama",
        num_attention_heads=32, num_hidden_layers=16, num_key_value_heads=8, pretraining_tp=1, rms_norm_eps=1e-05,
        rope_scaling=dict(
            factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0, original_max_position_embeddings=8192,
            rope_type="llama3",
        ),
        rope_theta=500000.0, tie_word_embeddings=True, torch_dtype="bfloat16", transformers_version="4.45.0.dev0",
        use_cache=True, vocab_size=128256,
    ),
    "smollm2_135m": dict(
        architectures=["LlamaForCausalLM"], attention_bias=False, attention_dropout=0.0, bos_token_id=1, eos_token_id=2,
        hidden_act="silu", hidden_size=576, initializer_range=0.041666666666666664, intermediate_size=1536,
        is_llama_config=True, max_position_embeddings=8192, mlp_bias=False, model_type="llama", num_attention_heads=9,
        num_hidden_layers=30, num_key_value_heads=3, pad_token_id=2, pretraining_tp=1, rms_norm_eps=1e-05,
        rope_interleaved=False, rope_scaling=None, rope_theta=100000, tie_word_embeddings=True, torch_dtype="bfloat16",
        use_cache=True, vocab_size=49152, **{"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}},
    ),
    "mistral_7b": dict(
        architectures=["MistralForCausalLM"], bos_token_id=1, eos_token_id=2, hidden_act="silu", hidden_size=4096,
        initializer_range=0.02, intermediate_size=14336, max_position_embeddings=32768, model_type="mistral",
        num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8, rms_norm_eps=1e-05, rope_theta=10000.0,
        sliding_window=4096, tie_word_embeddings=False, torch_dtype="bfloat16", use_cache=True, vocab_size=32000,
    ),
    "qwen2_5_0_5b": dict(
        architectures=["Qwen2ForCausalLM"], attention_dropout=0.0, bos_token_id=151643, eos_token_id=151643,
        hidden_act="silu", hidden_size=896, initializer_range=0.02, intermediate_size=4864,
        max_position_embeddings=32768, max_window_layers=24, model_type="qwen2", num_attention_heads=14,
        num_hidden_layers=24, num_key_value_heads=2, rms_norm_eps=1e-06, rope_theta=1000000.0, sliding_window=32768,
        tie_word_embeddings=True, torch_dtype="bfloat16", use_cache=True, use_mrope=False, use_sliding_window=False,
        vocab_size=151936,
    ),
    "qwen3_0_6b": dict(
        architectures=["Qwen3ForCausalLM"], attention_bias=False, attention_dropout=0.0, bos_token_id=151643,
        eos_token_id=151645, head_dim=128, hidden_act="silu", hidden_size=1024, intermediate_size=3072,
        max_position_embeddings=40960, max_window_layers=28, model_type="qwen3", num_attention_heads=16,
        num_hidden_layers=28, num_key_value_heads=8, rms_norm_eps=1e-06, rope_scaling=None, rope_theta=1000000,
        sliding_window=None, tie_word_embeddings=True, use_sliding_window=False, vocab_size=151936,
    ),
    "gemma2_2b": dict(
        architectures=["Gemma2ForCausalLM"], attention_bias=False, attn_logit_softcapping=50.0, bos_token_id=2,
        cache_implementation="hybrid", eos_token_id=1, final_logit_softcapping=30.0, head_dim=256,
        hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh", hidden_size=2304,
        intermediate_size=9216, max_position_embeddings=8192, model_type="gemma2", num_attention_heads=8,
        num_hidden_layers=26, num_key_value_heads=4, pad_token_id=0, query_pre_attn_scalar=256, rms_norm_eps=1e-06,
        rope_theta=10000.0, sliding_window=4096, sliding_window_size=4096, torch_dtype="float32", vocab_size=256000,
    ),
    "gemma3_1b": dict(
        architectures=["Gemma3ForCausalLM"], attention_bias=False, attn_logit_softcapping=None,
        cache_implementation="hybrid", eos_token_id=[1, 106], final_logit_softcapping=None, head_dim=256,
        hidden_activation="gelu_pytorch_tanh", hidden_size=1152, intermediate_size=6912, max_position_embeddings=32768,
        model_type="gemma3_text", num_attention_heads=4, num_hidden_layers=26, num_key_value_heads=1,
        query_pre_attn_scalar=256, rms_norm_eps=1e-06, rope_local_base_freq=10000, rope_scaling=None,
        rope_theta=1000000, sliding_window=512, sliding_window_pattern=6, torch_dtype="bfloat16", vocab_size=262144,
    ),
    "olmo2_1b": dict(
        architectures=["Olmo2ForCausalLM"], attention_bias=False, attention_dropout=0.0, eos_token_id=100257,
        hidden_act="silu", hidden_size=2048, intermediate_size=8192, max_position_embeddings=4096, model_type="olmo2",
        num_attention_heads=16, num_hidden_layers=16, num_key_value_heads=16, pad_token_id=100277, rms_norm_eps=1e-06,
        rope_scaling=None, rope_theta=500000, tie_word_embeddings=False, torch_dtype="float32", vocab_size=100352,
    ),
}  # fmt: skip


def published(name: str) -> DecoderConfig:
    """A decoder of configs/architectures.py, computed as families say."""
    values = getattr(architectures, name)().to_dict()
    return families.decoder({key: x for key, x in values.items() if key not in COMPUTATION})


def test_how_a_model_is_computed_is_said_exactly():
    assert set(families.COMPUTED) == set(COMPUTATION)
    assert families.COMPUTED["operand_dtype"] == families.COMPUTED["activation_dtype"] == "float32"
    values = families.read(LLAMA)[1]
    assert set(values) == {*common.llama().to_dict()} - {*COMPUTATION}
    assert families.decoder(values, operand_dtype="bfloat16").operand_dtype == "bfloat16"
    section(DecoderConfig, ml_collections.ConfigDict(common.llama(**values)))


@pytest.mark.parametrize("name", FILES)
def test_a_published_file_is_the_architecture_of_that_name(name):
    family, values = families.read(FILES[name])
    found = families.decoder(values)
    assert family.name == PUBLISHED[name]
    assert families._differences(found, published(name)) == {}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_architecture_is_written_in_its_family_and_read_again(name):
    config = published(name)
    family, fields = families.write(config)
    assert family.name == PUBLISHED[name]
    again, values = families.read(fields | dict(model_type=family.name))
    assert again is family
    assert families._differences(families.decoder(values), config) == {}


@pytest.mark.parametrize("case", MAKER["CASES"])
def test_what_is_written_of_a_model_says_what_transformers_said_of_it(case):
    theirs = json.loads((MAKER["GOLDEN"] / f"hf_{case}.json").read_text())["config"]
    family, values = families.read(theirs)
    assert family.name == theirs["model_type"]
    written = family.write(families.decoder(values))
    assert {**theirs["rope_parameters"], **written.pop("rope_parameters")} == theirs["rope_parameters"] | YARN[case]
    shared = {key for key in written if key in theirs} - {"max_window_layers"}
    assert len(shared) >= 10
    assert {key: written[key] for key in shared} == {key: theirs[key] for key in shared}


def test_the_text_model_of_gemma_3_has_the_defaults_that_its_file_leaves_out():
    # As google/gemma-3-4b-it has it.
    text = dict(
        model_type="gemma3_text", hidden_size=2560, intermediate_size=10240, num_hidden_layers=34, sliding_window=1024,
        rope_scaling=dict(factor=8.0, rope_type="linear"),
    )  # fmt: skip
    tokens = dict(boi_token_index=255999, eoi_token_index=256000, image_token_index=262144, mm_tokens_per_image=256)
    ids = dict(eos_token_id=[1, 106], torch_dtype="bfloat16", initializer_range=0.02)
    nested = dict(model_type="gemma3", text_config=text, vision_config=dict(hidden_size=1152)) | tokens | ids
    family, values = families.read(nested)
    config = families.decoder(values)
    assert family.name == "gemma3_text" and config.tied_head and config.vocab_size == 262208
    assert (config.num_heads, config.num_kv_heads, config.head_width) == (8, 4, 256)
    assert config.layer_kinds[4:7] == ("local", "global", "local") and config.layer_kinds.count("global") == 5
    assert (config.rope.scaling, config.rope.factor) == ("linear", 8.0)
    assert (config.rope.theta, config.rope.local_theta) == (1000000.0, 10000.0)
    with pytest.raises(ValueError, match="has quantization_config="):
        families.read(nested | dict(quantization_config=dict(bits=4)))


def test_layers_without_positions_are_every_fourth_of_smollm_3_unless_it_says_which():
    config = dict(SIZES, model_type="smollm3", num_hidden_layers=8, max_window_layers=28, pretraining_tp=2)
    kinds = lambda **changes: families.decoder(families.read(config | changes)[1]).layer_kinds  # noqa: E731
    assert kinds() == 2 * ("global", "global", "global", "nope")
    assert kinds(no_rope_layer_interval=2) == 4 * ("global", "nope")
    assert kinds(no_rope_layers=[0] + 7 * [1]) == ("nope", *7 * ("global",))
    assert kinds(use_sliding_window=True, sliding_window=4)[2:5] == ("global", "local_nope", "global")


def test_windows_of_qwen_and_gemma_are_of_the_layers_that_the_file_names():
    kinds = lambda **said: families.decoder(families.read(LLAMA | said)[1]).layer_kinds  # noqa: E731
    qwen = dict(model_type="qwen3", sliding_window=4, max_window_layers=3)
    assert kinds(**qwen) == 4 * ("global",)
    assert kinds(**qwen, use_sliding_window=True) == (*3 * ("global",), "local")
    types = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    assert kinds(**qwen, use_sliding_window=True, layer_types=types) == ("local", "global", "global", "local")
    assert kinds(model_type="gemma2") == 2 * ("local", "global")
    assert kinds(model_type="gemma2", layer_types=types) == ("local", "global", "global", "local")
    assert kinds(model_type="gemma3_text", sliding_window_pattern=3) == ("local", "local", "global", "local")
    assert kinds(model_type="mistral") == 4 * ("local",)
    assert kinds(model_type="mistral", sliding_window=None) == 4 * ("global",)


@pytest.mark.parametrize(
    "name, norm_eps, num_kv_heads, head_width, tied_head, theta, local_theta, sliding_window, caps",
    [
        ("llama", 1e-6, 32, 2, False, 1e4, 0.0, 0, (0.0, 0.0)),
        ("mistral", 1e-6, 8, 2, False, 1e4, 0.0, 4096, (0.0, 0.0)),
        ("qwen2", 1e-6, 32, 2, False, 1e4, 0.0, 0, (0.0, 0.0)),
        ("qwen3", 1e-6, 32, 128, False, 1e4, 0.0, 0, (0.0, 0.0)),
        ("smollm3", 1e-6, 4, 2, True, 2e6, 0.0, 0, (0.0, 0.0)),
        ("olmo2", 1e-5, 32, 2, False, 1e4, 0.0, 0, (0.0, 0.0)),
        ("gemma2", 1e-6, 4, 256, True, 1e4, 0.0, 4096, (50.0, 30.0)),
        ("gemma3_text", 1e-6, 4, 256, True, 1e6, 1e4, 4096, (0.0, 0.0)),
    ],
)
def test_a_field_that_is_left_out_has_the_default_of_its_class_in_transformers(
    name, norm_eps, num_kv_heads, head_width, tied_head, theta, local_theta, sliding_window, caps
):
    values = families.read(SIZES | dict(model_type=name, hidden_size=64, num_attention_heads=32))[1]
    expected = dict(norm_eps=norm_eps, num_kv_heads=num_kv_heads, head_width=head_width, tied_head=tied_head)
    expected |= dict(sliding_window=sliding_window, attention_soft_cap=caps[0], logit_soft_cap=caps[1])
    expected |= dict(activation="gelu_tanh" if "gemma" in name else "silu", qkv_bias=name == "qwen2")
    assert {key: values[key] for key in expected} == expected
    assert (values["rope"]["theta"], values["rope"]["local_theta"]) == (theta, local_theta)


def test_older_and_newer_rope_fields_are_the_same():
    rope = lambda **said: families.read(LLAMA | said)[1]["rope"]  # noqa: E731
    newer = dict(rope_type="linear", factor=4.0, rope_theta=500.0)
    expected = rope(rope_parameters=newer)
    assert (expected["theta"], expected["scaling"], expected["factor"]) == (500.0, "linear", 4.0)
    older = dict(type="linear", factor=4)
    assert rope(rope_scaling=older, rope_theta=500) == expected
    assert rope(rope_scaling=older, rope_theta=500, rope_parameters=newer) == expected
    assert rope()["theta"] == rope(rope_scaling=dict(rope_type="default"))["theta"] == 10000.0
    yarn = dict(rope_type="yarn", factor=4.0)
    found = rope(rope_scaling=yarn | dict(attention_factor=1.1386294361119891), max_position_embeddings=64)
    assert (found["original_length"], found["low_frequency"], found["high_frequency"]) == (64, 1.0, 32.0)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model_type="phi3"), r"model_type='phi3'; known are \['gemma2', 'gemma3', 'gemma3_text', 'llama'"),
        (dict(model_type="mixtral", num_local_experts=8), "model_type='mixtral'"),
        (dict(hidden_act="relu2"), r"hidden_act='relu2'; known are \['gelu'"),
        (dict(head_dim=None, hidden_size=33), "hidden_size=33, which is not a multiple of num_attention_heads=4"),
        (dict(num_key_value_heads=3), r"model\.num_heads=4 is not a multiple of model\.num_kv_heads=3"),
        (dict(head_dim=7), r"model\.head_width=7 must be even"),
        (dict(rope_scaling=dict(type="dynamic", factor=2.0)), r"rope type 'dynamic'; known are \['default', 'linear'"),
        (dict(rope_parameters=dict(rope_type="longrope", short_factor=[1.0])), "rope type 'longrope'"),
        (dict(rope_scaling=dict(type="linear")), r"rope type 'linear' without \['factor'\]"),
        (dict(rope_scaling=dict(rope_type="llama3", factor=8.0)), r"rope type 'llama3' without \['high_freq_factor'"),
        (dict(rope_scaling=dict(rope_type="linear", factor=2.0, mscale=1.0)), r"has \{'mscale': 1\.0\} with the rope"),
        (
            dict(rope_scaling=dict(rope_type="yarn", factor=4.0, attention_factor=1.0), max_position_embeddings=64),
            r"attention_factor=1\.0; only 1\.138",
        ),
        (
            dict(rope_scaling=dict(rope_type="yarn", factor=4.0, truncate=False), max_position_embeddings=64),
            "truncate=False",
        ),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
        (dict(rope_parameters=dict(rope_type="default", partial_rotary_factor=0.5)), "partial_rotary_factor"),
        (dict(rope_theta=1.0, rope_parameters=dict(rope_theta=2.0)), r"says rope_theta twice .* 2\.0 and 1\.0"),
        (
            dict(rope_scaling=dict(type="linear", factor=2.0), rope_parameters=dict(rope_type="linear", factor=3.0)),
            "says rope twice and differently",
        ),
        (dict(sliding_window=512), r"has sliding_window=512: no such thing is known of this family"),
        (dict(quantization_config=dict(bits=4)), r"has quantization_config=\{'bits': 4\}"),
        (dict(num_experts=8, clip_qkv=3.0), r"has clip_qkv=3\.0, num_experts=8"),
        (dict(auto_map={"AutoModel": "x.Y"}), "has auto_map="),
        (dict(model_type="mistral", attention_bias=True), "has attention_bias=True"),
        (dict(model_type="qwen2", mlp_bias=True), "has mlp_bias=True"),
        (dict(model_type="gemma2", use_bidirectional_attention=True), "has use_bidirectional_attention=True"),
        (
            dict(model_type="qwen3", layer_types=["full_attention", "linear_attention"] * 2),
            r"layer type 'linear_attention'; known are \['full_attention', 'sliding_attention'\]",
        ),
        (dict(model_type="qwen3", layer_types=["sliding_attention"] * 4), "attention, but sliding_window=None"),
        (dict(model_type="qwen3", layer_types=["full_attention"]), "1 layer_types and num_hidden_layers=4"),
        (dict(model_type="smollm3", no_rope_layers=[1]), "1 no_rope_layers and num_hidden_layers=4"),
        (dict(model_type="gemma2", sliding_window=None), "layers of sliding attention, but sliding_window=None"),
        (
            dict(model_type="gemma3_text", rope_parameters=dict(sliding_attention=dict(type="linear", factor=2.0))),
            r"rope_parameters of sliding_attention .* only 'default' is known there",
        ),
        (dict(model_type="gemma3_text", rope_parameters=dict(type="default")), r"rope_parameters of \['type'\]"),
        (dict(num_hidden_layers=None), "'llama' has num_hidden_layers=null"),
        (dict(model_type="gemma2", num_hidden_layers=0), r"model\.num_layers=0 must be at least 1"),
    ],
)  # fmt: skip
def test_what_our_decoder_cannot_do_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        families.decoder(families.read(LLAMA | changes)[1])


def test_a_field_without_default_is_asked_for():
    with pytest.raises(ValueError, match="of model_type 'llama' lacks 'hidden_size'"):
        families.read({key: x for key, x in LLAMA.items() if key != "hidden_size"})


# ---- out ----


@pytest.mark.parametrize(
    "changes, name",
    [
        ({}, "llama"),
        (dict(layer_pattern=("global", "global")), "llama"),
        (dict(width=18), "mistral"),
        (dict(qkv_bias=True), "qwen2"),
        (dict(qkv_bias=True, output_bias=True, mlp_bias=True), "llama"),
        (dict(layer_pattern=("local",), sliding_window=3), "mistral"),
        (dict(qk_norm="head", layer_pattern=("local", "global"), sliding_window=3), "qwen3"),
        (dict(layer_pattern=("nope", "local"), sliding_window=3), "smollm3"),
        (dict(layer_pattern=("local",), sliding_window=3, rope=dict(theta=100.0, local_theta=100.0)), "mistral"),
        (dict(qk_norm="all", pre_norm=False, post_norm=True), "olmo2"),
        (dict(rope=dict(scaling="yarn", factor=2.0, original_length=8, high_frequency=32.0)), "llama"),
    ],
)
def test_a_model_of_ours_is_written_in_the_first_family_that_can_say_it(tiny, changes, name):
    config = tiny(**changes)
    family, fields = families.write(config)
    assert family.name == name
    assert families._differences(families.decoder(families.read(fields | dict(model_type=name))[1]), config) == {}


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(attention_scale=0.3),
            r"the nearest, 'llama', differs in model\.attention_scale=0\.3 where it has 0\.408",
        ),
        (dict(logit_soft_cap=3.0), r"differs in model\.logit_soft_cap=3\.0 where it has 0\.0"),
        (
            dict(qk_norm="head", layer_pattern=("local",), sliding_window=3, rope=dict(theta=100.0, local_theta=9.0)),
            r"'qwen3', differs in model\.rope\.local_theta=9\.0 where it has 0\.0$",
        ),
        (dict(output_bias=True), r"differs in model\.qkv_bias=False where it has True"),
        (
            dict(width=18, norm_offset=1.0, post_norm=True, embedding_scale=18**0.5, logit_soft_cap=3.0),
            r"'gemma2', differs in model\.width=18 where it has .a multiple of num_heads=4.$",
        ),
        (dict(qk_norm="all"), r"differs in model\.qk_norm='all' where it has 'none'"),
        (dict(norm_offset=1.0), r"differs in model\.norm_offset=1\.0 where it has 0\.0"),
    ],
)
def test_a_model_that_no_family_can_say_is_refused_with_what_differs(tiny, changes, message):
    with pytest.raises(ValueError, match=message):
        families.write(tiny(**changes))


def test_how_a_model_is_computed_and_its_scalar_heads_do_not_decide_the_family(tiny):
    config = tiny(operand_dtype="bfloat16", remat="full", dropout=0.1, scalar_head=True, critic=True, width=24)
    assert families.write(config)[0].name == "llama"


# ---- layouts ----


def test_heads_are_rows_of_a_matrix_there_and_an_axis_here():
    tensor = Tensor("query", "q", "(nh)d", "dnh")
    theirs = np.arange(24).reshape(6, 4)  # N = 2, H = 3, D = 4
    assert families.their_shape(tensor, (4, 2, 3)) == (6, 4)
    ours = families.to_ours(tensor, theirs, (4, 2, 3))
    for d, n, h in np.ndindex(4, 2, 3):
        assert ours[d, n, h] == theirs[3 * n + h, d]
    np.testing.assert_array_equal(families.to_theirs(tensor, ours), theirs)


@pytest.mark.parametrize("tensor", sorted({row for family in FAMILIES.values() for row in family.tensors}))
def test_every_layout_is_undone(tensor):
    shape = tuple({"d": 4, "n": 6, "k": 2, "h": 3, "f": 5, "v": 7}[letter] for letter in tensor.ours)
    ours = np.random.default_rng(0).normal(size=shape)
    theirs = families.to_theirs(tensor, ours)
    assert theirs.shape == families.their_shape(tensor, shape)
    again = families.to_ours(tensor, theirs, shape)
    np.testing.assert_array_equal(again, ours)
    assert again.base is not None, "a view"
