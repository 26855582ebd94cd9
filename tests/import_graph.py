"""Which modules of a package import which, read from their source, and the circles among them."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path


def imports(folders: Mapping[str, Path]) -> dict[str, set[str]]:
    """For each module of the packages (name -> folder), those of their modules that it imports.

    Imports in functions and those for type checking count. `from package import name` imports the module of that name
    where there is one, else the package. That Python runs the packages above a module first does not count.
    """
    paths = {
        _name(path.relative_to(folder), package): path for package, folder in folders.items() for path in folder.rglob("*.py")
    }
    found: dict[str, set[str]] = {}
    for module, path in paths.items():
        names = _imported(ast.parse(path.read_text(encoding="utf-8")))
        modules = {name if name in paths else package for package, name in names}
        found[module] = (modules & paths.keys()) - {module}
    return found


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Sets of modules that import each other, directly or through others; sorted."""
    reached: dict[str, set[str]] = {}
    for module in graph:
        seen, left = set[str](), list(graph[module])
        while left:
            if (other := left.pop()) not in seen:
                seen.add(other)
                left += graph[other]
        reached[module] = seen
    groups = {tuple(sorted({module} | {o for o in seen if module in reached[o]})) for module, seen in reached.items()}
    return sorted(list(group) for group in groups if len(group) > 1)


def _name(path: Path, package: str) -> str:
    parts = path.with_suffix("").parts
    return ".".join([package, *(parts[:-1] if parts[-1] == "__init__" else parts)])


def _imported(node: ast.AST) -> Iterator[tuple[str, str]]:
    """(module, full name) of each import; the name may be that of a module or of something inside the module."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, alias.name) for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module:
            yield from ((child.module, f"{child.module}.{alias.name}") for alias in child.names)
        else:
            yield from _imported(child)
