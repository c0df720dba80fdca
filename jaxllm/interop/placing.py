"""Which arrays of a file are which parameter, and how they come to lie there: the same for every format."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import tree
from jaxllm.interop import families
from jaxllm.interop.families import Tensor
from jaxllm.tree import Tree

SHOWN = 8  # names spelled out in one message

Progress = Callable[[int, int], None]  # (bytes read so far, of how many)


class Entry(Protocol):
    """Where an array lies in a file."""

    shape: tuple[int, ...]

    @property
    def bytes(self) -> int: ...


Matched = Mapping[str, tuple[Tensor, list[Entry]]]  # parameter -> its row of the table, where its layers lie


def layered(tensor: Tensor) -> bool:
    """Whether there is an array for each layer."""
    return "{}" in tensor.name


def matched(
    tensors: Sequence[Tensor],
    abstract: Tree,
    found: Mapping[str, Entry],
    *,
    known: Collection[str],
    what: str,
    model: str,
) -> Matched:
    """The arrays of every parameter of the abstract tree, by the table ``tensors``.

    Raises ``ValueError`` for arrays that are missing, have another shape, or are neither a parameter's nor ``known``:
    ``what`` they are called and whose ``model`` they should be is said in it.
    """
    table = {tensor.parameter: tensor for tensor in tensors}
    found_of, missing, wrong, others = {}, [], [], set(found) - set(known)
    for name, leaf in zip(tree.names(abstract), jax.tree.leaves(abstract), strict=True):
        tensor = table[name]
        names = [tensor.name.format(layer) for layer in range(leaf.shape[0])] if layered(tensor) else [tensor.name]
        shape = families.their_shape(tensor, _of_one(tensor, leaf.shape))
        there = {each: found[each] for each in names if each in found}
        missing += [each for each in names if each not in found]
        wrong += [f"{each} is {entry.shape} and not {shape}" for each, entry in there.items() if entry.shape != shape]
        others -= set(names)
        found_of[name] = tensor, list(there.values())
    for fault, names in (("are missing", missing), ("have other shapes", wrong), ("are not known", others)):
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            raise ValueError(f"{what} {fault}, of {model}: {', '.join(sorted(names)[:SHOWN])}{more}")
    return found_of


def placed(
    abstract: Tree,
    arrays: Matched,
    read: Callable[[Tensor, Entry, tuple[int, ...]], np.ndarray],
    *,
    shardings: Tree = None,
    progress: Progress | None = None,
) -> Tree:
    """The parameters in float32, each where ``shardings`` say, or on the first device; one array is read at a time.

    ``read(tensor, entry, shape)`` gives an array as ours of this shape.
    """
    done, total = [0], sum(entry.bytes for _, entries in arrays.values() for entry in entries)
    if shardings is None:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: here, abstract)

    def counted(tensor: Tensor, entry: Entry, shape: tuple[int, ...]) -> np.ndarray:
        array = read(tensor, entry, shape)
        done[0] += entry.bytes
        if progress is not None:
            progress(done[0], total)
        return array

    def parameter(name: str, leaf: jax.ShapeDtypeStruct, sharding) -> jax.Array:
        tensor, entries = arrays[name]
        each = (counted(tensor, entry, _of_one(tensor, leaf.shape)) for entry in entries)
        on_host = all(device.platform == "cpu" for device in sharding.addressable_devices)
        return (filled if on_host else stacked)(each, leaf.shape, sharding, layered=layered(tensor))

    return tree.map_named(parameter, abstract, shardings)


def filled(arrays: Iterable[np.ndarray], shape: tuple[int, ...], sharding, *, layered: bool) -> jax.Array:
    """A float32 parameter out of its layers, where devices share the host's memory: written once, where it stays."""
    cuts = sharding.addressable_devices_indices_map(shape)
    parts = {device: _aligned(_lengths(cut, shape)) for device, cut in cuts.items()}
    for layer, array in enumerate(arrays):
        for device, cut in cuts.items():
            np.copyto(parts[device][layer] if layered else parts[device], array[_inside(cut, layered)])
    arrays = [jax.device_put(part, device) for device, part in parts.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def stacked(arrays: Iterable[np.ndarray], shape: tuple[int, ...], sharding, *, layered: bool) -> jax.Array:
    """A float32 parameter out of its layers, each on its devices before the next is read."""
    cuts = sharding.addressable_devices_indices_map(shape)
    parts = {device: [] for device in cuts}
    for array in arrays:
        for device, cut in cuts.items():
            parts[device].append(jax.device_put(np.float32(array[_inside(cut, layered)]), device))
        jax.block_until_ready([own[-1] for own in parts.values()])
    wholes = [jnp.stack(own) if layered else own[0] for own in parts.values()]
    return jax.make_array_from_single_device_arrays(shape, sharding, wholes)


def _inside(cut: tuple[slice, ...], layered: bool) -> tuple[slice, ...]:
    """The cut of a single layer: layers themselves are on every device."""
    return cut[1:] if layered else cut


def _lengths(cut: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(len(range(*part.indices(length))) for part, length in zip(cut, shape, strict=True))


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Unset memory that JAX takes as it is: on a host's devices it copies what does not begin at a multiple of 64."""
    size = 4 * math.prod(shape)
    raw = np.empty(size + 64, np.uint8)
    begin = -raw.ctypes.data % 64
    return raw[begin : begin + size].view(np.float32).reshape(shape)


def _of_one(tensor: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a parameter, of one of its layers where it has them."""
    return shape[1:] if layered(tensor) else shape
