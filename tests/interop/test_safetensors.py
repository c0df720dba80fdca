import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxllm.interop import safetensors as ours

DRAW = np.random.default_rng(0)


def arrays(dtype) -> dict[str, np.ndarray]:
    return {"b": DRAW.normal(size=(3, 5)).astype(dtype), "a": DRAW.normal(size=(2, 2, 7)).astype(dtype)}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_the_formats_own_package_writes_is_read_bit_for_bit(tmp_path, dtype):
    written = arrays(jnp.dtype(dtype))
    safetensors.numpy.save_file(written, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = ours.entries(tmp_path / "x.safetensors")
    assert set(found) == {"a", "b"}
    for name, array in written.items():
        read = ours.read(found[name])
        assert (read.dtype, read.shape) == (array.dtype, array.shape)
        assert read.tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_formats_own_package_reads_what_is_written(tmp_path, dtype):
    written = arrays(jnp.dtype(dtype))
    path = tmp_path / "x.safetensors"
    ours.write(path, {name: x.shape for name, x in written.items()}, iter(written.values()), dtype)
    for name, array in safetensors.numpy.load_file(path).items():
        assert (array.dtype, array.tobytes()) == (written[name].dtype, written[name].tobytes())
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_transposed_view_is_written_in_its_own_order(tmp_path):
    x = np.arange(6, dtype=np.float32).reshape(2, 3).T
    ours.write(tmp_path / "x.safetensors", {"x": (3, 2)}, [x], "float32")
    np.testing.assert_array_equal(safetensors.numpy.load_file(tmp_path / "x.safetensors")["x"], x)


def test_a_write_that_fails_leaves_no_file(tmp_path):
    def failing():
        yield np.zeros(3, np.float32)
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        ours.write(tmp_path / "x.safetensors", {"a": (3,), "b": (3,)}, failing(), "float32")
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("array", [np.zeros(4, np.float32), np.zeros(3, np.float64)])
def test_an_array_that_is_not_what_was_said_is_refused(tmp_path, array):
    with pytest.raises(ValueError, match=r"a is float\d\d \(\d,\), not float32 \(3,\)"):
        ours.write(tmp_path / "x.safetensors", {"a": (3,)}, [array], "float32")


def test_a_file_that_was_cut_short_is_refused_by_name_before_anything_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(arrays("float32"), path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"x\.safetensors was cut short: \w ends at byte \d+, the file at \d+"):
        ours.entries(path)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match=r"no safetensors file, or was cut short"):
        ours.entries(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"no safetensors file, or was cut short"):
        ours.entries(path)


def headed(path, header: str):
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(8))
    return path


@pytest.mark.parametrize("header", ["nope", "[1]", "[]", "7", "[" * 100_000], ids=lambda header: header[:9])
def test_a_header_that_is_no_json_object_is_refused(tmp_path, header):
    with pytest.raises(ValueError, match=r"x\.safetensors is no safetensors file: its header is not a JSON object \("):
        ours.entries(headed(tmp_path / "x.safetensors", header))


@pytest.mark.parametrize(
    "said, message",
    [
        ({"shape": [3]}, r"x\.safetensors: a has 8 bytes, not the 12 of F32 \(3,\)"),
        ({"shape": [2.0]}, r"x\.safetensors is damaged in what its header says of a \(TypeError\(.*'float'"),
        ({"shape": [-1, -2]}, r"says of a \(ValueError\('shape \(-1, -2\)"),
        ({"shape": None}, r"says of a \(TypeError"),
        ({"dtype": ["F32"]}, r"x\.safetensors: a has the dtype \['F32'\]; known are"),
        ({"data_offsets": [-8, 0]}, r"says of a \(ValueError\(.*offsets \(-8, 0\)"),
        ({"data_offsets": [0, 4, 8]}, r"says of a \(ValueError\(.*offsets \(0, 4, 8\)"),
    ],
)
def test_what_a_header_says_wrongly_of_an_array_is_refused_with_its_name(tmp_path, said, message):
    whole = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | said
    with pytest.raises(ValueError, match=message):
        ours.entries(headed(tmp_path / "x.safetensors", json.dumps({"a": whole})))


@pytest.mark.parametrize("said", ["F32", {"dtype": "F32", "shape": [2]}, {"shape": [2], "data_offsets": [0, 8]}])
def test_what_a_header_does_not_say_of_an_array_is_refused_with_its_name(tmp_path, said):
    with pytest.raises(ValueError, match=r"x\.safetensors is damaged in what its header says of a \(.*fetch it again"):
        ours.entries(headed(tmp_path / "x.safetensors", json.dumps({"a": said})))


def test_an_unknown_dtype_is_named_with_its_array(tmp_path):
    safetensors.numpy.save_file({"quantised": np.zeros(3, np.int8)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"quantised has the dtype I8; known are \['BF16', 'F16', 'F32'\]"):
        ours.entries(tmp_path / "x.safetensors")


def test_shards_keep_the_order_and_the_limit():
    shapes = {"a": (4,), "b": (4,), "c": (100,), "d": (1,), "e": (1,)}
    assert [list(shard) for shard in ours.shards(shapes, "float32", 32)] == [["a", "b"], ["c"], ["d", "e"]]
    assert [list(shard) for shard in ours.shards(shapes, "float16", 10**9)] == [list("abcde")]
