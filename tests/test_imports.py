"""The import law: which file may import what, touch files, and compile. Each law is shown to catch a planted breach."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A file imports from lower floors only; a folder stands on one floor, and inside it imports go one way.
FLOORS = {
    **dict.fromkeys(("tree", "metrics", "figures", "hardware", "einsum", "configure", "losses", "text"), 0),
    **dict.fromkeys(("sharding", "data", "rewards"), 1),
    **dict.fromkeys(("model", "checkpoint"), 2),
    **dict.fromkeys(("generate", "train", "workdir", "log"), 3),
    **dict.fromkeys(("curate", "evaluate", "rl", "interop"), 4),
    "run_config": 5,
    "stages": 6,
    "loop": 7,
    **dict.fromkeys(("serve", "pipeline"), 8),
}
# Within floor 0, losses make their products with the one einsum, and metrics and figures stand apart.
SAME_FLOOR = {("losses", "einsum"), ("rl", "evaluate")}
MAY_COMPILE = ("loop", "generate", "evaluate", "rl", "hardware")
MAY_TOUCH_FILES = "text data checkpoint metrics figures workdir serve interop curate pipeline".split()
NO_JAX = ("text", "data", "configure", "rewards", "curate")
# Grain names an iterator's position get_state and set_state, and those who take one call them so.
NOT_NAMES = re.compile(r"_?(get|compute)_(?!state$)|.*(Trainer|Manager|_fn$)|(utils|helpers)$")
LONGEST_FILE, LONGEST_SCRIPT, LONG_SCRIPTS = 400, 60, ("benchmark.py", "measuring.py", "rollouts.py", "reference.py")
FILE_CALLS = {
    "open",
    "write_text",
    "write_bytes",
    "mkdir",
    "makedirs",
    "unlink",
    "rename",
    "rmtree",
    "savefig",
    "memmap",
}


def floor(module: str) -> str:
    """``jaxllm.model.rope`` -> ``model``."""
    return module.split(".")[1]


def imported(source: str) -> set[str]:
    """Every module that the source may import, anywhere in it: of ``from a import b`` both a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def breaches(module: str, source: str) -> list[str]:
    """What this source text breaks, were it the module ``jaxllm.<...>``."""
    here, modules = floor(module), imported(source)
    packages = {name.split(".")[0] for name in modules}
    tree = ast.parse(source)
    found = []
    for other in {floor(name) for name in modules if name.startswith("jaxllm.")} - {here}:
        if other not in FLOORS:
            found.append(f"imports {other}, which has no floor")
        elif FLOORS[other] >= FLOORS[here] and (here, other) not in SAME_FLOOR:
            found.append(f"floor {FLOORS[here]} imports {other} of floor {FLOORS[other]}")
    if here == "losses" and not packages <= {"functools", "math", "jax", "jaxllm"}:
        found.append(f"losses import {sorted(packages)}")
    if here == "losses" and any(
        name.startswith("jaxllm.") and floor(name) not in ("losses", "einsum") for name in modules
    ):
        found.append("losses import more of jaxllm than einsum")
    if here != "model" and "flax" in packages:
        found.append("only model imports flax")
    if here in NO_JAX and packages & {"jax", "flax", "optax"}:
        found.append(f"{here} works without jax")
    if packages & {"configs", "experiments", "tests"}:
        found.append("the library knows neither configs nor scripts")
    for node in ast.walk(tree):
        name = called(node)
        if name in ("jit", "pjit", "pmap") and here not in MAY_COMPILE:
            found.append(f"line {node.lineno} compiles")
        if name in FILE_CALLS and here not in MAY_TOUCH_FILES and not opens_no_file(node):
            found.append(f"line {node.lineno} touches files: {name}")
    for name in defined(tree) | {module.split(".")[-1]}:
        if NOT_NAMES.match(name):
            found.append(f"the name {name}")
    if len(source.splitlines()) > LONGEST_FILE:
        found.append(f"{len(source.splitlines())} lines are more than {LONGEST_FILE}")
    return found


def called(node: ast.AST) -> str:
    """The last name of what is called, or of ``jax.jit`` wherever it stands (a decorator, an argument)."""
    if isinstance(node, ast.Call):
        node = node.func
    elif not (isinstance(node, ast.Attribute) and node.attr in ("jit", "pjit", "pmap")):
        return ""
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def opens_no_file(call: ast.Call) -> bool:
    """``workdir.open(...)`` and ``checkpoint.open(...)`` are the project's own: they touch files for others."""
    owner = getattr(call.func, "value", None)
    return isinstance(owner, ast.Name) and owner.id in MAY_TOUCH_FILES


def defined(tree: ast.AST) -> set[str]:
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name for node in ast.walk(tree) if isinstance(node, kinds)}


def cycle(edges: dict[str, set[str]]) -> list[str]:
    """A path of modules that leads back to itself; empty where there is none."""
    done: set[str] = set()

    def walk(module, path):
        if module in path:
            return path[path.index(module) :] + [module]
        if module in done:
            return []
        for other in sorted(edges.get(module, ())):
            if found := walk(other, path + [module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(edges) if (found := walk(module, []))), [])


def modules() -> dict[str, Path]:
    paths = {path.relative_to(ROOT).with_suffix(""): path for path in (ROOT / "jaxllm").rglob("*.py")}
    return {".".join(name.parts).removesuffix(".__init__"): path for name, path in paths.items()}


MODULES = modules()


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"jaxllm"}))
def test_each_file_keeps_the_law(module):
    assert floor(module) in FLOORS, f"give {module} a floor"
    assert breaches(module, MODULES[module].read_text(encoding="utf-8")) == []


def test_no_import_leads_back_to_itself():
    # The package's own __init__ gathers its files and is not counted: its files import each other by name.
    files = {name for name, path in MODULES.items() if path.name != "__init__.py"}
    edges = {name: imported(MODULES[name].read_text(encoding="utf-8")) & files for name in files}
    assert sum(map(len, edges.values())) > 30
    assert cycle(edges) == []


def test_the_root_package_holds_no_code():
    assert [type(node) for node in ast.parse(MODULES["jaxllm"].read_text(encoding="utf-8")).body] == [ast.Expr]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.name)
def test_configs_import_neither_jax_nor_the_library(path):
    packages = {name.split(".")[0] for name in imported(path.read_text(encoding="utf-8"))}
    assert packages <= {"configs", "ml_collections"}


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.py")), ids=lambda path: path.name)
def test_scripts_are_thin(path):
    source = path.read_text(encoding="utf-8")
    assert path.name in LONG_SCRIPTS or len(source.splitlines()) <= LONGEST_SCRIPT
    assert ast.get_docstring(ast.parse(source))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_each_file_says_what_it_is_for(module):
    assert ast.get_docstring(ast.parse(MODULES[module].read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "module, source, breach",
    [
        ("jaxllm.tree", "from jaxllm import sharding", "floor 0 imports sharding of floor 1"),
        ("jaxllm.sharding", "def f():\n    from jaxllm.data import loader", "floor 1 imports data of floor 1"),
        ("jaxllm.model.rope", "import jaxllm.train", "floor 2 imports train of floor 3"),
        ("jaxllm.train.update", "from jaxllm.loop import run", "floor 3 imports loop of floor 7"),
        ("jaxllm.losses.policy", "import numpy", "losses import"),
        ("jaxllm.losses.policy", "from jaxllm.tree import mask", "losses import more"),
        ("jaxllm.train.update", "import flax.nnx", "only model imports flax"),
        ("jaxllm.data.loader", "import jax.numpy", "data works without jax"),
        ("jaxllm.stages", "from configs import common", "neither configs nor scripts"),
        ("jaxllm.model.layers", "import jax\nf = jax.jit(print)", "line 2 compiles"),
        ("jaxllm.model.layers", "import jax\n@jax.jit\ndef f(): pass", "line 2 compiles"),
        (
            "jaxllm.train.update",
            "import functools, jax\nf = functools.partial(jax.jit, donate_argnums=0)",
            "line 2 compiles",
        ),
        ("jaxllm.train.update", "from jax import jit\nf = jit(print)", "line 2 compiles"),
        ("jaxllm.loop", "with open('x') as f: pass", "line 1 touches files: open"),
        ("jaxllm.stages", "path.write_text('x')", "line 1 touches files: write_text"),
        ("jaxllm.stages", "directory.mkdir()", "line 1 touches files: mkdir"),
        ("jaxllm.tree", "def get_names(): pass", "the name get_names"),
        ("jaxllm.loop", "class Trainer: pass", "the name Trainer"),
        ("jaxllm.train.utils", "", "the name utils"),
        ("jaxllm.tree", "x = 1\n" * 401, "401 lines"),
        ("jaxllm.tree", "from jaxllm import unheard_of", "has no floor"),
    ],
)
def test_a_planted_breach_is_found(module, source, breach):
    assert any(breach in found for found in breaches(module, source)), breaches(module, source)


@pytest.mark.parametrize(
    "module, source",
    [
        ("jaxllm.losses.logprobs", "import functools\nimport jax\nfrom jaxllm.einsum import einsum"),
        ("jaxllm.loop", "import jax\nfrom jaxllm import checkpoint\nf = jax.jit(print)\ncheckpoint.open('x')"),
        ("jaxllm.metrics", "open('metrics.jsonl')"),
        ("jaxllm.model.layers", "from flax import nnx\nfrom jaxllm.model.rope import table"),
    ],
)
def test_what_the_law_allows_is_no_breach(module, source):
    assert breaches(module, source) == []


def test_a_planted_cycle_is_found():
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c", "b"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
