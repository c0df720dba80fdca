import struct

import gguf
import numpy as np
import pytest

from jaxllm.interop import gguf_format
from jaxllm.interop.gguf_format import Planned

KINDS = gguf.GGMLQuantizationType
METADATA = {
    "general.architecture": "llama",
    "a.text": "é\n",
    "a.number": 7,
    "a.float": 1e-5,
    "a.flag": True,
    "a.texts": ["x", "", "日本"],
    "a.numbers": [3, -1],
    "a.floats": [0.5, -2.0],
    "a.flags": [True, False],
}


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture
def theirs(tmp_path):
    """A function: arrays, each with its kind -> a file that the package writes."""

    def written(name="theirs.gguf", metadata=(), **arrays):
        writer = gguf.GGUFWriter(tmp_path / name, "llama")
        for add, key, value in metadata:
            getattr(writer, f"add_{add}")(key, value)
        for each, (array, kind) in arrays.items():
            raw = array if array.dtype == np.uint8 else gguf.quants.quantize(array, KINDS[kind])
            writer.add_tensor(each, raw, raw_dtype=KINDS[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / name

    return written


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_arrays_that_the_package_packs_are_read_as_it_unpacks_them(theirs, kind):
    array = drawn(70, 64)
    path = theirs(array=(array, kind), vector=(array[0], "F32"))
    metadata, found = gguf_format.header(path)
    read = gguf_format.read(found["array"])
    assert metadata["general.architecture"] == "llama" and read.shape == (70, 64) and read.dtype == np.float32
    packed = gguf.quants.quantize(array, KINDS[kind])
    np.testing.assert_array_equal(read, gguf.quants.dequantize(packed, KINDS[kind]))
    np.testing.assert_allclose(read, array, atol=0.5 if kind.startswith("Q4") else 0.05)
    np.testing.assert_array_equal(gguf_format.read(found["vector"]), array[0])


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_blocks_of_256_are_read_as_the_package_unpacks_them(theirs, kind):
    width = gguf.GGML_QUANT_SIZES[KINDS[kind]][1]
    raw = np.random.default_rng(1).integers(0, 60, (5, 2 * width), np.uint8)  # small bytes: their float16 are finite
    read = gguf_format.read(gguf_format.header(theirs(array=(raw, kind)))[1]["array"])
    assert read.shape == (5, 512) and len(np.unique(read)) > 50
    np.testing.assert_array_equal(read, gguf.quants.dequantize(raw, KINDS[kind]))


def test_a_block_of_q8_0_is_32_integers_times_their_scale(theirs):
    raw = np.concatenate([np.array([0.5], np.float16).view(np.uint8), np.arange(-16, 16, dtype=np.int8).view(np.uint8)])
    read = gguf_format.read(gguf_format.header(theirs(array=(raw[None], "Q8_0")))[1]["array"])
    np.testing.assert_array_equal(read, [np.arange(-16, 16) / 2])


def test_arrays_of_many_pieces_are_read_whole(theirs, monkeypatch):
    monkeypatch.setattr(gguf_format, "_CHUNK", 100)
    array = drawn(7, 64)
    found = gguf_format.header(theirs(array=(array, "F32"), cube=(array.reshape(7, 2, 32), "F32")))[1]
    np.testing.assert_array_equal(gguf_format.read(found["array"]), array)
    np.testing.assert_array_equal(gguf_format.read(found["cube"]), array.reshape(7, 2, 32))


def test_floats_are_the_shortest_number_that_was_meant(theirs):
    path = theirs(metadata=[("float32", "a.eps", 1e-5), ("float64", "a.pi", np.pi), ("uint64", "a.big", 2**40)])
    said = gguf_format.header(path)[0]
    assert said["a.eps"] == 1e-5 and said["a.pi"] == np.pi and said["a.big"] == 2**40


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_what_is_written_is_what_the_package_reads(tmp_path, kind):
    arrays = {"one": drawn(3, 64), "two": drawn(5), "three": drawn(2, 3, 32)}
    plans = {"one": Planned((3, 64), kind), "two": Planned((5,), "F32"), "three": Planned((2, 3, 32), kind)}
    gguf_format.write(tmp_path / "ours.gguf", METADATA, plans, arrays.values())
    reader = gguf.GGUFReader(tmp_path / "ours.gguf")
    for key, value in METADATA.items():
        found = reader.get_field(key).contents()
        assert found == value or np.allclose(found, value), key
    for tensor in reader.tensors:
        plan, array = plans[tensor.name], arrays[tensor.name]
        assert tensor.tensor_type.name == plan.kind and tuple(tensor.shape[::-1]) == array.shape
        packed = gguf.quants.quantize(array, KINDS[plan.kind])
        assert tensor.data.tobytes() == packed.tobytes() and tensor.data_offset % gguf_format.ALIGNMENT == 0
    metadata, found = gguf_format.header(tmp_path / "ours.gguf")
    assert metadata == METADATA and [*found] == [*plans]


@pytest.mark.parametrize(
    "shape, dtype, kind",
    [((8,), "float16", "F32"), ((8, 64), "q8_0", "Q8_0"), ((8, 40), "q8_0", "F16"), ((8, 40), "bfloat16", "BF16")],
)
def test_vectors_stay_whole_and_rows_that_are_no_blocks_are_float16(shape, dtype, kind):
    assert gguf_format.planned(shape, dtype) == Planned(shape, kind)


def test_an_empty_list_is_one(tmp_path):
    gguf_format.write(tmp_path / "ours.gguf", {"a": [], "b": 1}, {}, [])
    assert gguf_format.header(tmp_path / "ours.gguf")[0] == {"a": [], "b": 1}


def test_numbers_beyond_float16_are_refused_and_leave_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"one has numbers up to 1e\+05, float16 up to 65504"):
        plans = {"one": Planned((1, 2), "F16")}
        gguf_format.write(tmp_path / "ours.gguf", METADATA, plans, [np.array([[1.0, 1e5]], np.float32)])
    assert not (tmp_path / "ours.gguf").exists()


def test_an_array_of_another_shape_than_was_said_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"one is \(2, 1\), not \(1, 2\)"):
        gguf_format.write(tmp_path / "ours.gguf", METADATA, {"one": Planned((1, 2), "F32")}, [drawn(2, 1)])


def test_files_that_are_cut_into_several_are_read_together(theirs):
    split = [("uint16", "split.count", 2)]
    second = theirs("m-00002-of-00002.gguf", [("uint16", "split.no", 1), *split], b=(drawn(2, 32, seed=2), "F32"))
    first = theirs("m-00001-of-00002.gguf", [("uint16", "split.no", 0), *split], a=(drawn(2, 32, seed=1), "F32"))
    for given in (first, second):
        metadata, found = gguf_format.header(given)
        assert sorted(found) == ["a", "b"] and metadata["split.no"] == 0
    np.testing.assert_array_equal(gguf_format.read(found["b"]), drawn(2, 32, seed=2))
    second.unlink()
    with pytest.raises(FileNotFoundError, match=r"one of 2 files, and \['m-00002-of-00002.gguf'\] are not beside it"):
        gguf_format.header(first)


def test_an_array_that_is_packed_in_an_unknown_way_is_named(theirs):
    path = theirs(array=(np.zeros((1, 84), np.uint8), "Q2_K"))
    with pytest.raises(ValueError, match=r"array is packed as Q2_K; known are .*Q6_K"):
        gguf_format.header(path)


def test_a_file_cut_short_anywhere_is_refused(theirs):
    path = theirs(array=(drawn(4, 32), "F32"), metadata=[("array", "a.texts", ["some", "texts"])])
    whole = path.read_bytes()
    for length in (*range(4, len(whole) - 512, 7), len(whole) - 512, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="was cut short"):
            gguf_format.header(path)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"PK\x03\x04 something", "is no GGUF file"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(16), "GGUF of version 1"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(16), "little endian"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**60), "cut short, or is broken"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"a", 77) + bytes(99), "of the kind 77"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 77, 1) + bytes(99), "of the kind 77"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 1, 0, 1, b"a", 0, 0, 0) + bytes(99), r"a has the shape \(\), no rows"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"a", 1, 33, 8, 0) + bytes(99), r"a has the shape \(33,\)"),
    ],
)
def test_what_is_no_such_file_is_refused(tmp_path, content, message):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        gguf_format.header(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({"general.alignment": 0}, "x.gguf has general.alignment=0, no whole number from 1 on; is it broken"),
        ({"general.alignment": "32"}, "x.gguf has general.alignment='32', no whole number"),
        ({"split.count": "2"}, "x.gguf has split.count='2', no whole number from 0 on"),
    ],
)
def test_numbers_that_say_where_things_lie_and_cannot_be_are_named(tmp_path, metadata, message):
    gguf_format.write(tmp_path / "x.gguf", metadata, {}, [])
    with pytest.raises(ValueError, match=message):
        gguf_format.header(tmp_path / "x.gguf")


def test_files_that_were_joined_again_are_one(tmp_path):
    """llama.cpp's `gguf-split --merge` leaves the count of files in the metadata and makes it 0."""
    gguf_format.write(tmp_path / "x.gguf", {"split.count": 0}, {"a": Planned((2,), "F32")}, [drawn(2)])
    assert [*gguf_format.header(tmp_path / "x.gguf")[1]] == ["a"]


def test_a_missing_package_is_named(theirs, monkeypatch):
    path = theirs(array=(drawn(1, 32), "F32"))
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ValueError, match=r"GGUF files need a package: pip install gguf==0"):
        gguf_format.header(path)
