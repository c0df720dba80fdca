import json
import runpy
import weakref
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxllm import sharding, tree
from jaxllm.generate import SamplerConfig, generate
from jaxllm.interop import families, hf, placing, safetensors
from jaxllm.losses import token_logprobs
from jaxllm.model import build, parameter_rules

MAKER = runpy.run_path(str(Path(__file__).with_name("make_golden.py")))
CASES, TOKENS_BT = MAKER["CASES"], MAKER["tokens"]()
# One of each family, and whatever has windows.
GREEDY = ("llama3", "mistral", "qwen2_windows", "qwen3_tied", "smollm3_windows", "olmo2", "gemma2", "gemma3")
FACTS = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)


def golden(case: str) -> dict:
    return json.loads((MAKER["GOLDEN"] / f"hf_{case}.json").read_text())


def weights(case: str) -> dict[str, np.ndarray]:
    found = golden(case)
    return {name: MAKER["draw"](name, shape, norm_mean=found["norm_mean"]) for name, shape in found["shapes"].items()}


def saved(folder: Path, case: str, **changes) -> Path:
    """The folder that transformers would have saved for this case."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(golden(case)["config"] | changes))
    save_file(weights(case), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def equal(a, b) -> bool:
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b)
    return jax.tree.all(same)


# ---- the same numbers as transformers ----


def some_thorough(cases, always):
    """The cases, those marked that are not ``always`` run."""
    return [pytest.param(case, marks=() if case in always else pytest.mark.thorough) for case in cases]


@pytest.mark.parametrize("case", some_thorough(CASES, GREEDY))
def test_logits_and_gradients_are_those_of_transformers(tmp_path, case):
    expected = golden(case)
    config, params = hf.read(saved(tmp_path / "hf", case), unroll=1)
    model = build(config)

    def loss(params):
        logits_BTV = model.forward(params, TOKENS_BT)
        logp_BT = token_logprobs(logits_BTV[:, :-1], TOKENS_BT[:, 1:])
        return -jnp.mean(logp_BT), (logits_BTV, logp_BT)

    (_, (logits_BTV, logp_BT)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(logits_BTV[:, MAKER["SHOWN"]], expected["logits"], atol=2e-5)
    np.testing.assert_allclose(logp_BT, expected["logp"], atol=2e-5)
    # Exported, gradients have the names that transformers gives its parameters.
    hf.write(tmp_path / "gradients", config, gradients, tokenizer_facts=FACTS)
    theirs = load_file(tmp_path / "gradients" / "model.safetensors")
    assert set(theirs) == set(expected["gradients"])
    for name, numbers in expected["gradients"].items():
        np.testing.assert_allclose(MAKER["probe"](name, theirs[name]), numbers, atol=1e-5, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("case", some_thorough(GREEDY, GREEDY[::3]))
def test_a_ragged_batch_is_continued_as_transformers_continues_it_padded_on_the_left(tmp_path, case):
    config, params = hf.read(saved(tmp_path / "hf", case))
    rows = MAKER["prompts"]()
    lengths_B = np.array([len(ids) for ids in rows])
    prompts_BT = np.zeros((len(rows), max(lengths_B)), int)
    for prompt_T, ids in zip(prompts_BT, rows, strict=True):
        prompt_T[: len(ids)] = ids
    how = dict(max_new_tokens=MAKER["NEW"], sampler=SamplerConfig(temperature=0.0), stop_ids=())
    made = generate(build(config), params, prompts_BT, lengths_B, jax.random.key(0), **how)
    assert made.tokens_BT.tolist() == golden(case)["greedy"]


# ---- there and back ----


@pytest.mark.parametrize("case", CASES)
def test_what_is_read_is_written_again_bit_for_bit(tmp_path, case):
    config, params = hf.read(saved(tmp_path / "hf", case))
    hf.write(tmp_path / "again", config, params, tokenizer_facts=FACTS, max_positions=256)
    theirs = load_file(tmp_path / "again" / "model.safetensors")
    assert {name: x.tobytes() for name, x in theirs.items()} == {k: x.tobytes() for k, x in weights(case).items()}
    assert list(theirs["model.norm.weight"].shape) == golden(case)["shapes"]["model.norm.weight"]
    config_again, params_again = hf.read(tmp_path / "again")
    said = json.loads((tmp_path / "again" / "config.json").read_text())
    assert families.read(golden(case)["config"])[1] == families.read(said)[1]
    assert config_again == config and equal(params, params_again)


def test_files_of_many_shards_are_written_with_an_index_and_read_again(tmp_path):
    config, params = hf.read(saved(tmp_path / "hf", "llama2"))
    hf.write(tmp_path / "shards", config, params, tokenizer_facts=FACTS, shard_bytes=20_000)
    files = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((tmp_path / "shards" / name).stat().st_size < 20_000 + 3000 for name in files)
    index = json.loads((tmp_path / "shards" / hf.INDEX).read_text())
    assert index["metadata"]["total_size"] == 4 * tree.size(params)
    assert set(index["weight_map"]) == set(weights("llama2"))
    assert equal(params, hf.read(tmp_path / "shards")[1])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_files_are_rounded_to_nearest_and_read_back_as_what_they_hold(tmp_path, dtype):
    config, params = hf.read(saved(tmp_path / "hf", "qwen2"))
    hf.write(tmp_path / "narrow", config, params, dtype=dtype, tokenizer_facts=FACTS)
    said = json.loads((tmp_path / "narrow" / "config.json").read_text())
    assert said["torch_dtype"] == said["dtype"] == dtype
    narrowed = jax.tree.map(lambda x: x.astype(dtype).astype("float32"), params)
    found = hf.read(tmp_path / "narrow")[1]
    assert equal(found, narrowed) and not equal(found, params)


def test_numbers_beyond_float16_are_refused_by_name(tmp_path):
    config, params = hf.read(saved(tmp_path / "hf", "llama2"))
    params["final_norm"]["scale"] = params["final_norm"]["scale"].at[3].set(1e5)
    with pytest.raises(ValueError, match=r"model\.norm\.weight has numbers up to 1e\+05, float16 up to 65504"):
        hf.write(tmp_path / "narrow", config, params, dtype="float16", tokenizer_facts=FACTS)
    assert not (tmp_path / "narrow" / "config.json").exists()


def test_the_config_has_both_generations_of_spelling_and_the_tokenizers_ids(tmp_path):
    config, params = hf.read(saved(tmp_path / "hf", "llama3"))
    facts = dict(bos_token_id=2, eos_token_id=[8, 3], pad_token_id=0)
    hf.write(tmp_path / "out", config, params, tokenizer_facts=facts)
    names = ["config.json", "generation_config.json", "model.safetensors"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["architectures"] == ["LlamaForCausalLM"] and said["model_type"] == "llama"
    assert said["rope_theta"] == said["rope_parameters"]["rope_theta"] == 500000.0
    stretched = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
    assert said["rope_scaling"] == stretched | dict(rope_type="llama3")
    assert said["rope_parameters"] == said["rope_scaling"] | dict(rope_theta=500000.0)
    assert said["max_position_embeddings"] == 8 * 32
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    for key, ids in facts.items():
        assert said[key] == generation[key] == ids


def test_an_id_that_nobody_says_is_none_and_not_the_familys_own(tmp_path, tiny, built):
    hf.write(tmp_path / "out", tiny(width=24), built(tiny(width=24))[1], tokenizer_facts={"eos_token_id": 3})
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (said["bos_token_id"], said["eos_token_id"], said["pad_token_id"]) == (None, 3, None)


def test_a_tokenizers_ids_are_what_opens_a_document_what_stops_and_what_pads():
    tokenizer = SimpleNamespace(bos_ids=(2,), stop_ids=(8, 3), pad_id=0)
    assert hf.tokenizer_facts(tokenizer) == dict(bos_token_id=2, eos_token_id=[8, 3], pad_token_id=0)
    tokenizer = SimpleNamespace(bos_ids=(), stop_ids=(5,), pad_id=5)
    assert hf.tokenizer_facts(tokenizer) == dict(bos_token_id=None, eos_token_id=5, pad_token_id=5)


def test_scalar_heads_and_critics_stay_behind(tmp_path, tiny, built):
    config = tiny(scalar_head=True, critic=True, width=24)
    _, params = built(config)
    hf.write(tmp_path / "out", config, params, tokenizer_facts=FACTS)
    found_config, found = hf.read(tmp_path / "out")
    assert not found_config.scalar_head and not found_config.critic
    assert equal(found, {name: params[name] for name in ("embedding", "blocks", "final_norm")})


def test_parameters_of_another_model_are_refused_by_name(tmp_path, tiny, built):
    config, params = tiny(tied_head=False), built(tiny())[1]
    with pytest.raises(ValueError, match=r"not those of the config's model: head/kernel None and not \(16, 40\)$"):
        hf.write(tmp_path / "out", config, params, tokenizer_facts=FACTS)
    with pytest.raises(ValueError, match=r"embedding/table \(40, 16\) and not \(41, 16\)$"):
        hf.write(tmp_path / "out", tiny(vocab_size=41), params, tokenizer_facts=FACTS)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_weights_is_not_written_over(tmp_path):
    folder = saved(tmp_path / "hf", "llama2")
    config, params = hf.read(folder)
    with pytest.raises(FileExistsError, match=r"holds \['model\.safetensors'\]; remove them"):
        hf.write(folder, config, params, tokenizer_facts=FACTS)
    assert json.loads((folder / "config.json").read_text()) == golden("llama2")["config"]


def test_an_unknown_dtype_to_write_is_refused(tmp_path, tiny, built):
    with pytest.raises(ValueError, match=r"dtype='q8_0' must be one of \['bfloat16', 'float16', 'float32'\]"):
        hf.write(tmp_path / "out", tiny(), built(tiny())[1], dtype="q8_0", tokenizer_facts=FACTS)


# ---- what a folder may hold ----


def rewritten(folder: Path, change) -> None:
    tensors = weights("llama2")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda x: x.pop("model.layers.1.mlp.up_proj.weight"),
            r"tensors are missing, of the 'llama' .*: model\.layers\.1\.mlp\.up_proj\.weight$",
        ),
        (lambda x: x.pop("lm_head.weight"), r"tensors are missing.*: lm_head\.weight"),
        (
            lambda x: x.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32)}),
            r"tensors are not known.*: model\.layers\.0\.self_attn\.q_proj\.bias",
        ),
        (
            lambda x: x.update({"model.layers.2.mlp.up_proj.weight": np.zeros((40, 32), np.float32)}),
            r"tensors are not known.*: model\.layers\.2\.mlp\.up_proj\.weight",
        ),
        (
            lambda x: x.update({"model.embed_tokens.weight": np.zeros((49, 32), np.float32)}),
            r"tensors have other shapes.*: model\.embed_tokens\.weight is \(49, 32\) and not \(48, 32\)",
        ),
        (
            lambda x: x.update({"lm_head.weight": np.zeros((32, 48), np.float32)}),
            r"lm_head\.weight is \(32, 48\) and not \(48, 32\)",
        ),
        (
            lambda x: x.update({"model.norm.weight": np.zeros(32, np.float64)}),
            r"model\.norm\.weight has the dtype F64; known are",
        ),
    ],
)
def test_tensors_that_are_missing_unknown_or_of_another_shape_or_dtype_are_named(tmp_path, change, message):
    folder = saved(tmp_path / "hf", "llama2")
    rewritten(folder, change)
    with pytest.raises(ValueError, match=message):
        hf.read(folder)


def test_many_missing_tensors_are_counted(tmp_path):
    folder = saved(tmp_path / "hf", "llama2", num_hidden_layers=5)
    with pytest.raises(ValueError, match=r"tensors are missing.*: model\.layers\.2\.input_layernorm.* and 19 more$"):
        hf.read(folder)


def test_tables_of_older_files_are_no_parameters(tmp_path):
    folder = saved(tmp_path / "hf", "llama2")
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)}
    rewritten(folder, lambda tensors: tensors.update(table))
    hf.read(folder)


def test_a_tied_head_may_be_saved_twice_but_not_differ(tmp_path):
    folder = saved(tmp_path / "hf", "qwen2")
    tensors = weights("qwen2")
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}
    save_file(tensors | head, folder / "model.safetensors")
    params = hf.read(folder)[1]
    assert "head" not in params
    head["lm_head.weight"][3, 4] += 1
    save_file(tensors | head, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"tie_word_embeddings=True, and lm_head\.weight is not"):
        hf.read(folder)


@pytest.mark.parametrize(
    "names",
    [
        lambda name: "language_model." + name,
        lambda name: name if name == "lm_head.weight" else name.replace("model.", "model.language_model.", 1),
    ],
)
def test_the_text_model_of_a_gemma_3_that_sees_pictures_is_read(tmp_path, names):
    folder = saved(tmp_path / "hf", "gemma3")
    expected = hf.read(folder)
    tensors = {names(name): x for name, x in weights("gemma3").items()}
    tensors |= {f"{p}vision_tower.x.weight": np.zeros(3, np.float32) for p in ("", "model.")}
    tensors["multi_modal_projector.mm_input_projection_weight"] = np.zeros(3, np.float32)
    save_file(tensors, folder / "model.safetensors")
    nested = dict(model_type="gemma3", text_config=golden("gemma3")["config"], vision_config={}, image_token_index=9)
    (folder / "config.json").write_text(json.dumps(nested))
    config, params = hf.read(folder)
    assert config == expected[0] and equal(params, expected[1])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_weights_become_float32_exactly(tmp_path, dtype):
    folder = saved(tmp_path / "hf", "qwen3")
    narrow = {name: x.astype(jnp.dtype(dtype)) for name, x in weights("qwen3").items()}
    save_file(narrow, folder / "model.safetensors")
    params = hf.read(folder)[1]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    np.testing.assert_array_equal(params["head"]["kernel"].T, np.float32(narrow["lm_head.weight"]))
    up = np.float32(narrow["model.layers.1.mlp.up_proj.weight"])
    np.testing.assert_array_equal(params["blocks"]["mlp"]["up"]["kernel"][1], up.T)


def test_a_folder_without_config_or_weights_says_what_it_lacks(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing: a Hugging Face folder has"):
        hf.read(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        hf.read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(golden("llama2")["config"]))
    with pytest.raises(FileNotFoundError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json$"):
        hf.read(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"\['pytorch_model\.bin'\] are of another format"):
        hf.read(tmp_path)


def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path):
    config, params = hf.read(saved(tmp_path / "hf", "llama2"))
    folder = tmp_path / "shards"
    hf.write(folder, config, params, tokenizer_facts=FACTS, shard_bytes=20_000)
    index = json.loads((folder / hf.INDEX).read_text())
    first = index["weight_map"]["model.embed_tokens.weight"]
    (folder / hf.INDEX).write_text(
        json.dumps({"weight_map": {k: f for k, f in index["weight_map"].items() if "norm" not in k}})
    )
    with pytest.raises(ValueError, match=r"index\.json and model-\d+-of-\d+\.safetensors disagree about \['model\."):
        hf.read(folder)
    (folder / hf.INDEX).write_text(json.dumps(index))
    (folder / first).unlink()
    with pytest.raises(FileNotFoundError, match=rf"lacks \['{first}'\], which .*index\.json names"):
        hf.read(folder)


# ---- where the parameters lie ----


def test_parameters_go_to_their_shards_and_are_the_same(tmp_path, mesh):
    folder = saved(tmp_path / "hf", "gemma2")
    config, whole = hf.read(folder)
    abstract = jax.eval_shape(build(config).init, jax.random.key(0))
    shardings = sharding.parameter_shardings(parameter_rules(config), abstract, mesh)
    _, params = hf.read(folder, shardings=shardings)
    for name, leaf, placed in zip(tree.names(params), *map(jax.tree.leaves, (params, shardings)), strict=True):
        assert leaf.sharding == placed, name
    up = params["blocks"]["mlp"]["up"]["kernel"]
    assert up.addressable_shards[0].data.size == up.size // (mesh.shape["fsdp"] * mesh.shape["tensor"])
    assert equal(jax.device_get(params), jax.device_get(whole))
    hf.write(tmp_path / "again", config, params, tokenizer_facts=FACTS)
    assert equal(whole, hf.read(tmp_path / "again")[1])


@pytest.mark.parametrize("way", [placing.filled, placing.stacked])
@pytest.mark.parametrize("layered", [True, False])
def test_both_ways_to_make_a_parameter_make_the_same(make_mesh, way, layered):
    whole = np.random.default_rng(0).normal(size=(3, 4, 6)).astype("bfloat16")
    spec = jax.sharding.PartitionSpec(None, "fsdp", "tensor")
    placed = jax.sharding.NamedSharding(make_mesh(2, 2, 2), spec)
    found = way(iter(whole) if layered else [whole], whole.shape, placed, layered=layered)
    assert found.dtype == "float32" and found.sharding == placed
    np.testing.assert_array_equal(found, np.float32(whole))


def test_one_tensor_of_the_files_is_in_memory_at_a_time(tmp_path, monkeypatch):
    made, most, read = [], [], safetensors.read

    class Counted(np.ndarray):
        pass

    def counted(entry):
        array = read(entry).view(Counted)
        made.append(weakref.ref(array))
        most.append(sum(each() is not None for each in made))
        return array

    monkeypatch.setattr(safetensors, "read", counted)
    hf.read(saved(tmp_path / "hf", "gemma3"))
    assert len(most) == len(weights("gemma3")) and max(most) <= 2


def test_a_parameter_on_the_host_is_written_where_it_stays():
    made = [np.ones((8, 16), np.float32)] * 3
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    pointers, put = [], jax.device_put

    def watched(x, device):
        pointers.append(x.ctypes.data)
        return put(x, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_put", watched)
        found = placing.filled(made, (3, 8, 16), here, layered=True)
    assert [found.unsafe_buffer_pointer()] == pointers


def test_progress_counts_the_bytes(tmp_path):
    seen = []
    _, params = hf.read(saved(tmp_path / "hf", "llama2"), progress=lambda done, total: seen.append((done, total)))
    size = 4 * tree.size(params)
    assert seen[-1] == (size, size) and [done for done, _ in seen] == sorted({done for done, _ in seen})


# ---- where transformers is installed ----


@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_what_is_written_and_computes_the_same(tmp_path, case):
    transformers = pytest.importorskip("transformers", reason="transformers is no requirement; the golden numbers are")
    torch = pytest.importorskip("torch", reason="torch is no requirement; the golden numbers are")
    config, params = hf.read(saved(tmp_path / "hf", case), unroll=1)
    hf.write(tmp_path / "out", config, params, tokenizer_facts=FACTS, max_positions=256, shard_bytes=30_000)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        theirs = loaded(torch.tensor(TOKENS_BT)).logits.numpy()
    ours = jax.jit(build(config).forward)(params, TOKENS_BT)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    loaded.save_pretrained(tmp_path / "theirs")
    assert equal(params, hf.read(tmp_path / "theirs")[1])
