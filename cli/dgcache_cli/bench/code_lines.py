"""How much code an implementation is: counted in its files, without importing them.

Counted are lines with code on them: no blank lines, comments, or docstrings. What a module imports
of this project counts as well, wherever in it that stands; generated stubs do not.
"""

import ast
import io
import tokenize
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

_OURS = ("dgcache", "dgcache_core", "dgcached", "dgcache_cli")
_NO_CODE = frozenset(
    {
        *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT),
        *(tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER),
    }
)


def code_lines(modules: Iterable[str]) -> int:
    """Return the lines of code of these modules and of what they import of this project."""
    return sum(_count(path.read_text()) for path in _reached(modules).values())


def _reached(modules: Iterable[str]) -> dict[str, Path]:
    reached: dict[str, Path] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        path = _source(name) if name not in reached else None
        if path is not None:
            reached[name] = path
            waiting += _imported(ast.parse(path.read_text()))
    return reached


def _source(name: str) -> Path | None:
    """Find a module's file by its name alone; None for what is foreign, or a name in a module."""
    package, *inner = name.split(".")
    spec = find_spec(package) if package in _OURS else None  # of a submodule it would run the rest
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent.joinpath(*inner)
    found = (path.with_name(f"{path.name}.py"), path / "__init__.py")
    return next((file for file in found if file.is_file()), None)


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _count(source: str) -> int:
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - set(_docstring_lines(ast.parse(source))))


def _docstring_lines(tree: ast.Module) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield from range(node.lineno, (node.end_lineno or node.lineno) + 1)
