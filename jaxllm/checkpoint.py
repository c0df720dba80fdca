"""Save and restore a training state, whole or not at all, strictly, on any number of devices.

A step's directory holds ``state`` (arrays under their path names), ``position`` and ``meta`` (JSON), and ``files.json``
with the size of every file. It appears by one rename; what disagrees with its ``files.json`` is never loaded.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from jaxllm import tree

FILES = "files.json"
ABSENT = "absent"
SHOWN = 8  # differences spelled out in one message

logger = logging.getLogger(__name__)
# Orbax warns of files that it does not need, and logs the stack of each error that it raises as well.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


class Restored(NamedTuple):
    """The state on its devices, the loader's position, and the meta as it was saved."""

    state: Any
    position: Any
    meta: dict


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run, for the one job that writes them: made by ``open``, ended by ``close``."""

    directory: epath.Path
    orbax: ocp.CheckpointManager

    @property
    def latest_step(self) -> int | None:
        """The newest step that lies whole on the disk; None where there is none."""
        return next(whole_steps(self.directory), None)

    def save(
        self, step: int, state: Any, *, position: Any, meta: Mapping, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Copy ``state`` to the host, then write it in the background; waits for the save before this one.

        ``state`` is a pytree of jax arrays, free to be donated on return. ``position`` and ``meta`` are JSON-able and
        equal on every process. ``metrics`` feed ``keep_best``. A step that is already saved is left alone. Raises
        ``OSError`` if this save, or the one before it, cannot be written, ``ValueError`` for a step older than the
        newest or for a leaf that cannot be stored.
        """
        self.wait()
        newest = self.latest_step
        if step == newest:
            return
        if newest is not None and step < newest:
            raise ValueError(
                f"step {step} is older than checkpoint {newest} in {self.directory}: "
                "restore that one, or use a new directory"
            )
        items = {
            "state": ocp.args.PyTreeSave(_storable(state)),
            "position": ocp.args.JsonSave(_plain("position", position)),
            "meta": ocp.args.JsonSave(_plain("meta", meta)),
        }
        numbers = {name: float(value) for name, value in (metrics or {}).items()}
        with _disk_errors(self.directory, f"saving step {step}"):
            self.orbax.save(step, args=ocp.args.Composite(**items), metrics=numbers, force=True)

    def restore(self, template: Any, meta: Mapping, *, step: int | None = None, ignore: Sequence[str] = ()) -> Restored:
        """Read the newest whole step, or ``step``, into the shapes, dtypes and shardings of ``template``.

        ``template`` holds ``jax.ShapeDtypeStruct`` (or arrays); a leaf without a sharding goes to the first device.
        ``meta`` must equal the saved one except under the dotted names in ``ignore`` (``"versions"``,
        ``"config.train.steps"``). Raises ``ValueError`` that names each difference with both values,
        ``FileNotFoundError`` if nothing whole is there.
        """
        path = self.directory / str(_whole_step(self.directory, step))
        saved_meta = _json(path, "meta")
        _require_same_meta(path, differences(saved_meta, meta), ignore)
        wanted = dict(zip(tree.names(template), jax.tree.leaves(template), strict=True))
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            _require_same_leaves(path, _stored(reader, path), wanted)
            leaves = _read(reader, path, {name: leaf.sharding for name, leaf in wanted.items()})
        state = jax.tree.unflatten(jax.tree.structure(template), [leaves[name] for name in wanted])
        return Restored(state, _json(path, "position"), saved_meta)

    def wait(self) -> None:
        """Block until the last save lies whole on the disk; ``OSError`` if it failed."""
        with _disk_errors(self.directory, "saving in the background"):
            self.orbax.wait_until_finished()

    def close(self) -> None:
        """``wait``, then end the background threads."""
        with _disk_errors(self.directory, "saving in the background"):
            self.orbax.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def open(
    directory: Any, *, keep_last: int = 2, keep_best: int = 0, best_metric: str = "", best_mode: str = "min"
) -> Checkpoints:
    """Open a run's checkpoint directory for writing, creating it if need be.

    Keeps the ``keep_last`` newest steps and the ``keep_best`` whose ``best_metric`` is smallest (``best_mode="min"``)
    or largest (``"max"``). Unfinished saves are removed. A step cut short is renamed to ``<step>.damaged``, with a
    warning that says why. Raises ``ValueError`` for bad arguments, ``OSError`` for a directory that cannot be written.
    """
    if keep_last < 1 or keep_best < 0:
        raise ValueError(f"keep_last={keep_last} must be at least 1 and keep_best={keep_best} at least 0")
    if keep_best and not best_metric:
        raise ValueError(f"keep_best={keep_best} needs best_metric, the name of the metric to rank by")
    if best_mode not in ("min", "max"):
        raise ValueError(f"best_mode={best_mode!r} must be 'min' or 'max'")
    directory = epath.Path(directory).expanduser().absolute()
    with _disk_errors(directory, "opening"):
        directory.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            _set_aside_damaged(directory)
        options = _options(directory, keep_last, keep_best, best_metric, best_mode)
        return Checkpoints(directory, ocp.CheckpointManager(directory, options=options, handler_registry=_handlers()))


def restore_params(directory: Any, *, step: int | None = None, shardings: Any = None) -> dict:
    """The parameters alone, as the nested dict that was saved: for inference, beside a running job if need be.

    ``shardings`` is a tree of shardings with the same names; without it every array goes to the first local device.
    Raises ``FileNotFoundError`` if nothing whole is there, ``ValueError`` if ``shardings`` has other names.
    """
    path = epath.Path(directory).expanduser().absolute() / str(_whole_step(directory, step))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        names = [name for name in _stored(reader, path) if name.startswith("params/")]
        placed = dict.fromkeys(names)
        if shardings is not None:
            placed = dict(zip(tree.names({"params": shardings}), jax.tree.leaves(shardings), strict=True))
        if other := sorted(set(names) ^ set(placed)):
            raise ValueError(f"shardings do not fit the parameters of {path}: {other} are in only one of the two")
        return _nested(_read(reader, path, placed))["params"]


def read_meta(directory: Any, *, step: int | None = None) -> dict:
    """The meta saved with the newest whole step, or with ``step``."""
    return _json(epath.Path(directory).expanduser().absolute() / str(_whole_step(directory, step)), "meta")


def read_metrics(directory: Any, *, step: int | None = None) -> dict[str, float]:
    """What was measured when the newest whole step, or ``step``, was saved; empty where nothing was."""
    path = epath.Path(directory).expanduser().absolute() / str(_whole_step(directory, step)) / "metrics" / "metrics"
    return json.loads(path.read_text()) if path.exists() else {}


def whole_steps(directory: Any) -> Iterator[int]:
    """The steps that lie whole in ``directory``, newest first; warns of each newer one that does not."""
    for step in _step_numbers(directory):
        if fault := _fault(epath.Path(directory) / str(step)):
            logger.warning("checkpoint %s/%s is not whole: %s. Looking at the one before it.", directory, step, fault)
        else:
            yield step


def differences(saved: Mapping, current: Mapping) -> dict[str, tuple[Any, Any]]:
    """Dotted name -> (saved, current) of each value that differs in two nested dicts; ``"absent"`` if one lacks it."""
    old, new = _flat(saved), _flat(_plain("meta", current))
    return {
        name: (old.get(name, ABSENT), new.get(name, ABSENT))
        for name in sorted(old.keys() | new.keys())
        if old.get(name, ABSENT) != new.get(name, ABSENT)
    }


# ---- what is whole ----


def _step_numbers(directory: Any) -> list[int]:
    directory = epath.Path(directory)
    names = [path.name for path in directory.iterdir()] if directory.exists() else []
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def _fault(path: epath.Path) -> str:
    """Why the step at ``path`` is not whole; empty if it is."""
    try:
        sizes = json.loads((path / FILES).read_text())
    except (OSError, ValueError):
        return f"{FILES} is missing or cut short"
    for name, size in sizes.items():
        if not (path / name).exists():
            return f"{name} is missing"
        if (path / name).stat().length != size:
            return f"{name} has {(path / name).stat().length} bytes, not {size}"
    return ""


def _whole_step(directory: Any, step: int | None) -> int:
    if step is None:
        step = next(whole_steps(directory), None)
        if step is None:
            raise FileNotFoundError(
                f"no whole checkpoint in {directory} (steps there: {_step_numbers(directory)}). "
                "Name the checkpoints directory of a run that has saved at least once."
            )
    elif step not in _step_numbers(directory):
        raise FileNotFoundError(f"no checkpoint of step {step} in {directory}; it has {_step_numbers(directory)}")
    elif fault := _fault(epath.Path(directory) / str(step)):
        raise ValueError(
            f"checkpoint {directory}/{step} is not whole: {fault}. Choose another of {_step_numbers(directory)}."
        )
    return step


def _list_files(directory: epath.Path) -> None:
    """Write the size of every file into each save without a list; runs when all is written, just before the rename."""
    for path in directory.iterdir():
        if path.is_dir() and not (path / FILES).exists():
            items = [item for item in path.iterdir() if item.is_dir()]  # Orbax still changes the files beside them
            sizes = {str(file.relative_to(path)): file.stat().length for item in items for file in _files(item)}
            (path / FILES).write_text(json.dumps(sizes))


def _files(path: epath.Path) -> Iterator[epath.Path]:
    for inner in path.iterdir():
        yield from _files(inner) if inner.is_dir() else [inner]


def _set_aside_damaged(directory: epath.Path) -> None:
    whole = set(whole_steps(directory))
    for step in set(_step_numbers(directory)) - whole:
        names = (f"{step}.damaged{suffix}" for suffix in itertools.chain([""], itertools.count(2)))
        (directory / str(step)).rename(next(directory / name for name in names if not (directory / name).exists()))


# ---- what must agree ----


def _plain(name: str, value: Any) -> Any:
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} cannot be saved as JSON: {error}. Give numbers, strings, lists and dicts.") from error


def _flat(nested: Mapping, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in nested.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _nested(flat: Mapping[str, Any]) -> dict:
    nested = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        inner = nested
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = leaf
    return nested


def _under(name: str, prefixes: Sequence[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def _require_same_meta(path: epath.Path, differing: Mapping[str, tuple[Any, Any]], ignore: Sequence[str]) -> None:
    lines = [
        f"{name}: saved {old!r}, now {new!r}" for name, (old, new) in differing.items() if not _under(name, ignore)
    ]
    if lines:
        raise ValueError(
            f"checkpoint {path} belongs to another run:\n{_shown(lines)}\n"
            "Undo the change, use a new directory, or accept it (--accept_changes; ignore= in code)."
        )


def _require_same_leaves(path: epath.Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    lines = [
        f"{name}: saved {_spelled(stored.get(name))}, wanted {_spelled(wanted.get(name))}"
        for name in sorted(stored.keys() | wanted.keys())
        if _spelled(stored.get(name)) != _spelled(wanted.get(name))
    ]
    if lines:
        raise ValueError(
            f"checkpoint {path} does not fit this state:\n{_shown(lines)}\n"
            "Build the model and the optimizer from the configuration saved with the checkpoint."
        )


def _shown(lines: Sequence[str]) -> str:
    more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n".join(f"  {line}" for line in [*lines[:SHOWN], *more])


def _spelled(leaf: Any) -> str:
    return ABSENT if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"


# ---- what Orbax does ----


def _storable(state: Any) -> dict[str, jax.Array]:
    """Leaves by path name: no container type is stored, so only the names can disagree."""
    named = dict(zip(tree.names(state), jax.tree.leaves(state), strict=True))
    for name, leaf in named.items():
        if not isinstance(leaf, jax.Array) or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            kind = leaf.dtype if isinstance(leaf, jax.Array) else type(leaf).__name__
            raise ValueError(f"{name} is {kind}: the state holds number arrays only; derive keys from seed and step")
    if len(named) != len(jax.tree.leaves(state)):
        raise ValueError("two leaves of the state have the same path name: a key holds '/', rename it")
    return named


def _stored(reader: ocp.Checkpointer, path: epath.Path) -> dict[str, Any]:
    """Name -> what has ``shape`` and ``dtype``, from the files' own headers."""
    return dict(reader.metadata(path / "state").item_metadata.tree)


def _read(reader: ocp.Checkpointer, path: epath.Path, shardings: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Arrays by name, each straight into its sharding; no dtype is given, since Orbax would cast to it in silence."""
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    placed = {name: ocp.ArrayRestoreArgs(sharding=sharding or first) for name, sharding in shardings.items()}
    return reader.restore(
        path / "state",
        args=ocp.args.PyTreeRestore(item=dict.fromkeys(placed, 0), restore_args=placed, partial_restore=True),
    )


def _json(path: epath.Path, item: str) -> Any:
    return json.loads((path / item / "metadata").read_text())


def _handlers() -> ocp.handlers.CheckpointHandlerRegistry:
    """Trained weights are noise: zstd saves a tenth of the bytes and doubles the time."""
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add("state", ocp.args.PyTreeSave, ocp.PyTreeCheckpointHandler(use_compression=False))
    return registry


def _options(
    directory: epath.Path, keep_last: int, keep_best: int, best_metric: str, best_mode: str
) -> ocp.CheckpointManagerOptions:
    def rank(metrics: Mapping[str, float] | None) -> float:
        value = (metrics or {}).get(best_metric, float("nan"))
        return float("-inf") if value != value else -value if best_mode == "min" else value

    best = policies.BestN(get_metric_fn=rank, n=keep_best, keep_checkpoints_without_metrics=False)
    return ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep_last), best]),
        best_fn=rank,  # without it Orbax does not store the metrics that the policy reads
        cleanup_tmp_directories=True,
        async_options=ocp.AsyncOptions(post_finalization_callback=lambda: _list_files(directory)),
    )


@contextlib.contextmanager
def _disk_errors(directory: epath.Path, doing: str) -> Iterator[None]:
    """Orbax and TensorStore raise many types for a full or broken disk; here all are one ``OSError`` with the mend."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        newest = next((step for step in _step_numbers(directory) if not _fault(directory / str(step))), None)
        raise OSError(
            f"{doing} failed in {directory}: {reason}. Newest whole checkpoint: {newest}. "
            "Free space or mend the permissions there, then start again to resume from it."
        ) from error
