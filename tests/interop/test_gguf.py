import dataclasses
import json
import runpy
from pathlib import Path

import gguf as package
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import sharding, tree
from jaxllm.interop import families, gguf, gguf_format
from jaxllm.interop import gguf_architectures as architectures
from jaxllm.losses import token_logprobs
from jaxllm.model import build, parameter_rules
from jaxllm.text.tokenizer import byte_tokenizer

MAKER = runpy.run_path(str(Path(__file__).with_name("make_golden.py")))
NAMES = dict(llama="LLAMA", mistral="LLAMA", qwen2="QWEN2", qwen3="QWEN3", smollm3="SMOLLM3", olmo2="OLMO2")
NAMES |= dict(gemma2="GEMMA2", gemma3_text="GEMMA3")
# What the format does not say: biases and functions that an architecture of llama.cpp lacks, scores scaled otherwise.
PLAIN = {
    "llama_biases": dict(hidden_act="silu"),
    "gemma2": dict(query_pre_attn_scalar=12),
    "gemma2_untied": dict(query_pre_attn_scalar=12),
    "gemma3": dict(query_pre_attn_scalar=12),
}
CASES = ("llama2", "llama3", "llama_biases", "llama_linear", "mistral_whole", "qwen2", "qwen2_yarn", "qwen3_tied")
CASES += ("smollm3", "olmo2", "gemma2", "gemma3")


def golden(case: str) -> dict:
    found = json.loads((MAKER["GOLDEN"] / f"hf_{case}.json").read_text())
    found["config"] |= PLAIN.get(case, {})
    if case == "qwen3_tied":
        found["config"] |= dict(use_sliding_window=False, layer_types=None)
    return found


def weights(found: dict) -> dict[str, np.ndarray]:
    return {name: MAKER["draw"](name, shape, norm_mean=found["norm_mean"]) for name, shape in found["shapes"].items()}


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's converter does it: row r of a head's first half comes before row r of its second."""
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def converted(path: Path, found: dict, **wrong) -> Path:
    """The file that llama.cpp's converter makes of a Hugging Face folder, by the package's own writer and names."""
    said, rope = found["config"], found["config"].get("rope_parameters") or {}
    kind, layers = said["model_type"], said["num_hidden_layers"]
    architecture = getattr(package.MODEL_ARCH, NAMES[kind])
    writer = package.GGUFWriter(path, package.MODEL_ARCH_NAMES[architecture])
    rope, local = rope.get("full_attention", rope), rope.get("sliding_attention", {})
    heads, kv_heads = said["num_attention_heads"], said["num_key_value_heads"]
    width = said.get("head_dim") or said["hidden_size"] // heads
    writer.add_block_count(layers)
    writer.add_context_length(said["max_position_embeddings"])
    writer.add_embedding_length(said["hidden_size"])
    writer.add_feed_forward_length(said["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_layer_norm_rms_eps(said["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    if local:
        writer.add_rope_freq_base_swa(local["rope_theta"])
    if kind.startswith("gemma"):
        writer.add_sliding_window(said["sliding_window"])
        if said.get("attn_logit_softcapping"):
            writer.add_attn_logit_softcapping(said["attn_logit_softcapping"])
        if said.get("final_logit_softcapping"):
            writer.add_final_logit_softcapping(said["final_logit_softcapping"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(package.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] in ("yarn", "llama3"):
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(rope, width))
    names = package.get_tensor_name_map(architecture, layers)
    for name, array in weights(found).items():
        stem, ending = name.rsplit(".", 1)
        if NAMES[kind] in ("LLAMA", "SMOLLM3") and stem.endswith(("q_proj", "k_proj")):
            array = interleaved(array, heads if stem.endswith("q_proj") else kv_heads)
        if kind.startswith("gemma") and "norm" in name:
            array = array + np.float32(1)
        theirs = wrong.get("rename", {}).get(name, f"{names.get_name(stem)}.{ending}")
        if theirs:
            writer.add_tensor(theirs, np.ascontiguousarray(wrong.get("cut", lambda _, x: x)(name, array)))
    for key, value in wrong.get("keys", {}).items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_string)(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama3_factors(rope: dict, width: int) -> np.ndarray:
    """As the converter makes them, wave by wave."""
    factors, length = [], rope["original_max_position_embeddings"]
    for pair in range(width // 2):
        wave = 2 * np.pi * rope["rope_theta"] ** (2 * pair / width)
        if wave < length / rope["high_freq_factor"]:
            factors.append(1.0)
        elif wave > length / rope["low_freq_factor"]:
            factors.append(rope["factor"])
        else:
            smooth = (length / wave - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


def same(a, b, **how) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **how), a, b)
    assert tree.names(a) == tree.names(b)


def expected(case: str):
    """(config, parameters) as the Hugging Face folder has them: `test_hf` compares these with transformers."""
    found = golden(case)
    family, values = families.read(found["config"])
    config = families.decoder(values)
    table, abstract = {t.parameter: t for t in family.tensors}, jax.eval_shape(build(config).init, jax.random.key(0))

    def parameter(name, leaf):
        tensor, drawn = table[name], weights(found)
        if "{}" not in tensor.name:
            return families.to_ours(tensor, drawn[tensor.name], leaf.shape)
        layers = (drawn[tensor.name.format(n)] for n in range(leaf.shape[0]))
        return np.stack([families.to_ours(tensor, layer, leaf.shape[1:]) for layer in layers])

    return config, tree.map_named(parameter, abstract)


# ---- in ----


@pytest.mark.parametrize("case", CASES)
def test_what_llama_cpps_converter_writes_is_the_model_that_it_was(tmp_path, case):
    config, params = gguf.read(converted(tmp_path / "x.gguf", golden(case)))
    config_there, params_there = expected(case)
    # Norms of Gemma lie there with their 1, and lose a bit by it.
    same(params, params_there, rtol=0, atol=2e-7 if case.startswith("gemma") else 0)
    assert families.write(config) == families.write(config_there)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))


@pytest.mark.parametrize("case", ["llama3", "qwen2", "smollm3", "olmo2"])
def test_its_logits_are_those_of_transformers(tmp_path, case):
    found = golden(case)
    config, params = gguf.read(converted(tmp_path / "x.gguf", found), unroll=1)
    tokens_BT = MAKER["tokens"]()
    logits_BTV = jax.jit(build(config).forward)(params, tokens_BT)
    np.testing.assert_allclose(logits_BTV[:, MAKER["SHOWN"]], found["logits"], atol=2e-5)
    logp_BT = token_logprobs(logits_BTV[:, :-1], tokens_BT[:, 1:])
    np.testing.assert_allclose(logp_BT, found["logp"], atol=2e-5)


def test_heads_that_are_rotated_in_neighbouring_pairs_score_as_ours_do_in_halves():
    """Oracle: llama.cpp rotates elements 2i and 2i + 1 of what it reads, we i and i + H / 2 of what we make of it."""
    config, H, N = families.decoder(families.read(golden("llama2")["config"])[1]), 8, 4
    draw = np.random.default_rng(0).normal(size=(2, N * H, 32)).astype(np.float32)  # rows of queries, and of keys
    row = next(
        tensor for tensor in architectures.ARCHITECTURES["llama"].tensors if tensor.parameter.endswith("query/kernel")
    )
    ours = [architectures.to_ours(architectures.ARCHITECTURES["llama"], config, row, rows, (32, N, H)) for rows in draw]
    x_D = np.random.default_rng(1).normal(size=(2, 32))
    angles = 7 * 10000.0 ** (-np.arange(0, H, 2) / H)

    def turned(first, second):
        return first * np.cos(angles) - second * np.sin(angles), first * np.sin(angles) + second * np.cos(angles)

    for head in range(N):
        pairs = [(draw[n] @ x_D[n]).reshape(N, H // 2, 2)[head].T for n in (0, 1)]
        halves = [np.einsum("d,dh->h", x_D[n], ours[n][:, head]).reshape(2, H // 2) for n in (0, 1)]
        theirs = np.sum(np.stack(turned(*pairs[0])) * pairs[1])
        assert np.sum(np.stack(turned(*halves[0])) * halves[1]) == pytest.approx(theirs, rel=1e-5)


def test_a_query_that_is_not_put_back_is_seen_in_the_likelihood(tmp_path):
    found = golden("llama2")
    config, params = gguf.read(converted(tmp_path / "x.gguf", found))
    model, tokens_BT = build(config), MAKER["tokens"]()
    query = params["blocks"]["attention"]["query"]["kernel"]
    L, D, N, H = query.shape
    params["blocks"]["attention"]["query"]["kernel"] = query.reshape(L, D, N, 2, -1).swapaxes(3, 4).reshape(L, D, N, H)
    logp_BT = token_logprobs(model.forward(params, tokens_BT)[:, :-1], tokens_BT[:, 1:])
    assert np.abs(logp_BT - np.array(found["logp"])).max() > 0.01


def test_arrays_lie_where_shardings_say(tmp_path, make_mesh):
    mesh = make_mesh(1, 4, 2)
    path = converted(tmp_path / "x.gguf", golden("qwen2"))
    config, params = gguf.read(path)
    abstract = jax.eval_shape(build(config).init, jax.random.key(0))
    placed = sharding.parameter_shardings(parameter_rules(config), abstract, mesh)
    sharded = gguf.read(path, shardings=placed)[1]
    same(params, jax.device_get(sharded), rtol=0, atol=0)
    assert jax.tree.map(lambda x: x.sharding, sharded) == placed
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(sharded))


def test_progress_counts_the_files_bytes_up_to_all_of_them(tmp_path):
    path, seen = converted(tmp_path / "x.gguf", golden("llama2")), []
    gguf.read(path, progress=lambda done, total: seen.append((done, total)))
    total = sum(entry.bytes for entry in gguf_format.header(path)[1].values())
    assert seen[-1] == (total, total) and [done for done, _ in seen] == sorted({done for done, _ in seen})


@pytest.mark.parametrize("layers, scale", [(46, 32 / 4), (26, 12)])
def test_gemma_2_of_46_layers_alone_is_scaled_by_width_over_heads(layers, scale):
    said = {f"gemma2.{key}": 1 for key in architectures.NEEDED} | {"general.architecture": "gemma2"}
    said |= {"gemma2.block_count": layers, "gemma2.embedding_length": 32, "gemma2.attention.head_count": 4}
    said |= {"gemma2.attention.key_length": 12, "gemma2.attention.sliding_window": 4}
    arrays = {architectures.EMBEDDING: gguf_format.Entry(Path(), "F32", (48, 32), 0, 0)}
    values = gguf._values(gguf.Source(Path(), architectures.ARCHITECTURES["gemma2"], said, arrays))
    assert (values["attention_scale"] or 12**-0.5) == pytest.approx(scale**-0.5)
    assert values["attention_soft_cap"] == 50 and values["layer_pattern"] == ("local", "global")


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(rename={"model.norm.weight": ""}), r"arrays are missing, .*'llama'.*: output_norm\.weight"),
        (dict(rename={"lm_head.weight": "strange.weight"}), r"arrays are not known.*: strange\.weight"),
        (
            dict(cut=lambda name, x: x[:-1] if name == "model.norm.weight" else x),
            r"have other shapes.*: output_norm\.weight is \(31,\) and not \(32,\)",
        ),
        (dict(rename={"model.embed_tokens.weight": ""}), r"arrays of this 'llama' lack token_embd\.weight"),
        (dict(keys={"llama.expert_count": 8}), r"have \{'llama\.expert_count': 8\}: no such thing is known of 'llama'"),
        (dict(keys={"llama.attention.sliding_window": 8}), r"'llama\.attention\.sliding_window': 8"),
        (dict(keys={"llama.rope.scaling.type": "longrope"}), "rope type 'longrope'"),
    ],
)
def test_what_is_missing_or_unknown_is_named(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        gguf.read(converted(tmp_path / "x.gguf", golden("llama2"), **wrong))


def test_a_key_that_is_missing_is_named(tmp_path):
    arrays = {architectures.EMBEDDING: gguf_format.Planned((48, 32), "F32")}
    gguf_format.write(tmp_path / "x.gguf", {"general.architecture": "llama"}, arrays, [np.zeros((48, 32), np.float32)])
    with pytest.raises(ValueError, match=r"metadata of this 'llama' lack \['llama\.block_count', "):
        gguf.read(tmp_path / "x.gguf")


def test_an_unknown_architecture_is_named(tmp_path):
    gguf_format.write(tmp_path / "x.gguf", {"general.architecture": "mamba"}, {}, [])
    with pytest.raises(ValueError, match=r"general\.architecture='mamba'; known are .*'gemma2'"):
        gguf.read(tmp_path / "x.gguf")


def test_factors_of_rope_that_are_not_llama_3s_are_refused(tmp_path):
    found = golden("llama3")
    found["config"]["rope_parameters"]["low_freq_factor"] = 0.5
    with pytest.raises(ValueError, match=r"rope_freqs\.weight are not those of Llama 3's RoPE"):
        gguf.read(converted(tmp_path / "x.gguf", found))


@pytest.mark.parametrize("key", ["rope.dimension_count", "attention.value_length"])
def test_half_rotated_heads_and_wider_values_are_refused(tmp_path, monkeypatch, key):
    name = {"rope.dimension_count": "rope_dimension_count", "attention.value_length": "value_length"}[key]
    add = getattr(package.GGUFWriter, f"add_{name}")
    monkeypatch.setattr(package.GGUFWriter, f"add_{name}", lambda self, count: add(self, count // 2))
    with pytest.raises(ValueError, match=rf"llama\.{key} is not the 8 of a head"):
        gguf.read(converted(tmp_path / "x.gguf", golden("llama2")))


# ---- out ----


def enlarged(case: str):
    """(config, parameters) of a case, with rows for each byte."""
    config, params = expected(case)
    config = dataclasses.replace(config, vocab_size=288)
    draw = lambda *shape: np.random.default_rng(3).normal(size=shape).astype(np.float32)  # noqa: E731
    params["embedding"]["table"] = draw(288, config.width)
    if not config.tied_head:
        params["head"]["kernel"] = draw(config.width, 288)
    return config, jax.tree.map(jnp.asarray, params)


@pytest.mark.parametrize("case", [case for case in CASES if case != "olmo2"])
def test_what_is_written_in_float32_is_read_again_bit_for_bit(tmp_path, case):
    config, params = enlarged(case)
    gguf.write(tmp_path / "x.gguf", config, params, byte_tokenizer(), dtype="float32")
    config_again, params_again = gguf.read(tmp_path / "x.gguf")
    same(params_again, params, rtol=0, atol=2e-7 if case.startswith("gemma") else 0)
    assert families.write(config_again) == families.write(config)


@pytest.mark.parametrize("case", ["llama3", "llama_biases", "smollm3", "qwen3_tied", "gemma3"])
def test_what_is_written_is_what_llama_cpps_converter_writes(tmp_path, case):
    config, params = expected(case)
    theirs = package.GGUFReader(converted(tmp_path / "theirs.gguf", golden(case)))
    architecture, metadata = gguf._metadata(config, 256)
    rows = {name: make() for name, _, make in gguf._rows(architecture, config, params)}
    assert set(rows) == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        exact = dict(rtol=1e-6 if tensor.name == "rope_freqs.weight" else 0, atol=2e-7 if case == "gemma3" else 0)
        np.testing.assert_allclose(rows[tensor.name], tensor.data.reshape(rows[tensor.name].shape), **exact)
    for key, field in theirs.fields.items():
        if key.startswith(f"{architecture.name}."):
            said = field.contents()
            assert metadata[key] == (said if isinstance(said, str) else pytest.approx(said, rel=1e-6)), key


@pytest.mark.parametrize("dtype, error", [("float16", 2**-11), ("bfloat16", 2**-8), ("q8_0", 0.01)])
def test_narrow_files_hold_matrices_coarsely_and_vectors_exactly(tmp_path, dtype, error):
    config, params = enlarged("qwen2")
    gguf.write(tmp_path / "x.gguf", config, params, byte_tokenizer(), dtype=dtype)
    metadata, found = gguf_format.header(tmp_path / "x.gguf")
    kinds = {"float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
    assert found["blk.0.attn_q.weight"].kind == kinds[dtype] and found["blk.0.attn_norm.weight"].kind == "F32"
    # Rows of 40 are no blocks of 32.
    assert found["blk.0.ffn_down.weight"].kind == ("F16" if dtype == "q8_0" else kinds[dtype])
    read = gguf.read(tmp_path / "x.gguf")[1]
    for name, ours, theirs in zip(tree.names(params), *map(jax.tree.leaves, (params, read)), strict=True):
        exact = "norm" in name or name.endswith("bias")
        np.testing.assert_allclose(theirs, ours, rtol=0, atol=0 if exact else error * np.abs(ours).max(), err_msg=name)


@pytest.mark.parametrize(
    "case, changes, message",
    [
        ("mistral", {}, "no architecture for this 'mistral'"),
        (
            "qwen2_windows",
            dict(head_width=8),
            "'qwen2' is not this model: it is one with .*use_sliding_window=True where it has False",
        ),
        ("qwen3", {}, "'qwen3' has no model.qkv_bias=True, model.output_bias=True"),
        ("olmo2", {}, "'olmo2' has no model.head_width=12 of 4 heads in a width of 32"),
        ("qwen2", dict(head_width=16), "'qwen2' has no model.head_width=16 of 4 heads in a width of 32"),
        ("gemma2_untied", {}, "'gemma2' has no model.tied_head=False"),
        ("gemma2", dict(attention_scale=20**-0.5), "'gemma2' is not this model: .*query_pre_attn_scalar=20"),
        ("llama2", dict(activation="gelu"), "'llama' is not this model: .*hidden_act='gelu'"),
        ("smollm3", dict(layer_pattern=("nope", "global")), "'smollm3' is not this model: .*no_rope_layers"),
        ("llama2", dict(logit_soft_cap=3.0), "no family of .* is this model"),
    ],
)
def test_a_model_that_llama_cpp_would_run_otherwise_is_refused(tmp_path, case, changes, message):
    config = dataclasses.replace(families.decoder(families.read(golden(case)["config"])[1]), **changes)
    with pytest.raises(ValueError, match=message):
        gguf.write(tmp_path / "x.gguf", config, {}, byte_tokenizer())
    assert not (tmp_path / "x.gguf").exists()


def test_a_file_that_exists_and_an_unknown_dtype_are_refused(tmp_path):
    config, params = enlarged("llama2")
    with pytest.raises(ValueError, match="dtype='int4' must be one of"):
        gguf.write(tmp_path / "x.gguf", config, params, byte_tokenizer(), dtype="int4")
    (tmp_path / "x.gguf").touch()
    with pytest.raises(FileExistsError, match="x.gguf exists"):
        gguf.write(tmp_path / "x.gguf", config, params, byte_tokenizer())


def test_an_olmo_2_whose_heads_are_as_wide_as_the_model_is_written_and_read(tmp_path, tiny, built):
    changed = dict(pre_norm=False, post_norm=True, qk_norm="all", vocab_size=288, norm_eps=1e-6)
    config = tiny(width=32, num_heads=4, num_kv_heads=2, head_width=8, **changed)
    gguf.write(tmp_path / "x.gguf", config, built(config)[1], byte_tokenizer(), dtype="float32")
    config_again, params = gguf.read(tmp_path / "x.gguf")
    same(params, built(config)[1], rtol=0, atol=0)
    assert families.write(config_again) == families.write(config)


def test_a_scalar_head_stays_behind(tmp_path):
    config, params = enlarged("llama2")
    config = dataclasses.replace(config, scalar_head=True)
    params |= {"scalar_head": {"kernel": jnp.ones(32), "bias": jnp.ones(())}}
    gguf.write(tmp_path / "x.gguf", config, params, byte_tokenizer(), dtype="float32", max_positions=77, name="mine")
    metadata = gguf_format.header(tmp_path / "x.gguf")[0]
    assert metadata["llama.context_length"] == 77 and metadata["general.name"] == "mine"
    assert set(gguf.read(tmp_path / "x.gguf")[1]) == set(params) - {"scalar_head"}
