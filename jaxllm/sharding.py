"""The device mesh, and the placement of every array on it by the letters of its dimensions.

The mesh is explicit and has three axes: ``replica`` (whole copies of the parameters), ``fsdp`` (shards of parameters
and batch) and ``tensor`` (shards of heads, mlp and vocabulary). What "pjit" named is spelled ``jax.jit`` over this
mesh.
"""

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxllm import tree

# The mesh axes of each dimension: of an activation, and of a parameter where they differ.
ACTIVATION_AXES = {"b": ("replica", "fsdp"), "n": "tensor", "k": "tensor", "f": "tensor", "v": "tensor"}
PARAMETER_AXES = {"d": "fsdp", "n": "tensor", "k": "tensor", "f": "tensor", "v": "tensor"}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes. ``fsdp=-1`` takes all devices that the other two leave."""

    replica: int
    fsdp: int
    tensor: int

    def __post_init__(self):
        for axis in ("replica", "tensor"):
            if getattr(self, axis) < 1:
                raise ValueError(f"mesh.{axis}={getattr(self, axis)} must be at least 1")
        if self.fsdp < 1 and self.fsdp != -1:
            raise ValueError(f"mesh.fsdp={self.fsdp} must be at least 1, or -1 for all devices that are left")


def mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """The mesh of ``config`` over ``devices`` (all, unless told)."""
    devices = jax.devices() if devices is None else devices
    others = config.replica * config.tensor
    fsdp = config.fsdp if config.fsdp > 0 else max(1, len(devices) // others)
    if others * fsdp != len(devices):
        raise ValueError(
            f"mesh.replica={config.replica} x mesh.fsdp={fsdp} x mesh.tensor={config.tensor} "
            f"is {others * fsdp} devices, but there are {len(devices)}; "
            f"make the product {len(devices)}, or set mesh.fsdp=-1"
        )
    return jax.make_mesh(
        (config.replica, fsdp, config.tensor),
        ("replica", "fsdp", "tensor"),
        axis_types=(AxisType.Explicit,) * 3,
        devices=devices,
    )


def spec(letters: str) -> PartitionSpec | None:
    """The placement of an activation with these dimensions (``'btd'``); None where no mesh is set, so that the same
    model runs bare.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return None
    return PartitionSpec(*(ACTIVATION_AXES.get(letter) for letter in letters))


def place(x: jax.Array, letters: str) -> jax.Array:
    """``x`` moved to the placement of ``letters``; as it is where no mesh is set."""
    return x if spec(letters) is None else jax.reshard(x, spec(letters))


def gathered(x: jax.Array) -> jax.Array:
    """``x`` whole on every shard of a batch, still cut over ``tensor``; as it is where no mesh is set."""
    named = jax.typeof(x).sharding
    if named.mesh.empty:
        return x
    return jax.reshard(x, PartitionSpec(*(None if axis in ACTIVATION_AXES["b"] else axis for axis in named.spec)))


def parameter_spec(letters: str) -> PartitionSpec:
    """The placement of a parameter with these dimensions (``'ldnh'``)."""
    return PartitionSpec(*(PARAMETER_AXES.get(letter) for letter in letters))


def parameter_shardings(table, abstract_params: tree.Tree, on: Mesh) -> tree.Tree:
    """A ``NamedSharding`` per parameter from the model's table of (name pattern, letters).

    Raises ``ValueError`` where a name matches no row or two, where the letters do not fit the rank, and where a mesh
    axis does not divide the dimension that it shards.
    """

    def sharding(name, leaf, letters):
        if len(letters) != len(leaf.shape):
            raise ValueError(
                f"{name} has shape {leaf.shape}, but its row of the table names the dimensions {letters!r}"
            )
        named = NamedSharding(on, parameter_spec(letters))
        for letter, length, axis in zip(letters, leaf.shape, named.spec, strict=True):
            if axis is not None and length % on.shape[axis]:
                raise ValueError(
                    f"{name}: dimension {letter!r} of length {length} is not a multiple of "
                    f"mesh.{axis}={on.shape[axis]}; change one of them"
                )
        return named

    return tree.map_named(sharding, abstract_params, tree.match(table, abstract_params))


def with_shardings(abstract: tree.Tree, on: Mesh) -> tree.Tree:
    """``abstract`` with each leaf's sharding made concrete on the mesh; leaves without one are replicated."""

    def placed(leaf):
        partition = leaf.sharding.spec if leaf.sharding is not None else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(on, partition))

    return jax.tree.map(placed, abstract)


def global_batch(batch: dict[str, np.ndarray], on: Mesh) -> dict[str, jax.Array]:
    """Global device arrays from this process's rows: leaves [M, rows of this process, ...], rows sharded over replica
    and fsdp.

    The global row count must be a multiple of replica x fsdp (``ValueError``).
    """
    rows_sharding = _rows_sharding(next(iter(batch.values())).shape[1] * jax.process_count(), on)
    return {key: jax.make_array_from_process_local_data(rows_sharding, value) for key, value in batch.items()}


def whole_batch(batch: dict[str, np.ndarray], on: Mesh) -> dict[str, jax.Array]:
    """Global device arrays, sharded as ``global_batch``'s, from a batch [M, B, ...] that every process holds whole.

    Rows keep their places, so that what is said of them can be read back by them. Raises as ``global_batch`` does.
    """
    rows_sharding = _rows_sharding(next(iter(batch.values())).shape[1], on)
    put = jax.make_array_from_callback
    return {key: put(value.shape, rows_sharding, value.__getitem__) for key, value in batch.items()}


def _rows_sharding(rows: int, on: Mesh) -> NamedSharding:
    """Of [M, rows, ...]; ``ValueError`` where the rows do not divide."""
    if rows % data_parallelism(on):
        raise ValueError(
            f"a micro-batch of {rows} sequences is not a multiple of mesh replica x fsdp = {data_parallelism(on)}; "
            "raise batch_size, or lower micro_batches or the mesh"
        )
    return NamedSharding(on, PartitionSpec(None, ACTIVATION_AXES["b"]))


def data_parallelism(on: Mesh) -> int:
    """Over how many shards the rows of a batch are spread."""
    return math.prod(on.shape[axis] for axis in ACTIVATION_AXES["b"])


def whole_shards(rows: int) -> int:
    """So many rows, or the fewest more that spread evenly over the mesh that is set."""
    on = jax.sharding.get_abstract_mesh()
    return rows if on.empty else rows + -rows % data_parallelism(on)
