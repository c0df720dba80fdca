import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import sharding
from jaxllm.sharding import MeshConfig


def test_the_mesh_has_three_explicit_axes_and_fsdp_takes_what_is_left():
    mesh = sharding.mesh(MeshConfig(replica=2, fsdp=-1, tensor=2))
    assert dict(mesh.shape) == {"replica": 2, "fsdp": 2, "tensor": 2}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Explicit}
    assert sharding.mesh(MeshConfig(1, -1, 1), jax.devices()[:3]).shape["fsdp"] == 3


@pytest.mark.parametrize("sizes", [(1, 4, 1), (3, -1, 1), (2, 8, 1), (16, -1, 1)])
def test_a_mesh_that_is_not_all_devices_is_refused_with_the_product(sizes):
    with pytest.raises(
        ValueError, match=r"mesh\.replica=\d+ x mesh\.fsdp=\d+ x mesh\.tensor=\d+ is \d+ devices, but there are 8"
    ):
        sharding.mesh(MeshConfig(*sizes))


@pytest.mark.parametrize("axis", ["replica", "fsdp", "tensor"])
def test_mesh_sizes_below_one_are_refused(axis):
    with pytest.raises(ValueError, match=rf"mesh\.{axis}=0 must be at least 1"):
        MeshConfig(**({"replica": 1, "fsdp": 1, "tensor": 1} | {axis: 0}))
    with pytest.raises(ValueError, match=r"mesh\.tensor=-1 must be at least 1"):
        MeshConfig(1, 1, -1)


def test_without_a_mesh_nothing_is_placed():
    x_BT = jnp.ones((2, 3))
    assert sharding.spec("bt") is None
    assert sharding.place(x_BT, "bt") is x_BT


def test_letters_decide_where_activations_and_parameters_lie(make_mesh):
    with jax.set_mesh(make_mesh(2, 2, 2)):
        assert sharding.spec("btnh") == jax.P(("replica", "fsdp"), None, "tensor", None)
        assert sharding.spec("btd") == jax.P(("replica", "fsdp"), None, None)
        assert sharding.spec("bt.") == jax.P(("replica", "fsdp"), None, None)
        moved = sharding.place(jnp.arange(16.0).reshape(4, 4), "bv")
        assert jax.typeof(moved).sharding.spec == jax.P(("replica", "fsdp"), "tensor")
        np.testing.assert_array_equal(moved, np.arange(16.0).reshape(4, 4))
    assert sharding.parameter_spec("ldkh") == jax.P(None, "fsdp", "tensor", None)
    assert sharding.parameter_spec("lfd") == jax.P(None, "tensor", "fsdp")
    assert sharding.parameter_spec("l.") == jax.P(None, None)


def test_a_parameter_that_does_not_fit_its_row_is_named(make_mesh):
    table, mesh = [("w", "df")], make_mesh(1, 4, 2)
    with pytest.raises(
        ValueError, match=r"w has shape \(4, 2, 3\), but its row of the table names the dimensions 'df'"
    ):
        sharding.parameter_shardings(table, {"w": jax.ShapeDtypeStruct((4, 2, 3), "float32")}, mesh)
    with pytest.raises(ValueError, match=r"w: dimension 'f' of length 3 is not a multiple of mesh\.tensor=2"):
        sharding.parameter_shardings(table, {"w": jax.ShapeDtypeStruct((4, 3), "float32")}, mesh)
    with pytest.raises(ValueError, match=r"w: dimension 'd' of length 6 is not a multiple of mesh\.fsdp=4"):
        sharding.parameter_shardings(table, {"w": jax.ShapeDtypeStruct((6, 2), "float32")}, mesh)
    with pytest.raises(ValueError, match=r"u of shape \(4, 2\) matches 0 rows"):
        sharding.parameter_shardings(table, {"u": jax.ShapeDtypeStruct((4, 2), "float32")}, mesh)
    placed = sharding.parameter_shardings(table, {"w": jax.ShapeDtypeStruct((4, 2), "float32")}, mesh)
    assert placed["w"] == jax.NamedSharding(mesh, jax.P("fsdp", "tensor"))


def test_leaves_without_a_sharding_are_replicated(make_mesh):
    mesh = make_mesh(1, 4, 2)
    abstract_mesh = jax.ShapeDtypeStruct((4,), "float32", sharding=jax.NamedSharding(mesh.abstract_mesh, jax.P("fsdp")))
    placed = sharding.with_shardings({"a": abstract_mesh, "b": jax.ShapeDtypeStruct((), "int32")}, mesh)
    assert placed["a"].sharding == jax.NamedSharding(mesh, jax.P("fsdp"))
    assert placed["b"].sharding == jax.NamedSharding(mesh, jax.P()) and placed["b"].dtype == np.int32


@pytest.mark.parametrize("put", [sharding.global_batch, sharding.whole_batch])
def test_rows_of_a_batch_are_spread_over_replica_and_fsdp(make_mesh, put):
    mesh = make_mesh(2, 2, 2)
    assert sharding.data_parallelism(mesh) == 4
    tokens_MBT = np.arange(2 * 4 * 3).reshape(2, 4, 3)
    placed = put({"tokens_BT": tokens_MBT}, mesh)["tokens_BT"]
    np.testing.assert_array_equal(placed, tokens_MBT)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 1, 3)}


@pytest.mark.parametrize("put", [sharding.global_batch, sharding.whole_batch])
def test_a_batch_that_the_mesh_does_not_divide_is_refused(make_mesh, put):
    with pytest.raises(ValueError, match=r"a micro-batch of 6 sequences is not a multiple of mesh replica x fsdp = 4"):
        put({"tokens_BT": np.zeros((1, 6, 3))}, make_mesh(2, 2, 2))


def test_rows_of_a_whole_batch_keep_their_places_whatever_process_owns_which_devices(monkeypatch):
    """A process gives each of its devices the rows of that device's place, not the next of its own."""
    devices = np.array(jax.devices()[:4])[[2, 0, 3, 1]].reshape(1, 4, 1)
    mesh = jax.sharding.Mesh(devices, ("replica", "fsdp", "tensor"))
    tokens_MBT = np.arange(2 * 4 * 3).reshape(2, 4, 3)
    placed = sharding.whole_batch({"tokens_BT": tokens_MBT}, mesh)["tokens_BT"]
    for shard in placed.addressable_shards:
        np.testing.assert_array_equal(shard.data, tokens_MBT[shard.index])
    monkeypatch.setattr(jax, "process_count", lambda: 2)  # whoever asks takes its own rows alone
    again = sharding.whole_batch({"tokens_BT": tokens_MBT}, mesh)["tokens_BT"]
    np.testing.assert_array_equal(again, tokens_MBT)


def test_gathered_parameters_are_whole_for_every_row_and_still_cut_over_heads(make_mesh):
    mesh = make_mesh(2, 2, 2)
    x_DF = np.arange(32.0).reshape(4, 8)
    with jax.set_mesh(mesh):
        given = jax.device_put(x_DF, jax.NamedSharding(mesh, jax.P("fsdp", "tensor")))
        whole = jax.jit(sharding.gathered)(given)
    assert whole.sharding.spec == jax.P(None, "tensor")
    np.testing.assert_array_equal(whole, x_DF)
    assert sharding.gathered(given := jax.numpy.ones((2, 2))) is given
