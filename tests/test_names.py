import ast
import dataclasses
import importlib
import inspect
import operator
import pickle
import py_compile
import sys
import traceback

import jax
import names
import numpy as np
import pytest

from jaxllm import losses

X_BT = np.zeros((2, 3))
LIAR = "def lie(x_BT):\n    y_BD = x_BT[{0}]\n    return y_BD\n"


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A function: source of a module -> the module, imported through the hook."""

    def planted(source):
        (tmp_path / "planted.py").write_text(source, encoding="utf-8")
        return importlib.import_module("planted")

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [names.Finder("planted"), *sys.meta_path])
    yield planted
    sys.modules.pop("planted", None)


@pytest.mark.parametrize(
    "cut, lie",
    [
        ("0", r"planted\.py:3 \(lie\): y_BD has shape \(3,\)$"),
        (":1", r"y_BD has shape \(1, 3\), but B is 2 in this frame$"),
        (":, :, None", r"y_BD has shape \(2, 3, 1\)$"),
    ],
)
def test_an_array_that_belies_its_name_is_found(planted, cut, lie):
    with pytest.raises(AssertionError, match=lie):
        planted(LIAR.format(cut)).lie(X_BT)


def test_an_array_that_its_name_fits_passes(planted):
    np.testing.assert_array_equal(planted(LIAR.format(":, :1")).lie(X_BT), X_BT[:, :1])


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, jax.grad, lambda f: lambda x: jax.eval_shape(f, x)])
def test_tracers_are_arrays(planted, transform):
    with pytest.raises(AssertionError, match=r"y_BD has shape \(\d,\)"):
        transform(planted(LIAR.format("0")).lie)(np.zeros((2, 3, 4)) if transform is jax.vmap else X_BT)


def test_ones_in_a_name_are_dimensions_of_length_one(planted):
    module = planted(
        "def honest(x_BT):\n    y_B1T = x_BT[:, None]\n\ndef lie(x_BT):\n    y_B1T = x_BT[:, None].repeat(2, 1)\n"
    )
    module.honest(X_BT)
    with pytest.raises(AssertionError, match=r"y_B1T has shape \(2, 2, 3\), but 1 is 1"):
        module.lie(X_BT)


def test_some_functions_take_any_leading_axes_but_one_size_of_a_letter(planted):
    module = planted("def token_weights(x_BT, y_BT): pass\ndef other_weights(x_BT): pass")
    module.token_weights(X_BT[None], X_BT)
    with pytest.raises(AssertionError, match=r"y_BT has shape \(2, 1\), but T is 3"):
        module.token_weights(X_BT[None], X_BT[:, :1])
    with pytest.raises(AssertionError, match="x_BT has shape"):
        module.other_weights(X_BT[None])


KINDS = {
    "that says nothing but its argument's shape": "def lie(x_B): pass",
    "with a bare return": "def lie(x_BT):\n    y_B = x_BT\n    if True:\n        return\n    y_B = None",
    "that ends without a return": "def lie(x_BT):\n    for y_B in [x_BT]:\n        pass",
    "inside a function": "def lie(x):\n    def inner(x_B): return x_B\n    return inner(x).shape",
    "around a function": "def lie(x_B):\n    def inner(): return 1\n    return inner()",
    "that reads a name of the one around it": (
        "def lie(x):\n    y_B = x\n    def inner(): return y_B\n    y_B, kept = None, inner()"
    ),
    "of a class": "class Lies:\n    def lie(self, x_B): return 1\nlie = Lies().lie",
    "of no class instance": "class Lies:\n    @staticmethod\n    def lie(x_B): return 1\nlie = Lies.lie",
    "with a decorator": "import functools\n@functools.partial\ndef lie(x_B): return 1",
    "without a name": "lie = lambda x_B: 1",
    "that yields": "def give(x_BT):\n    y_B = x_BT\n    yield 1\n    y_B = None\ndef lie(x): return next(give(x))",
    "that yields from another": "def give(x_B):\n    yield from (1, 2)\ndef lie(x): return next(give(x))",
    "that has yielded": "def give(x_BT):\n    yield 1\n    y_B = x_BT\ndef lie(x): return list(give(x))",
}


@pytest.mark.parametrize("source", KINDS.values(), ids=KINDS)
def test_every_function_is_checked(planted, source):
    with pytest.raises(AssertionError, match=r"[xy]_B has shape \(2, 3\)"):
        planted(source).lie(X_BT)


def test_an_error_passes_as_it_was_raised(planted):
    module = planted("def lie(x_BT):\n    y_B = x_BT\n    raise ValueError(1)\n\ndef outer(x_B): return lie(x_B)\n")
    with pytest.raises(ValueError, match="^1$") as raised:
        module.outer(X_BT)
    assert raised.value.__context__ is None and raised.value.__cause__ is None
    assert [(each.name, each.lineno) for each in traceback.extract_tb(raised.tb)[1:]] == [("outer", 5), ("lie", 3)]


def test_a_function_that_handles_an_error_is_checked_while_another_is_handled(planted):
    module = planted("def lie(x_B):\n    try:\n        raise KeyError\n    except KeyError:\n        return x_B\n")
    try:
        raise ValueError
    except ValueError:
        with pytest.raises(AssertionError, match="x_B has shape"):
            module.lie(X_BT)


EVERYTHING = '''"""A module."""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect

COUNT = 0


@dataclasses.dataclass(frozen=True)
class Pair:
    """A class."""

    a_BT: NotDefined
    b: int = 2

    @property
    def total(self):
        return self.a_BT.sum() + self.b

    def line(self): return inspect.currentframe().f_lineno


class More(Pair):
    def __init__(self, a_BT):
        """An initializer."""
        super().__init__(a_BT, 3)

    @classmethod
    def zero(cls, a_BT): return cls(0 * a_BT)

    def __repr__(self): return f"{__class__.__name__} {self.__mangled(self.a_BT)}"

    def __mangled(self, a_BT): return a_BT.shape


@functools.cache
def cached(a_B=None, *, b_B=None):
    """A function."""
    global COUNT
    COUNT += 1
    return COUNT


def counter(x_BT):
    count = 0

    def more():
        nonlocal count
        count += x_BT.shape[0]
        return count

    return more


def sent(x_BT):
    try:
        received = yield x_BT.sum()
        received += yield from sent_inside(received, x_BT)
    finally:
        COUNTS.append(len(COUNTS))
    return received


def sent_inside(y, x_BT): return (yield y) * 2


@contextlib.contextmanager
def context(x_BT):
    with contextlib.suppress(KeyError):
        yield x_BT.size


COUNTS = []
either = lambda x_BT=None, *, y_BT=None: x_BT if y_BT is None else y_BT
squares = lambda xs: [y_B**2 for y_B in xs if (lambda z_B: z_B)(y_B)]


def everything(x_BT):
    more, generator = counter(x_BT), sent(x_BT)
    found = [more(), more(), cached(), cached(), cached(b_B=1), COUNT, repr(More.zero(x_BT)), More(x_BT).total]
    found += [next(generator), generator.send(5), either(x_BT).shape, squares(range(3)), Pair(x_BT).line()]
    try:
        generator.send(7)
    except StopIteration as stop:
        found += [stop.value, COUNTS]
    with context(x_BT) as size:
        found += [size]
        raise KeyError
    return found
'''


def test_everything_else_is_as_it_was(planted, tmp_path):
    (tmp_path / "plain.py").write_text(EVERYTHING, encoding="utf-8")
    ours, plain = planted(EVERYTHING), importlib.import_module("plain")
    assert ours.everything(X_BT) == plain.everything(X_BT)
    assert set(vars(ours)) == set(vars(plain))
    for path in ("cached", "counter", "everything", "sent", "context", "Pair", "More.__init__", "More.zero"):
        mine, theirs = (inspect.unwrap(operator.attrgetter(path)(module)) for module in (ours, plain))
        assert mine.__doc__ == theirs.__doc__ and inspect.getsource(mine) == inspect.getsource(theirs)
        assert inspect.signature(mine) == inspect.signature(theirs)
    assert (ours.__doc__, ours.Pair.__doc__, ours.cached.__doc__) == ("A module.", "A class.", "A function.")
    assert [field.type for field in dataclasses.fields(ours.Pair)] == ["NotDefined", "int"]
    assert pickle.loads(pickle.dumps(ours.everything)) is ours.everything
    del sys.modules["plain"]


@pytest.mark.parametrize("source, changed", [("def f(x): return self.x_BT", False), ("def f(x): return x_BT", True)])
def test_a_function_in_which_no_name_has_a_suffix_is_left_alone(source, changed):
    assert (ast.dump(names.Checks().visit(ast.parse(source))) != ast.dump(ast.parse(source))) is changed


def test_programs_are_the_same_so_that_they_are_found_in_the_cache(planted, tmp_path):
    source = "import jax\ndef f(x_BT):\n    y_B = jax.numpy.sum(x_BT,\n        axis=1)\n    return (\n        y_B * 2)"
    ours, plain = planted(source).f, {}
    exec(compile(source, str(tmp_path / "planted.py"), "exec"), plain)
    texts = [jax.jit(f).lower(X_BT).as_text(debug_info=True) for f in (ours, plain["f"])]
    assert texts[0] == texts[1] and "planted.py" in texts[0]


def test_compiled_files_are_neither_written_nor_read(planted, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    planted(LIAR.format("0"))
    assert not (tmp_path / "__pycache__").exists()
    py_compile.compile(tmp_path / "planted.py")
    with pytest.raises(AssertionError, match="y_BD has shape"):
        importlib.reload(sys.modules["planted"]).lie(X_BT)


def test_every_module_of_the_package_goes_through_the_hook():
    ours = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "jaxllm"}
    assert len(ours) > 10
    assert [name for name, module in ours.items() if not isinstance(module.__loader__, names.Loader)] == []
    with pytest.raises(AssertionError, match=r"chosen_B has shape \(2, 3\)"):
        losses.ipo(X_BT, X_BT, X_BT, X_BT, beta=0.1)


def test_the_hook_comes_before_the_package():
    with pytest.raises(ValueError, match="jaxllm is imported already.*call install before"):
        names.install("jaxllm")
