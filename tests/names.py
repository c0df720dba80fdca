"""Names are types: an import hook by which every function of a package checks, whenever it returns, that its arrays
have the shapes that their names say, while programs are traced too.

Only the code in memory differs from the files: no ``.pyc`` is read or written, and a process that a test starts runs
the files as they are. A function that raises is not checked: its own error is the one to see. Nor are the bodies of
modules and classes, and the variables of comprehensions and generator expressions.
"""

import ast
import builtins
import functools
import re
import sys
from collections.abc import Mapping
from importlib.machinery import PathFinder, SourceFileLoader

SUFFIX = re.compile(r".+_([A-Z1]+)$")
# These take any leading axes before the ones that they name, as their documentation says.
ANY_LEADING_AXES = {"token_weights", "sequence_weights", "constant_weights"}


@functools.cache
def letters(name: str) -> str | None:
    """One letter per dimension, if the name says any: ``tokens_BT`` -> ``BT``."""
    found = SUFFIX.match(name)
    return found and found[1]


def name_lies(code_name: str, local: Mapping) -> list[str]:
    """What the suffixes of these local arrays say that is not so: another rank, or two sizes of one letter."""
    sizes, lies = {"1": 1}, []
    for name, value in local.items():
        suffix = letters(name)
        if suffix is None or not isinstance(shape := getattr(value, "shape", None), tuple):
            continue
        if code_name in ANY_LEADING_AXES:
            shape = shape[-len(suffix) :]
        if len(shape) != len(suffix):
            lies.append(f"{name} has shape {shape}")
            continue
        for letter, size in zip(suffix, shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                lies.append(f"{name} has shape {shape}, but {letter} is {sizes[letter]} in this frame")
    return lies


def checked(value):
    """``value``, which the caller is about to return or to yield: raises where a name in the caller's frame lies."""
    frame = sys._getframe(1)
    if lies := name_lies(frame.f_code.co_name, frame.f_locals):
        where = f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})"
        raise AssertionError(f"{where}: {'; '.join(lies)}")
    return value


# Code finds it among the builtins, so that no module has a name more than its file gives it.
CHECKED = "__checked__"
setattr(builtins, CHECKED, checked)


def _call(value: ast.expr | None, place: ast.AST) -> ast.expr:
    """The expression ``__checked__(value)``, on the lines of ``place``."""
    call = ast.Call(ast.Name(CHECKED, ast.Load()), [value or ast.Constant(None)], [])
    return ast.fix_missing_locations(ast.copy_location(call, place))


def _says_shapes(function: ast.AST) -> bool:
    """Whether a name in the function, or in one inside it, has a suffix: no other function is worth a look."""
    nodes = ast.walk(function)
    return any(letters(getattr(node, "id", None) or getattr(node, "arg", None) or "") for node in nodes)


class Checks(ast.NodeTransformer):
    """Puts what functions with suffixed names return or yield through ``checked``; everything else stays as it is."""

    named = False

    def _inside(self, function) -> bool:
        outer, self.named = self.named, _says_shapes(function)
        self.generic_visit(function)
        named, self.named = self.named, outer
        return named

    def visit_FunctionDef(self, function):
        last = function.body[-1]
        if self._inside(function):  # no harm after a return: the compiler drops what is never reached
            function.body.append(ast.copy_location(ast.Expr(_call(None, last)), last))
        return function

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, function):
        if self._inside(function):
            function.body = _call(function.body, function.body)
        return function

    def visit_Return(self, node):
        self.generic_visit(node)
        if self.named:
            node.value = _call(node.value, node.value or node)
        return node

    visit_Yield = visit_YieldFrom = visit_Return


class Loader(SourceFileLoader):
    """Compiles the file anew every time, and leaves ``__pycache__`` alone."""

    def get_code(self, fullname):
        path = self.get_filename(fullname)
        tree = Checks().visit(ast.parse(self.get_data(path), path))
        return compile(tree, path, "exec", dont_inherit=True)


class Finder:
    """Finds the modules of one package."""

    def __init__(self, package: str):
        self._package = package

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] != self._package:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = Loader(spec.loader.name, spec.loader.path)
        return spec


def install(package: str):
    """Checks the names of the package, of which nothing may be imported yet."""
    if package in sys.modules:
        raise ValueError(f"{package} is imported already, so its names would go unchecked: call install before that")
    sys.meta_path.insert(0, Finder(package))
