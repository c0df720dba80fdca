"""English prose that every Python carries: the language reference in `pydoc_data` and the standard library's own words.

Files are parsed, never imported. The corpus is the same on every run with the same Python; others differ a little.
"""

import ast
import functools
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}  # code under test and tables
_SCOPES = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_COMMENTS = re.compile(r"(?:^[ \t]*#[^\n]*\n){2,}", re.MULTILINE)
_COMMENT_MARK = re.compile(r"^[ \t]*#+!?[ \t]?", re.MULTILINE)
_SHORTEST = 60  # characters: shorter remarks are rarely sentences
_LETTERS = 0.75  # share of letters and blanks that tells prose from tables and commented-out code


def files() -> tuple[Path, ...]:
    """The standard library's source files, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - _SKIPPED)  # pruned: installed packages can be a hundred thousand files
        found.extend(Path(folder, name) for name in sorted(names) if name.endswith(".py"))
    return tuple(found)


@functools.cache
def documents() -> tuple[str, ...]:
    """One document per topic of the language reference and per source file; no passage appears twice."""
    seen: set[str] = set()
    found = []
    for path in files():
        for passages in _documents_of(path):
            fresh = [passage for passage in dict.fromkeys(passages) if passage not in seen]
            seen.update(fresh)
            if fresh:
                found.append("\n\n".join(fresh))
    return tuple(found)


def _documents_of(path: Path) -> Iterator[list[str]]:
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escape sequences in the library are no concern of ours
            module = ast.parse(source)
    except (SyntaxError, ValueError):  # files that are broken on purpose
        return
    if path.parent.name == "pydoc_data":
        yield from ([topic] for topic in _topics(module))
    else:
        yield [passage for _, passage in sorted([*_docstrings(module), *_comments(source)]) if _is_prose(passage)]


def _topics(module: ast.Module) -> Iterator[str]:
    for statement in module.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            yield from ast.literal_eval(statement.value).values()


def _docstrings(module: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, docstring) of the module and of every class and function that is not inside a branch."""
    scopes = [module]
    while scopes:
        scope = scopes.pop()
        docstring = ast.get_docstring(scope)
        if docstring:
            yield scope.body[0].lineno, docstring
        scopes.extend(child for child in scope.body if isinstance(child, _SCOPES))


def _comments(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of each run of comment lines."""
    for match in _COMMENTS.finditer(source):
        yield source.count("\n", 0, match.start()) + 1, _COMMENT_MARK.sub("", match[0]).strip()


def _is_prose(passage: str) -> bool:
    letters = sum(character.isalpha() or character.isspace() for character in passage)
    return len(passage) >= _SHORTEST and letters >= _LETTERS * len(passage)
