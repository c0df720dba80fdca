"""One laboratory for all tests: eight virtual devices, exact products, shared tiny models, names that cannot lie."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile much and compute little: code that is made fast beats fast code. The program before it is the same.
XLA_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)
os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *XLA_FLAGS)).strip()

import functools  # noqa: E402  JAX reads the two variables when it is first imported
import gc  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402

import jax  # noqa: E402
import jax.extend  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import names  # noqa: E402

names.install("jaxllm")  # before anything of it is imported

from configs import common  # noqa: E402
from jaxllm import checkpoint, sharding, tree, workdir  # noqa: E402
from jaxllm.configure import section  # noqa: E402
from jaxllm.losses import token_weights  # noqa: E402
from jaxllm.model import DecoderConfig, build  # noqa: E402
from jaxllm.text import hub  # noqa: E402
from jaxllm.text.tokenizer import byte_tokenizer  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")
# A second run loads its programs instead of compiling them, small ones too. Two workers share no directory: one would
# read what the other is still writing.
CACHE = ROOT / ".cache" / "tests" / os.environ.get("PYTEST_XDIST_WORKER", "")
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_configure(config):
    """Test files of different folders may have the same name, as the sources that they mirror have."""
    config.option.importmode = "importlib"


# ---- programs that are over ----

# Every compiled program takes a few of the pieces of memory that Linux lets a process have: a worker that has had
# thousands dies of it, without a word. Freed programs come back out of the cache on the disk.
MOST_MAPS = int(Path("/proc/sys/vm/max_map_count").read_text()) // 3 if Path("/proc/self/maps").exists() else 0


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Frees the programs of the files before, once there are too many."""
    if MOST_MAPS and Path("/proc/self/maps").read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


# ---- tiny models ----

SIZES = dict(vocab_size=40, num_layers=2, width=16, mlp_width=24, num_heads=4, num_kv_heads=2, head_width=6)


def _tiny(**changes) -> DecoderConfig:
    defaults = dict(operand_dtype="float32", attention="einsum", loss_chunk=5, unroll=1)
    return section(DecoderConfig, common.llama(**(SIZES | defaults | changes)))


@functools.cache
def _built(config: DecoderConfig):
    model = build(config)
    draw = np.random.default_rng(0)

    def drawn(name, leaf):
        # Scales that are not 1 and biases that are not 0, so that a test sees where they go.
        mean = 1.0 - config.norm_offset if name.endswith("scale") else 0.0
        return np.float32(draw.normal(mean, 0.3 if name.endswith("kernel") else 0.1, leaf.shape))

    return model, tree.map_named(drawn, jax.eval_shape(model.init, jax.random.key(0)))


def _packed_batch(M: int, B: int, T: int, vocab_size: int = SIZES["vocab_size"]) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(1)
    batch = {name: np.zeros((B, T), np.int32) for name in ("tokens_BT", "targets_BT", "positions_BT", "segments_BT")}
    batch["mask_BT"] = np.zeros((B, T), bool)
    for b in range(B):
        start, segment = 0, 1
        end_of_row = draw.integers(T // 2, T + 1) if b else T
        while start < end_of_row:
            end = min(start + draw.integers(1, T), end_of_row)
            document = draw.integers(1, vocab_size, end - start + 1)
            batch["tokens_BT"][b, start:end], batch["targets_BT"][b, start:end] = document[:-1], document[1:]
            batch["positions_BT"][b, start:end] = np.arange(end - start)
            batch["segments_BT"][b, start:end], batch["mask_BT"][b, start:end] = segment, True
            start, segment = end, segment + 1
    batch["mask_BT"][B - 1] = False
    batch["weight_BT"] = np.asarray(token_weights(batch["mask_BT"]))
    return {name: x.reshape(M, B // M, T) for name, x in batch.items()}


@pytest.fixture(scope="session")
def tiny():
    """A function: fields of DecoderConfig -> a tiny float32 decoder's config, every dimension of another length."""
    return _tiny


@pytest.fixture(scope="session")
def built():
    """A function: config -> (model, params), made once; no scale is 1 and no bias 0."""
    return _built


@pytest.fixture(scope="session")
def packed_batch():
    """A function: M, B, T -> packed documents of ragged lengths as [M, B / M, T] arrays, the last row masked."""
    return _packed_batch


@pytest.fixture(scope="session")
def untrained(tmp_path_factory):
    """A function: sequence length -> a byte-level run directory, made once, never trained, with checkpoints 1 and 2 of
    different parameters.
    """

    @functools.cache
    def made(sequence_length: int) -> Path:
        sizes = dict(num_layers=1, width=16, mlp_width=16, num_heads=2, num_kv_heads=1, head_width=8)
        config = common.llama(operand_dtype="float32", **sizes)
        values = {"model": config.to_dict(), "data": {"sequence_length": sequence_length}}
        directory = workdir.open(tmp_path_factory.mktemp("untrained") / "run", values)
        byte_tokenizer().save(directory / "tokenizer")
        model = build(section(DecoderConfig, config).with_vocabulary(288))
        with checkpoint.open(directory / "checkpoints") as checkpoints:
            for step in (1, 2):
                params = jax.tree.map(lambda x: 3 * x, jax.jit(model.init)(jax.random.key(step)))
                checkpoints.save(step, {"params": params}, position=None, meta={})
        return directory

    return made


@pytest.fixture(params=[(1, 4, 2), (2, 2, 2)], ids=lambda shape: "x".join(map(str, shape)))
def mesh(request):
    """A mesh of replica x fsdp x tensor devices, set: each that the tests use."""
    mesh = _mesh(*request.param)
    with jax.set_mesh(mesh):
        yield mesh


def _mesh(replica: int, fsdp: int, tensor: int):
    return sharding.mesh(sharding.MeshConfig(replica, fsdp, tensor), jax.devices()[: replica * fsdp * tensor])


@pytest.fixture(scope="session")
def make_mesh():
    """A function: replica, fsdp, tensor -> the mesh over the first devices."""
    return _mesh


@pytest.fixture(scope="session")
def array_sizes():
    """A function: jaxpr -> the size of every array that it or a program inside it makes."""

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (variable.aval.size for variable in equation.outvars if hasattr(variable.aval, "size"))
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from sizes(inner)

    return sizes


@pytest.fixture(scope="session")
def golden():
    """A function: name of a family -> the files of a small tokenizer of it, and what transformers makes of texts."""
    folder = ROOT / "tests" / "interop" / "golden"
    return functools.cache(lambda name: json.loads((folder / f"tokenizer_{name}.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="session")
def theirs(golden, tmp_path_factory):
    """A function: name -> that tokenizer, read from its folder."""

    @functools.cache
    def theirs(name):
        folder = tmp_path_factory.mktemp(name)
        for file, content in golden(name)["files"].items():
            text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
            (folder / file).write_text(text, encoding="utf-8")
        return hub.read(folder)

    return theirs
